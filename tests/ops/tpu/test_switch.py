"""Which programs have the kernels for TPUs, and the switch that turns them off."""

import jax
import jax.numpy as jnp
import pytest

from w2s_jax.errors import InputError
from w2s_jax.ops import sequences
from w2s_jax.ops.sequences import Reach, attend_sequence
from w2s_jax.ops.sharding import ON_ONE_DEVICE
from w2s_jax.ops.tpu import SWITCH, has_kernel


def on(kind, monkeypatch, count=1):
    """As if the devices were of this kind."""

    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device()] * count)


@pytest.mark.parametrize(
    ("kind", "count", "dtype", "asked"),
    [("TPU v5", 1, jnp.bfloat16, "always"), ("TPU v5p", 1, jnp.bfloat16, "always"),
     ("cpu", 1, jnp.bfloat16, "never"), ("TPU v5 lite", 1, jnp.bfloat16, "in blocks"),
     ("TPU v6 lite", 1, jnp.bfloat16, "in blocks"), ("TPU v6 lite", 1, jnp.float32, "never"),
     ("TPU v5", 1, jnp.float32, "never"), ("TPU v5", 4, jnp.bfloat16, "never")],
)  # fmt: skip
def test_chips_of_two_cores_have_the_kernel(kind, count, dtype, asked, monkeypatch):
    """Others where keys go in blocks; without a mesh one of several devices never has."""
    on(kind, monkeypatch, count)
    assert has_kernel(jnp.dtype(dtype), ON_ONE_DEVICE) == (asked == "always")
    assert has_kernel(jnp.dtype(dtype), ON_ONE_DEVICE, True) == (asked != "never")


def sequence_for_tpus():
    """The text of attention of a sequence; a function of its own, so that it is traced anew."""
    given = [jax.ShapeDtypeStruct((1, 1, sequences.SHORTEST, 1, 128), jnp.bfloat16)] * 3
    program = jax.jit(lambda *three: attend_sequence(*three, Reach(), scale=1.0)).trace(*given)
    return program.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(("value", "there"), [(None, True), ("on", True), ("off", False)])
def test_the_switch_leaves_both_kernels_out(value, there, monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    assert ("tpu_custom_call" in sequence_for_tpus()) == there
    on("TPU v5", monkeypatch)
    assert has_kernel(jnp.dtype("bfloat16"), ON_ONE_DEVICE) == there


def test_a_word_that_is_neither_is_refused(monkeypatch):
    monkeypatch.setenv(SWITCH, "no")
    with pytest.raises(InputError, match="W2S_TPU_KERNELS is 'no'; it must be on or off"):
        sequence_for_tpus()
