"""What the tests on an accelerator share: their size, and the CPU that they compare with."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tests.tiny import tiny_model
from w2s_jax.models.model import Model

LARGER = {
    "width": 256, "layers": 4, "heads": 8, "kv_heads": 4, "head_width": 32, "mlp_width": 512,
    "vocab_size": 512,
}  # fmt: skip


@pytest.fixture(scope="session")
def toy(request: pytest.FixtureRequest) -> bool:
    """Whether this is the rehearsal, which is small and on the CPU alone."""
    return request.config.getoption("--rehearse")


@pytest.fixture(scope="session")
def make(toy: bool) -> Callable[..., Model]:
    """Makes a model of a seed, of a size that gives the device something to do."""
    if toy:
        return functools.partial(tiny_model, layers=1)
    # Logits as far apart as a narrow model's.
    sharpness = 12.0 * (16 / LARGER["width"]) ** 0.5
    return lambda seed, **fields: tiny_model(seed, sharpness=sharpness, **LARGER | fields)


@pytest.fixture
def exact():
    """Float32 products in float32: an accelerator's own default has fewer digits."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def on_cpu(toy: bool) -> Callable[..., Any]:
    """Calls a function with everything on the CPU: `on_cpu(function, *arguments)`."""
    cpu = jax.devices("cpu")[0]
    if toy:
        # Where everything is already; to place it by name would compile its programs again.
        return lambda function, *arguments: jax.block_until_ready(function(*arguments))

    def there(leaf: Any) -> Any:
        return jax.device_put(leaf, cpu) if isinstance(leaf, jax.Array | np.ndarray) else leaf

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        with jax.default_device(cpu):
            return jax.block_until_ready(function(*jax.tree.map(there, arguments)))

    return call


@pytest.fixture(scope="session")
def distance() -> Callable[[Any, Any], float]:
    """‖found − expected‖ / ‖expected‖ in float64."""

    def of(found: Any, expected: Any) -> float:
        found, expected = (np.asarray(x, np.float64) for x in (found, expected))
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    return of
