"""The programs of a search or a training for models that are not here, as shapes and shardings.

They are those of `search`, `w2s sft` and `w2s dpo`, ready to compile, for the shapes of published
models, of a folder or of a config.json.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.models.cache import KVCache, any_layer, cache_axes
from w2s_jax.models.config import KNOWN, ModelConfig
from w2s_jax.models.config_json import config_from_hf
from w2s_jax.models.lora import abstract_adapter
from w2s_jax.models.model import Model
from w2s_jax.models.quantize import QuantizeConfig
from w2s_jax.ops.meshes import check_batch
from w2s_jax.ops.sharding import SEARCH_RULES, Placement, Rules, resolve_tree, with_shardings
from w2s_jax.search import incremental_text, session, step
from w2s_jax.search.config import SearchConfig
from w2s_jax.search.decode import draws_of, start_cache
from w2s_jax.search.methods import LogRatio, NoScore
from w2s_jax.search.models import LARGEST_PADDING, Guide, SearchModels, search_models
from w2s_jax.search.results import Request
from w2s_jax.search.step import SearchState, start_search, state_axes
from w2s_jax.text.tokenizer import bucket
from w2s_jax.train.config import PreferenceConfig
from w2s_jax.train.estimate import (
    TrainingShapes,
    abstract_batch,
    abstract_on_mesh,
    abstract_state,
    nbytes,
)
from w2s_jax.train.logprobs import head_of, row_groups
from w2s_jax.train.objectives import BASE, Policy, preference_objective, sft_loss
from w2s_jax.train.step import make_optimizer, make_train_step


def shape_of(name: str) -> ModelConfig:
    """The config of a folder, a config.json, a published model in `KNOWN`, or another hub id.

    No weights are read or downloaded.

    Raises:
        InputError: For anything else.
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
    """A guide's models.

    Attributes:
        tuned: The tuned model.
        untuned: The untuned model.
        on_tokens: Whether they read the policy's tokens; None decides by the vocabularies' sizes.
    """

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
    """A search to be planned.

    Guides with another vocabulary than the policy's, and reward models, read text in programs of
    their own.

    Attributes:
        policy: The policy.
        guides: The guides.
        config: The search.
        prompt_tokens: Tokens of the longest prompt.
        slots: Prompts searched side by side.
        dtype: Dtype of the weights.
        policy_rules: How the mesh splits the policy.
        guide_rules: How the mesh splits the guides.
        quantize: How the policy's weights are quantized.
        judges: Reward models.
        slots_flag: The flag for `slots`, for messages.
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
        """All models by name: the policy, two for each guide, reward models."""
        found = {"policy": self.policy}
        for index, guide in enumerate(self.guides):
            mark = "" if len(self.guides) == 1 else f" {index}"
            found |= {f"{TUNED}{mark}": guide.tuned, f"{UNTUNED}{mark}": guide.untuned}
        return found | {f"reward model {index}": one for index, one in enumerate(self.judges)}

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the models that read the policy's tokens, the policy first."""
        names = list(self.models)
        here = [guide.reads_tokens_of(self.policy) for guide in self.guides]
        pairs = (names[1 + 2 * index : 3 + 2 * index] for index, on in enumerate(here) if on)
        return ("policy", *(name for pair in pairs for name in pair))


Shapes = SearchShapes | TrainingShapes


@dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments.

    Attributes:
        name: Its name.
        trace: Traces it for its arguments.
        calls: Calls in a chunk of a search; 0 for one call per prompt.
        times: Calls for a batch of prompts, or in a training step.
        reads: Bytes of weights and caches that each device reads and writes in a call.
        loops: Maximum iterations of a loop whose length depends on data.
        twin: Name of a program that is the same except for the weights.
        role: Name of the only model it reads; None for several.
    """

    name: str
    trace: Callable[[], Any]
    calls: int
    times: int
    reads: float
    loops: int = 1
    twin: str | None = None
    role: str | None = None


@dataclass(frozen=True)
class Programs:
    """All programs of a search or a training.

    Attributes:
        programs: The programs.
        resident_bytes: Bytes that stay on a device between programs, by name.
        tokens: Tokens of the responses to a batch of prompts, or tokens that a step reads.
        wholes: Whole shapes of weights and caches of a layer that no loop should gather.
    """

    programs: tuple[Program, ...]
    resident_bytes: Mapping[str, int]
    tokens: int
    wholes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def programs_on(shapes: Shapes, mesh: Mesh) -> Programs:
    """The programs on a mesh, ready to compile; InputError if it does not divide an array."""
    if isinstance(shapes, SearchShapes):
        return search_programs(shapes, mesh)
    return training_programs(shapes, mesh)


def search_programs(shapes: SearchShapes, mesh: Mesh) -> Programs:
    """The programs of a search on a mesh; InputError if it does not divide an array or slots."""
    check_batch(shapes.slots, 1, mesh, flag=shapes.slots_flag)
    on_mesh = partial(abstract_on_mesh, dtype=shapes.dtype, scan_layers=True, mesh=mesh)
    weights = {
        role: on_mesh(config, rules=shapes.policy_rules, quantize_as=shapes.quantize)
        if role == "policy"
        else on_mesh(config, rules=shapes.guide_rules)
        for role, config in shapes.models.items()
    }
    models, config = _members(shapes, weights), shapes.config
    apart = [role for role in weights if role not in shapes.members]
    if apart and not models.guides and isinstance(config.scorer, LogRatio):
        config = replace(config, scorer=NoScore())
    texts = len(shapes.guides) - len(models.guides) + len(shapes.judges)
    state = _abstract_state(models, config, shapes, mesh, texts=texts)
    resident = {role: nbytes(model) for role, model in weights.items()} | _resident(state)
    caches = _caches(shapes, models, state)
    steps = _steps_apart(models, state, texts) if apart else [_whole_step(models, state)]
    programs = [_insertion(models, state, shapes), *steps]
    first: dict[ModelConfig, list[Program]] = {}
    for role in apart:
        model = weights[role]
        cache = caches[f"{role}'s cache"] = _abstract_cache(model, shapes)
        resident[f"{role}'s cache"] = nbytes(cache)
        reading = _reading(role, model, cache, shapes)
        twins = first.setdefault(model.config, reading)
        if twins is not reading:
            pairs = zip(reading, twins, strict=True)
            reading = [replace(one, twin=twin.name) for one, twin in pairs]
        programs += reading
    shapes_of = [(role, _layer_shapes(model)) for role, model in weights.items()]
    shapes_of += [(role, _cache_shapes(cache)) for role, cache in caches.items()]
    wholes = {f"{role}/{name}": size for role, own in shapes_of for name, size in own.items()}
    return Programs(tuple(programs), resident, shapes.slots * config.max_new_tokens, wholes)


def _members(shapes: SearchShapes, weights: Mapping[str, Model]) -> SearchModels:
    """The policy and the guides that read its tokens."""
    policy, *others = (weights[role] for role in shapes.members)
    pairs = zip(others[0::2], others[1::2], strict=True)
    return search_models(policy, [Guide(tuned, untuned) for tuned, untuned in pairs])


def _whole_step(models: SearchModels, state: SearchState) -> Program:
    """A chunk of a search whose models all read tokens, as one program."""
    reads = _step_reads(models, state) + 2 * nbytes((state.proposer, state.scorer))
    trace = partial(step.search_step.trace, models, state)
    return Program("search_step", trace, 1, state.config.chunks, reads)


def _steps_apart(models: SearchModels, state: SearchState, texts: int) -> list[Program]:
    """A chunk as two programs, between which `texts` scorers of text read it."""

    def conclude() -> Any:
        _, proposal = jax.eval_shape(step.propose, models, state)
        rows = (state.active.shape[0], state.config.rows, texts)
        totals = jax.ShapeDtypeStruct(rows, jnp.float32)
        return session.conclude_program.trace(models, state, proposal, totals)

    propose, chunks = partial(session.propose_program.trace, models, state), state.config.chunks
    kept = 2 * nbytes((state.proposer, state.scorer))
    return [
        Program("propose", propose, 1, chunks, _step_reads(models, state)),
        Program("select", conclude, 1, chunks, kept),
    ]


def _step_reads(models: SearchModels, state: SearchState) -> float:
    """Bytes read to propose a chunk, token by token, and to score it in one call."""
    proposing, scoring = (
        nbytes([models.members[reader] for reader in one.readers(models)])
        for one in (state.config.proposer, state.config.scorer)
    )
    each = proposing + nbytes(state.proposer)
    return state.config.length * each + scoring + nbytes(state.scorer)


def _resident(state: SearchState) -> dict[str, int]:
    """Bytes of a state on each device, by name; guides' caches only if a guide reads tokens."""
    own, *mixed = state.proposer
    others = nbytes((mixed, state.scorer))
    found = {"policy's cache": nbytes(own)} | ({"guides' caches": others} if others else {})
    return found | {"state": nbytes(replace(state, proposer=(), scorer=()))}


def _caches(shapes: SearchShapes, models: SearchModels, state: SearchState) -> dict[str, KVCache]:
    """The caches of a state, by name."""
    readers = [*state.config.proposer.readers(models), *state.config.scorer.readers(models)]
    names = [f"{shapes.members[reader]}'s cache" for reader in readers]
    return dict(zip(names, (*state.proposer, *state.scorer), strict=True))


def _reading(role: str, model: Model, cache: KVCache, shapes: SearchShapes) -> list[Program]:
    """The programs of a model that reads text: for a prompt, a chunk of all rows, a selection."""
    config, width = shapes.config, shapes.config.length + incremental_text.MERGES
    whole = last = _ints(shapes.slots, config.beam_width)
    given = (model, cache, whole, last, _ints(shapes.slots, config.rows, width))
    prompt = (_ints(), _ints(bucket(shapes.prompt_tokens)), _ints())

    def keep() -> Any:
        *_, read = jax.eval_shape(incremental_text.read_rows, *given)
        return incremental_text.keep.trace(cache, read, whole, last)

    prefill = partial(incremental_text.prefill_slot.trace, model, cache, *prompt)
    score = partial(incremental_text.read_rows.trace, *given)
    own, size = nbytes(model), nbytes(cache)
    chunk = partial(Program, calls=1, times=config.chunks, role=role)
    return [
        Program(f"{role} reads a prompt", prefill, 0, shapes.slots, own, role=role),
        chunk(f"{role} scores", score, reads=own + size),
        chunk(f"{role} keeps", keep, reads=2 * size),
    ]


def _insertion(models: SearchModels, state: SearchState, shapes: SearchShapes) -> Program:
    """The program that inserts a prompt into a slot: all models that read tokens read it."""
    draws = draws_of(state.config, Request(0, ((1,),)))
    given = (np.int32(0), draws, _ints(1, bucket(shapes.prompt_tokens) + 1), _ints(1))
    trace = partial(session.insert_program.trace, models, state, *given)
    return Program("prefill", trace, 0, shapes.slots, nbytes(models.members))


def _abstract_state(
    models: SearchModels, config: SearchConfig, shapes: SearchShapes, mesh: Mesh, texts: int = 0
) -> SearchState:
    start = partial(
        start_search,
        config=config,
        slots=shapes.slots,
        prefix_capacity=bucket(shapes.prompt_tokens),
        text_objectives=texts,
        mesh=mesh,
        rules=shapes.policy_rules,
    )
    state = jax.eval_shape(start, models)
    rest, axes = (replace(one, proposer=(), scorer=()) for one in (state, state_axes(state)))
    rest = with_shardings(rest, resolve_tree(axes, rest, shapes.policy_rules, mesh))
    proposer, scorer = (tuple(map(_placed, part)) for part in (state.proposer, state.scorer))
    return replace(rest, proposer=proposer, scorer=scorer)


def _abstract_cache(model: Model, shapes: SearchShapes) -> KVCache:
    config = shapes.config
    start = partial(
        start_cache,
        slots=shapes.slots,
        hypotheses=config.beam_width,
        prefix_capacity=bucket(shapes.prompt_tokens),
        committed_capacity=bucket(config.max_new_tokens + config.length + incremental_text.MERGES),
    )
    return _placed(jax.eval_shape(start, model))


def _placed(cache: KVCache) -> KVCache:
    place = cache.placement
    assert place.mesh is not None
    return with_shardings(cache, resolve_tree(cache_axes(cache), cache, place.rules, place.mesh))


def _layer_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Whole shapes of one layer's weights with two dimensions or more."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = leaf.shape[1:] if name.startswith("layers/") else leaf.shape
        if len(shape) > 1:
            found[name] = tuple(shape)
    return found


def _cache_shapes(cache: KVCache) -> dict[str, tuple[int, ...]]:
    """Whole shapes of both parts of a cache, for one layer."""
    parts = (("prefix", cache.prefix), ("committed", cache.committed))
    layers = ((name, any_layer(part)) for name, part in parts)
    # Stacked layers have a leading axis.
    return {name: tuple(part.keys.shape)[-4 - (name == "committed") :] for name, part in layers}


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def training_programs(shapes: TrainingShapes, mesh: Mesh) -> Programs:
    """The step on a mesh; InputError if the mesh does not divide an array or the rows."""
    check_batch(shapes.rows, shapes.accumulate, mesh, flag="--batch-size")
    if shapes.eval_rows is not None:
        check_batch(shapes.eval_rows, 1, mesh, flag="--eval-batch-size")
    options: dict[str, Any] = {"scan_layers": True, "mesh": mesh, "rules": shapes.rules}
    frozen: dict[str, Any] = {}
    if shapes.lora is None:
        params = abstract_on_mesh(shapes.model, dtype=jnp.float32, **options).params
    else:
        params = abstract_adapter(shapes.model, shapes.lora, **options)
        frozen[BASE] = abstract_on_mesh(shapes.model, dtype=shapes.dtype, **options)
    beside = [abstract_on_mesh(one, dtype=shapes.dtype, **options) for one in shapes.beside]
    policy = Policy(shapes.model, shapes.lora, shapes.remat, Placement(mesh, shapes.rules))
    pairs = shapes.objective == "dpo"
    loss = preference_objective(policy, PreferenceConfig()) if pairs else sft_loss(policy)
    optimizer = make_optimizer(shapes.optimizer, 1000)
    state = abstract_state(params, optimizer)
    batch = abstract_batch(_batch(shapes), mesh)
    train_step = make_train_step(
        loss,
        optimizer,
        accumulate=shapes.accumulate,
        compute_dtype=shapes.dtype,
        mesh=mesh,
        like=state,
    )
    resident = {
        "trained parameters": nbytes(state.params),
        "optimizer": nbytes(state.optimizer),
        "frozen parameters": nbytes((frozen, beside)),
        "batch": nbytes(batch),
    }
    # Forward, backward and recomputation read the weights; the update reads and writes them.
    weights = nbytes(frozen) or resident["trained parameters"]
    reads = 3.0 * shapes.accumulate * weights
    reads += 2.0 * (resident["trained parameters"] + resident["optimizer"])
    trace = partial(train_step.trace, state, frozen, batch)  # type: ignore[attr-defined]
    blocks = _head_blocks(shapes, policy.placement)
    program = Program("training step", trace, 1, 1, reads, blocks)
    return Programs((program,), resident, shapes.tokens)


def _head_blocks(shapes: TrainingShapes, placement: Placement) -> int:
    """Blocks of logits in a micro-batch all of whose tokens count."""
    rows = shapes.tokens // (shapes.length * shapes.accumulate)
    groups = row_groups(placement, rows)
    return head_of(shapes.model, placement).blocks(groups, rows // groups * shapes.length)


def _batch(shapes: TrainingShapes) -> dict[str, tuple[tuple[int, ...], str]]:
    sides = (2,) if shapes.objective == "dpo" else ()
    rows = (shapes.rows, *sides, shapes.length)
    found: dict[str, tuple[tuple[int, ...], str]] = {
        "tokens": (rows, "int32"), "segments": (rows, "int32"), "targets": (rows, "bool")
    }  # fmt: skip
    if sides:
        found["reference"] = ((shapes.rows, 2), "float32")
    return found
