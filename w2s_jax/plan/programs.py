"""The programs of a search for models that are not here: shapes and shardings, ready to compile.

They are those that `search` runs, for shapes of published models, of a folder or of a config.json.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.models.cache import KV, KVCache, cache_axes
from w2s_jax.models.config import KNOWN, ModelConfig
from w2s_jax.models.config_json import config_from_hf
from w2s_jax.models.model import Model
from w2s_jax.models.quantize import QuantizeConfig
from w2s_jax.ops.meshes import check_batch
from w2s_jax.ops.sharding import SEARCH_RULES, Rules, resolve_tree, with_shardings
from w2s_jax.search import incremental_programs, session, step
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.decode import start_cache
from w2s_jax.search.incremental_text import MERGES
from w2s_jax.search.models import LARGEST_PADDING, Guide, SearchModels, search_models
from w2s_jax.search.results import Request
from w2s_jax.search.scorers import LogRatio, NoScore
from w2s_jax.search.state import SearchState, start_search, state_axes
from w2s_jax.text.batches import bucket
from w2s_jax.train.estimate import abstract_on_mesh


def shape_of(name: str) -> ModelConfig:
    """The config of a folder, a config.json, a published model of `KNOWN`, or another hub id.

    No weights are read or fetched. Raises InputError for what is none of them.
    """
    from w2s_jax.models.huggingface import CONFIG, GENERATION_CONFIG, locate
    from w2s_jax.models.load import load_config

    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        shown = name if len(name) <= 80 else f"{name[:40]}..."
        raise InputError(f"{shown}: no such file or directory ({why})") from None
    if is_file:
        return _from_file(path)
    if name in KNOWN and not is_folder:
        return config_from_hf(KNOWN[name])
    return load_config(locate(name, (CONFIG, GENERATION_CONFIG)))


def _from_file(path: Path) -> ModelConfig:
    from w2s_jax.models.huggingface import read_json

    found = read_json(path)
    try:
        return config_from_hf(found)
    except InputError as error:
        raise InputError(f"{path}: not a config.json ({error})") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path}: a field has the wrong type ({error})") from None


TUNED, UNTUNED = "tuned", "untuned"


@dataclass(frozen=True)
class GuideShapes:
    """A guide's models. on_tokens: whether they read the policy's tokens; None: by vocabularies."""

    tuned: ModelConfig
    untuned: ModelConfig
    on_tokens: bool | None = None

    def reads_tokens_of(self, policy: ModelConfig) -> bool:
        """Whether both models read the policy's tokens."""
        if self.on_tokens is not None:
            return self.on_tokens
        sizes = (self.tuned.vocab_size, self.untuned.vocab_size)
        return all(abs(size - policy.vocab_size) <= LARGEST_PADDING for size in sizes)


@dataclass(frozen=True)
class SearchShapes:
    """A search to be planned: models by their shapes, settings, prompts side by side.

    Guides whose vocabulary is not the policy's, and reward models (`judges`), read texts, by
    programs of their own. slots_flag: what a user sets the slots by.
    """

    policy: ModelConfig
    guides: tuple[GuideShapes, ...]
    config: SearchConfig
    prompt_tokens: int
    slots: int
    dtype: str = "bfloat16"
    policy_rules: Rules = SEARCH_RULES
    guide_rules: Rules = SEARCH_RULES
    quantize: QuantizeConfig | None = None
    judges: tuple[ModelConfig, ...] = ()
    slots_flag: str = "--batch-size"

    @property
    def models(self) -> dict[str, ModelConfig]:
        """All models by what to call them: the policy, each guide's two, reward models."""
        found = {"policy": self.policy}
        for index, guide in enumerate(self.guides):
            mark = "" if len(self.guides) == 1 else f" {index}"
            found |= {f"{TUNED}{mark}": guide.tuned, f"{UNTUNED}{mark}": guide.untuned}
        return found | {f"reward model {index}": one for index, one in enumerate(self.judges)}

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the models that read the policy's tokens, the policy first."""
        names = list(self.models)
        here = [guide.reads_tokens_of(self.policy) for guide in self.guides]
        pairs = (names[1 + 2 * index : 3 + 2 * index] for index, on in enumerate(here) if on)
        return ("policy", *(name for pair in pairs for name in pair))


@dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments.

    calls: how often it runs in a chunk, 0 where once a prompt. reads: bytes that each device reads
    and writes in one call, of weights and caches. loops: how often a loop runs at most whose length
    depends on what is read. twin: the name of a program that is the same but for the weights.
    """

    name: str
    trace: Callable[[], Any]
    calls: int
    reads: float
    loops: int = 1
    twin: str | None = None


_Built = tuple[list[Program], dict[str, int], dict[str, KVCache]]
"""Programs, what stays between them in bytes, and the caches, these by name."""


@dataclass(frozen=True)
class SearchPrograms:
    """All programs of a search, and what stays on the devices between them, by name, in bytes.

    wholes: the whole shapes of weights and caches, of one layer, that no loop should gather.
    """

    programs: tuple[Program, ...]
    resident_bytes: Mapping[str, int]
    wholes: Mapping[str, tuple[int, ...]]


def search_programs(shapes: SearchShapes, mesh: Mesh) -> SearchPrograms:
    """The programs of a search on a mesh; InputError where it does not divide an array or slots."""
    check_batch(shapes.slots, 1, mesh, flag=shapes.slots_flag)
    models = {
        role: _abstract(config, shapes, mesh, shapes.policy_rules, shapes.quantize)
        if role == "policy"
        else _abstract(config, shapes, mesh, shapes.guide_rules)
        for role, config in shapes.models.items()
    }
    held = {role: nbytes(model) for role, model in models.items()}
    wholes = {
        f"{role}/{name}": shape
        for role, model in models.items()
        for name, shape in _layer_shapes(model).items()
    }
    build = _on_tokens if len(shapes.members) == len(models) else _on_text
    programs, kept, caches = build(shapes, mesh, models)
    for role, cache in caches.items():
        wholes |= {f"{role}/{name}": shape for name, shape in _cache_shapes(cache).items()}
    return SearchPrograms(tuple(programs), held | kept, wholes)


def nbytes(tree: Any) -> int:
    """Bytes that the fullest device holds of arrays with shardings."""

    def shard(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        bits = {"int4": 4, "uint4": 4}.get(str(leaf.dtype), 8 * leaf.dtype.itemsize)
        return math.prod(shape) * bits // 8

    return sum(shard(leaf) for leaf in jax.tree.leaves(tree))


def _on_tokens(shapes: SearchShapes, mesh: Mesh, weights: Mapping[str, Model]) -> _Built:
    models = _members(shapes, weights)
    state = _abstract_state(models, shapes.config, shapes, mesh)
    programs = [
        _insertion(models, state, shapes),
        Program(
            "search_step",
            lambda: step.search_step.trace(models, state),
            1,
            _step_reads(models, state) + 2 * nbytes((state.proposer, state.scorer)),
        ),
    ]
    return programs, _held(state), _caches(shapes, models, state)


def _on_text(shapes: SearchShapes, mesh: Mesh, weights: Mapping[str, Model]) -> _Built:
    models = _members(shapes, weights)
    config = shapes.config
    if not models.guides and isinstance(config.scorer, LogRatio):
        config = replace(config, scorer=NoScore())
    apart = [role for role in weights if role not in shapes.members]
    texts = len(shapes.guides) - len(models.guides) + len(shapes.judges)
    state = _abstract_state(models, config, shapes, mesh, texts=texts)

    def concluding() -> Any:
        _, proposal = jax.eval_shape(step.propose, models, state)
        totals = jax.ShapeDtypeStruct((shapes.slots, config.rows, texts), jnp.float32)
        return session.conclude_program.trace(models, state, proposal, totals)

    programs = [
        _insertion(models, state, shapes),
        Program(
            "propose",
            lambda: session.propose_program.trace(models, state),
            1,
            _step_reads(models, state),
        ),
        Program(
            "select",
            concluding,
            1,
            2 * nbytes((state.proposer, state.scorer)),
        ),
    ]
    held, caches = _held(state), _caches(shapes, models, state)
    read: dict[ModelConfig, list[Program]] = {}
    for role in apart:
        model = weights[role]
        cache = caches[f"{role}'s cache"] = _abstract_cache(model, shapes)
        held[f"{role}'s cache"] = nbytes(cache)
        reading = _reading(role, model, cache, shapes)
        twins = read.setdefault(model.config, reading)
        if twins is not reading:
            pairs = zip(reading, twins, strict=True)
            reading = [replace(one, twin=twin.name) for one, twin in pairs]
        programs += reading
    return programs, held, caches


def _members(shapes: SearchShapes, weights: Mapping[str, Model]) -> SearchModels:
    """The policy and the guides that read its tokens."""
    policy, *others = (weights[role] for role in shapes.members)
    pairs = zip(others[0::2], others[1::2], strict=True)
    return search_models(policy, [Guide(tuned, untuned) for tuned, untuned in pairs])


def _step_reads(models: SearchModels, state: SearchState) -> float:
    """Bytes read to propose a chunk, token by token, and to score it in one call."""
    proposing, scoring = (
        nbytes([models.members[reader] for reader in one.readers(models)])
        for one in (state.config.proposer, state.config.scorer)
    )
    each = proposing + nbytes(state.proposer)
    return state.config.length * each + scoring + nbytes(state.scorer)


def _held(state: SearchState) -> dict[str, int]:
    """What a state keeps on each device; the guides' caches where any guide reads tokens."""
    own, *mixed = state.proposer
    others = nbytes((mixed, state.scorer))
    held = {"policy's cache": nbytes(own)} | ({"guides' caches": others} if others else {})
    return held | {"state": nbytes(replace(state, proposer=(), scorer=()))}


def _caches(shapes: SearchShapes, models: SearchModels, state: SearchState) -> dict[str, KVCache]:
    """The caches of a state by name."""
    readers = [*state.config.proposer.readers(models), *state.config.scorer.readers(models)]
    names = [f"{shapes.members[reader]}'s cache" for reader in readers]
    return dict(zip(names, (*state.proposer, *state.scorer), strict=True))


def _reading(role: str, model: Model, cache: KVCache, shapes: SearchShapes) -> list[Program]:
    """A guide that reads texts: a prompt, a chunk of every row, what was chosen."""
    config, width = shapes.config, shapes.config.length + MERGES
    each, rows = (shapes.slots, config.beam_width), (shapes.slots, config.rows)
    whole, last = _ints(*each), _ints(*each)
    tokens, longer = _ints(*rows, width), _ints(2, 0)
    prefix = bucket(shapes.prompt_tokens)

    def scoring() -> Any:
        return incremental_programs.read_rows.trace(
            model, cache, whole, last, tokens, longer, first=width
        )

    def keeping() -> Any:
        *_, read = jax.eval_shape(
            lambda *given: incremental_programs.read_rows(*given, first=width),
            model, cache, whole, last, tokens, longer,
        )  # fmt: skip
        return incremental_programs.keep.trace(cache, read, whole, last)

    own, size = nbytes(model), nbytes(cache)
    return [
        Program(
            f"{role} reads a prompt",
            lambda: incremental_programs.prefill_slot.trace(
                model, cache, _ints(), _ints(prefix), _ints()
            ),
            0,
            own,
        ),
        Program(f"{role} scores", scoring, 1, own + size),
        Program(
            f"{role} keeps",
            keeping,
            1,
            2 * size,
        ),
    ]


def _insertion(models: SearchModels, state: SearchState, shapes: SearchShapes) -> Program:
    """A prompt into a slot: every model that reads tokens reads it."""
    request = Request(0, ((1,),))
    room = bucket(shapes.prompt_tokens) + 1
    given = (np.int32(0), session.draws_of(state.config, request), _ints(1, room), _ints(1))
    return Program(
        "prefill",
        lambda: session.insert_program.trace(models, state, *given),
        0,
        nbytes(models.members),
    )


def _abstract(
    config: ModelConfig,
    shapes: SearchShapes,
    mesh: Mesh,
    rules: Rules,
    quantize: QuantizeConfig | None = None,
) -> Model:
    return abstract_on_mesh(
        config, dtype=shapes.dtype, scan_layers=True, mesh=mesh, rules=rules, quantize_as=quantize
    )


def _abstract_state(
    models: SearchModels, config: SearchConfig, shapes: SearchShapes, mesh: Mesh, texts: int = 0
) -> SearchState:
    def start(models: SearchModels) -> SearchState:
        return start_search(
            models,
            config,
            slots=shapes.slots,
            prefix_capacity=bucket(shapes.prompt_tokens),
            text_objectives=texts,
            mesh=mesh,
            rules=shapes.policy_rules,
        )

    state = jax.eval_shape(start, models)
    rest, axes = (replace(one, proposer=(), scorer=()) for one in (state, state_axes(state)))
    rest = with_shardings(rest, resolve_tree(axes, rest, shapes.policy_rules, mesh))
    caches = (tuple(map(_placed_cache, part)) for part in (state.proposer, state.scorer))
    return replace(rest, **dict(zip(("proposer", "scorer"), caches, strict=True)))


def _abstract_cache(model: Model, shapes: SearchShapes) -> KVCache:
    config = shapes.config
    width = config.length + MERGES
    cache = jax.eval_shape(
        lambda model: start_cache(
            model,
            slots=shapes.slots,
            hypotheses=config.beam_width,
            prefix_capacity=bucket(shapes.prompt_tokens),
            committed_capacity=bucket(config.max_new_tokens + width),
        ),
        model,
    )
    return _placed_cache(cache)


def _placed_cache(cache: KVCache) -> KVCache:
    place = cache.placement
    assert place.mesh is not None
    return with_shardings(cache, resolve_tree(cache_axes(cache), cache, place.rules, place.mesh))


def _layer_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The whole shape of every weight of two dimensions or more, of one layer."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = leaf.shape[1:] if name.startswith("layers/") else leaf.shape
        if len(shape) > 1:
            found[name] = tuple(shape)
    return found


def _cache_shapes(cache: KVCache) -> dict[str, tuple[int, ...]]:
    """The whole shape of both parts of a cache, of one layer."""
    parts = (("prefix", cache.prefix), ("committed", cache.committed))
    layers = ((name, part if isinstance(part, KV) else part[0]) for name, part in parts)
    # A stacked part has the layers in front.
    return {name: tuple(part.keys.shape)[-4 - (name == "committed") :] for name, part in layers}


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
