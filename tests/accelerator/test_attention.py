"""Attention of whole sequences by the device's own kernel, against plain scores on the CPU."""

import jax
import jax.numpy as jnp
import pytest

from tests.ops.test_sequences import SCALE, arrays, padded
from w2s_jax.ops.sequences import Reach, attend_sequence

pytestmark = pytest.mark.accelerator
CASES = {
    "causal": ({"heads": 2, "kv_heads": 2}, (None,), None),
    "grouped": ({"heads": 8, "kv_heads": 2}, (None,), None),
    "window": ({"heads": 4, "kv_heads": 2}, (50,), None),
    "padding": ({"heads": 2, "kv_heads": 1}, (None,), (30, -70)),
    "wide heads": ({"heads": 2, "kv_heads": 1, "width": 128}, (None,), None),
}
KERNELS = {"gpu": "fmha", "tpu": "tpu_custom_call"}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, toy, on_cpu, distance):
    shape, windows, padding = CASES[case]
    length = 128 if toy else 1024
    given = arrays(length, **{"width": 64} | shape, dtype=jnp.bfloat16)
    text = None if padding is None else padded(*padding, length=length)
    if text is not None:
        # What stands on padding is nobody's to read.
        given = [jnp.where(text[..., None, None], x, 0) for x in given]

    def attend(query, keys, values, slope, text):
        def run(*three):
            return attend_sequence(*three, Reach(windows, text=text), scale=SCALE) * seen

        seen = 1.0 if text is None else text[..., None, None]
        out, pull = jax.vjp(run, query, keys, values)
        return out, *pull(slope.astype(out.dtype))

    whole = [x.astype(jnp.float32) for x in given]
    with jax.default_matmul_precision("highest"):
        expected = on_cpu(jax.jit(attend), *whole, text)
    program = jax.jit(attend).lower(*given, text)
    marker = KERNELS.get(jax.default_backend())
    assert marker is None or marker in program.as_text(), "the device's kernel is not used"
    found = program.compile()(*given, text)
    # bfloat16 has 8 bits: the result is rounded once, weights and gradients several times.
    names = ("values", "gradient of queries", "gradient of keys", "gradient of values")
    for name, ours, right in zip(names, found, expected, strict=True):
        assert distance(ours, right) < 0.02, name
