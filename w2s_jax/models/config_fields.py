"""Checked readers of the fields of a config.json: sizes, numbers, activations, ropes.

A field that is wrong is named with what it lies in (`where`).
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.models.families import DERIVED
from w2s_jax.ops.attention import ROPE_KINDS, Rope

Json = Mapping[str, Any]

# Every name config.json gives an activation; the first of each kind is the one written.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
ACTIVATION_NAMES = {kind: name for name, kind in reversed(_ACTIVATIONS.items())}


def refused(name: str, value: Any, taken: str) -> InputError:
    """The error that names a field, its value and what it takes."""
    told = repr(value)
    told = told if len(told) <= 80 else f"{told[:79]}…"
    return InputError(f"config field {name} is {told}; it must be {taken}")


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
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # not of NaN; whole numbers may be too large for one
        and value > above
        and value >= least
    ):
        return float(value)
    taken = f"a number above {above:g}" if above > -math.inf else f"a number of at least {least:g}"
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


def _activation(hf: Json, name: str) -> str:
    value = hf[name]
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise InputError(f"activation {value!r} is not supported; supported: {known}")
    return _ACTIVATIONS[value]


_READERS: dict[Any, Callable[..., Any]] = {
    int: size,
    bool: switch,
    float: partial(number, least=0),
    float | None: partial(optional_number, above=0),
}


def read_fields(config: type, names: Mapping[str, str], hf: Json) -> dict[str, Any]:
    """Fields of a config from those of a file that are named, each checked by the field's type.

    Sizes that follow from others, where they are null, are left out.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    return {
        field: _READERS.get(kinds[field], _activation)(hf, name)
        for field, name in names.items()
        if name not in DERIVED or hf[name] is not None
    }


FULL, SLIDING = "full_attention", "sliding_attention"
_KINDS = (*ROPE_KINDS, "dynamic")
_SHARE = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
_EXAMPLE = '{"rope_type": "linear", "factor": 2.0}'
# Our fields of a rope, and what files call them, beside its factor and original positions.
_ROPE_NAMES = {
    "llama3": {
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {name: name for name in ("beta_fast", "beta_slow", "truncate", "attention_factor")},
    "longrope": {name: name for name in ("short_factor", "long_factor", "attention_factor")},
}


def read_ropes(hf: Json, sliding_theta: str | None) -> dict[str, Any]:
    """A ModelConfig's ropes and positions; `sliding_theta` as of a Family."""
    rope, max_positions = read_rope(_of_kind(hf, FULL) if sliding_theta else hf)
    fields = {"rope": rope, "max_positions": max_positions}
    if sliding_theta is not None:
        local = _of_kind(hf, SLIDING) | {"rope_theta": hf[sliding_theta]}
        fields["sliding_rope"] = read_rope(local)[0]
    return fields


def _of_kind(hf: Json, kind: str) -> dict[str, Any]:
    """The same file with what it says of the rope of one kind of layers alone."""
    scaling = _scaling(hf)[1]
    by_kind = scaling.keys() <= {FULL, SLIDING}
    own = mapping(scaling, kind, _EXAMPLE) if by_kind else scaling if kind == FULL else {}
    return {**hf, "rope_scaling": None, "rope_parameters": own}


def read_rope(hf: Json) -> tuple[Rope, int]:
    """The rope, and how many positions it reaches: files name them before the scaling or after it.

    Where `original_max_position_embeddings` is there, the larger of `max_position_embeddings` and
    original × factor; without it `linear` and `yarn` stretch `max_position_embeddings`.
    """
    max_positions = size(hf, "max_position_embeddings")
    name, scaling = _scaling(hf)
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise InputError("config field rope_parameters differs by layer, which is not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "su" or (kind == "yarn" and "short_factor" in scaling):
        kind = "longrope"  # the first Phi-3 files' names of it
    if kind not in _KINDS:
        raise InputError(f"rope kind {kind!r} is not supported; supported: {', '.join(_KINDS)}")
    # The bounds of YaRN's rotations are logarithms to this base.
    theta = number({"rope_theta": 1e4, **hf, **scaling}, "rope_theta", above=int(kind == "yarn"))
    place, where = (scaling, f"{name}.") if hf.get(_ORIGINAL) is None else (hf, "")
    given = None if place.get(_ORIGINAL) is None else size(place, _ORIGINAL, where=where)
    if kind == "dynamic":
        # Its angles change with the length only beyond the original positions.
        return Rope(theta=theta), min(max_positions, given or max_positions)
    original = given or max_positions
    rope = _scaled_rope(Rope(theta, kind), scaling, original, max_positions, f"{name}.")
    if kind == "default":
        return rope, max_positions
    if kind == "longrope":
        return rope, original
    if given:
        return rope, max(max_positions, int(given * rope.factor))
    return rope, int(max_positions * rope.factor) if kind in ("linear", "yarn") else max_positions


def _scaling(hf: Json) -> tuple[str, Json]:
    """What a file says of its rope, and under which name."""
    held = [(name, mapping(hf, name, _EXAMPLE)) for name in ("rope_scaling", "rope_parameters")]
    return next((one for one in held if one[1]), held[0])


def read_rotary_width(hf: Json, head_width: int, *, known: bool) -> int | None:
    """How many entries of each head are rotated; None for all.

    Raises:
        InputError: Where they are not all, unless that is `known` of the architecture.
    """
    share = {_SHARE: 1.0}
    for place in (hf, _scaling(hf)[1]):
        share |= {_SHARE: place[_SHARE]} if place.get(_SHARE) is not None else {}
    width = int(head_width * number(share, _SHARE, above=0))
    if share[_SHARE] != 1 and not known:
        raise InputError(f"config field {_SHARE} is not 1, which is not supported")
    return None if width == head_width else width


def rotary_share(config: Any) -> float:
    """The share of each head that a ModelConfig rotates, from which readers find the width."""
    share = config.rotated / config.head_width
    return share if int(config.head_width * share) == config.rotated else math.nextafter(share, 1)


def _scaled_rope(rope: Rope, scaling: Json, original: int, max_positions: int, where: str) -> Rope:
    """A plain rope of a kind with what its scaling says."""
    read, scaled = partial(number, scaling, where=where), partial(dataclasses.replace, rope)
    if rope.kind == "default":
        return rope
    if rope.kind == "linear":
        return scaled(factor=read("factor", least=1))
    if rope.kind == "llama3":
        low = read("low_freq_factor", above=0)
        return scaled(
            factor=read("factor", least=1),
            low_frequency_factor=low,
            high_frequency_factor=read("high_freq_factor", above=low),
            original_max_positions=original,
        )

    def given(name: str, usual: float, **bounds: Any) -> float:
        return usual if scaling.get(name) is None else read(name, **bounds)

    if rope.kind == "longrope":
        return scaled(
            factor=max(1.0, max_positions / original),
            attention_factor=optional_number(scaling, "attention_factor", above=0, where=where),
            original_max_positions=original,
            short_factor=_factors(scaling, "short_factor", where),
            long_factor=_factors(scaling, "long_factor", where),
        )
    factor = given("factor", max_positions / original, least=1)
    return scaled(
        factor=factor,
        attention_factor=_yarn_attention_factor(scaling, factor, where),
        beta_fast=given("beta_fast", 32.0, above=0),
        beta_slow=given("beta_slow", 1.0, above=0),
        truncate=switch({"truncate": True, **scaling}, "truncate"),
        original_max_positions=original,
    )


def _factors(scaling: Json, name: str, where: str) -> tuple[float, ...]:
    values = scaling.get(name)
    if not isinstance(values, list):
        raise refused(where + name, values, "a list of numbers above 0")
    return tuple(number({name: value}, name, above=0, where=where) for value in values)


def _yarn_attention_factor(scaling: Json, factor: float, where: str) -> float | None:
    """The factor as given, or from DeepSeek's pair mscale, mscale_all_dim; None: the paper's."""
    read = partial(optional_number, scaling, where=where)
    over, under = (read(name, least=0) for name in ("mscale", "mscale_all_dim"))
    given = read("attention_factor", above=0)
    if given is not None or not over or not under:
        return given
    growth = 0.1 * math.log(max(factor, 1.0))
    return (over * growth + 1.0) / (under * growth + 1.0)


def write_ropes(config: Any, sliding_theta: str | None) -> dict[str, Any]:
    """The fields of a config.json that `read_ropes` reads back, of a ModelConfig."""
    hf = write_rope(config.rope, config.max_positions)
    if sliding_theta is None:
        return hf
    sliding = config.rope if config.sliding_rope is None else config.sliding_rope
    by_kind = {}
    for kind, rope in ((FULL, config.rope), (SLIDING, sliding)):
        scaling = write_rope(rope, config.max_positions)["rope_scaling"]
        by_kind[kind] = {"rope_theta": rope.theta} | (scaling or {"rope_type": "default"})
    # By kind for transformers 5 and, for 4, as it has it.
    return {sliding_theta: sliding.theta} | hf | {"rope_parameters": by_kind}


def write_rope(rope: Rope, max_positions: int) -> dict[str, Any]:
    """The fields of a config.json that `read_rope` reads back.

    `rope_theta` and `rope_scaling` rather than `rope_parameters`: transformers 4 and 5 read them.
    """
    hf: dict[str, Any] = {"max_position_embeddings": max_positions, "rope_theta": rope.theta}
    if rope.kind == "default":
        return hf | {"rope_scaling": None}
    names = _ROPE_NAMES.get(rope.kind, {})
    given = {name: getattr(rope, field) for field, name in names.items()}
    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if value is not None
    }
    original = rope.original_max_positions or int(max_positions / rope.factor)
    if rope.kind == "longrope":
        # Its positions are those of the long factors, and transformers 4 takes no other fields.
        hf["max_position_embeddings"] = round(original * rope.factor)
        return hf | {_ORIGINAL: original, "rope_scaling": {"type": rope.kind, **given}}
    # With the original positions, so that the others are not taken for those before the scaling.
    scaling = {"rope_type": rope.kind, "factor": rope.factor, _ORIGINAL: original, **given}
    return hf | {"rope_scaling": scaling}
