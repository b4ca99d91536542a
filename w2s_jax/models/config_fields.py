"""Fields of a config.json, checked: numbers, switches, mappings, and the rope in both directions.

`where` is put before a field's name: what the field lies in. A rope is rope_theta with
rope_scaling, or rope_parameters.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.ops.rotary import ROPE_KINDS, Rope

Json = Mapping[str, Any]


def size(hf: Json, name: str, *, least: int = 1, where: str = "") -> int:
    """A whole number from `least` on. Raises InputError for anything else."""
    if name not in hf:
        raise InputError(f"config field {where}{name} is missing")
    value = hf[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        taken = "a positive whole number" if least == 1 else f"a whole number from {least} on"
        raise refused(where + name, value, taken)
    return value


def number(
    hf: Json, name: str, *, above: float = -math.inf, least: float = -math.inf, where: str = ""
) -> float:
    """A finite number above one bound or from the other on. Raises InputError for anything else."""
    value = hf.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = _as_float(value)
        if math.isfinite(found) and found > above and found >= least:
            return found
    taken = "a number that is finite"
    if above > -math.inf:
        taken = f"a number above {above:g}"
    elif least > -math.inf:
        taken = f"a number of at least {least:g}"
    raise refused(where + name, value, taken)


def optional_number(hf: Json, name: str, **bounds: Any) -> float | None:
    """`number`, or None where the field is null or not there."""
    return None if hf.get(name) is None else number(hf, name, **bounds)


def switch(hf: Json, name: str) -> bool:
    """true or false, which null is too. Raises InputError for anything else: texts are all true."""
    value = hf.get(name)
    if value not in (None, False, True):
        raise refused(name, value, "true or false")
    return bool(value)


def mapping(hf: Json, name: str, example: str) -> Json:
    """A JSON object, empty where the field is null or not there. Raises InputError otherwise."""
    value = hf.get(name)
    if not isinstance(value, Mapping | None):
        raise refused(name, value, f"a mapping such as {example}")
    return value or {}


def refused(name: str, value: Any, taken: str) -> InputError:
    """The error that names a field, its value and what it takes."""
    told = repr(value)
    told = told if len(told) <= 80 else f"{told[:79]}…"
    return InputError(f"config field {name} is {told}; it must be {taken}")


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


_DYNAMIC = "dynamic"
_EXAMPLE = '{"rope_type": "linear", "factor": 2.0}'


def read_rope(hf: Json) -> tuple[Rope, int]:
    """The rope, and how many positions it reaches: files name them before the scaling or after it.

    Where `original_max_position_embeddings` is there, the larger of `max_position_embeddings` and
    original × factor; without it `linear` and `yarn` stretch `max_position_embeddings`.
    """
    max_positions = size(hf, "max_position_embeddings")
    held = [(name, mapping(hf, name, _EXAMPLE)) for name in ("rope_scaling", "rope_parameters")]
    name, scaling = next((one for one in held if one[1]), held[0])
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise InputError("config field rope_parameters differs by layer, which is not supported")
    refuse_partial(scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in (*ROPE_KINDS, _DYNAMIC):
        known = ", ".join((*ROPE_KINDS, _DYNAMIC))
        raise InputError(f"rope kind {kind!r} is not supported; supported: {known}")
    # The bounds of YaRN's rotations are logarithms to this base.
    lowest = 1 if kind == "yarn" else 0
    theta = number({"rope_theta": 10000.0, **hf, **scaling}, "rope_theta", above=lowest)
    given = _original_positions(hf, scaling, f"{name}.")
    if kind == _DYNAMIC:
        # Its angles change with the length only beyond the original positions.
        return Rope(theta=theta), min(max_positions, given or max_positions)
    original = given or max_positions
    rope = _scaled_rope(kind, theta, scaling, original, max_positions, f"{name}.")
    if given:
        return rope, max(max_positions, int(given * rope.factor))
    return rope, int(max_positions * rope.factor) if kind in ("linear", "yarn") else max_positions


def refuse_partial(hf: Json) -> None:
    """Raise InputError where only a part of each head is rotated."""
    if hf.get("partial_rotary_factor") not in (None, 1):
        raise InputError("config field partial_rotary_factor is not 1, which is not supported")


def _original_positions(hf: Json, scaling: Json, where: str) -> int | None:
    """How many positions a model was first trained on, where the file says so."""
    name = "original_max_position_embeddings"
    if hf.get(name) is not None:
        return size(hf, name)
    return None if scaling.get(name) is None else size(scaling, name, where=where)


def _scaled_rope(
    kind: str, theta: float, scaling: Json, original: int, max_positions: int, where: str
) -> Rope:
    read = partial(number, scaling, where=where)
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=read("factor", least=1))
    if kind == "llama3":
        low = read("low_freq_factor", above=0)
        return Rope(
            theta=theta,
            kind=kind,
            factor=read("factor", least=1),
            low_frequency_factor=low,
            high_frequency_factor=read("high_freq_factor", above=low),
            original_max_positions=original,
        )

    def given(name: str, usual: float, **bounds: Any) -> float:
        return usual if scaling.get(name) is None else read(name, **bounds)

    factor = given("factor", max_positions / original, least=1)
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        attention_factor=_yarn_attention_factor(scaling, factor, where),
        beta_fast=given("beta_fast", 32.0, above=0),
        beta_slow=given("beta_slow", 1.0, above=0),
        truncate=switch({"truncate": True, **scaling}, "truncate"),
        original_max_positions=original,
    )


def _yarn_attention_factor(scaling: Json, factor: float, where: str) -> float | None:
    """The factor as given, or from DeepSeek's pair mscale, mscale_all_dim; None: the paper's."""
    read = partial(optional_number, scaling, where=where)
    over, under = (read(name, least=0) for name in ("mscale", "mscale_all_dim"))
    given = read("attention_factor", above=0)
    if given is not None or not over or not under:
        return given
    growth = 0.1 * math.log(max(factor, 1.0))
    return (over * growth + 1.0) / (under * growth + 1.0)


def write_rope(rope: Rope, max_positions: int) -> dict[str, Any] | None:
    """The rope_scaling that `read_rope` reads back; None for the plain rope."""
    if rope.kind == "default":
        return None
    hf: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    # So that the positions are not taken for those before the scaling.
    original = rope.original_max_positions or int(max_positions / rope.factor)
    hf["original_max_position_embeddings"] = original
    if rope.kind == "llama3":
        hf["low_freq_factor"] = rope.low_frequency_factor
        hf["high_freq_factor"] = rope.high_frequency_factor
    if rope.kind == "yarn":
        hf |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
        if rope.attention_factor is not None:
            hf["attention_factor"] = rope.attention_factor
    return hf
