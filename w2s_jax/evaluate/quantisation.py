"""What quantising a policy changes: perplexity, greedy choices, scores of a search, bytes."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from w2s_jax.errors import InputError
from w2s_jax.evaluate.config import QuantisationConfig
from w2s_jax.evaluate.rewards import mean_and_stderr
from w2s_jax.models.model import abstract_model
from w2s_jax.models.quantize import QuantizeConfig, read_quantize, weight_bytes
from w2s_jax.ops.logits import Sampling
from w2s_jax.ops.meshes import named_mesh
from w2s_jax.ops.sharding import resolve_tree
from w2s_jax.search.checkpoints import GuideSource, Sources, SteeringPlan, load, plan
from w2s_jax.search.config import cbs, sample
from w2s_jax.search.likelihood import Response, score_responses
from w2s_jax.search.methods import PolicyProposer
from w2s_jax.search.models import ONE_DEVICE, Places, SearchModels, load_decoders, search_models
from w2s_jax.search.run import search
from w2s_jax.text.prompts import encode_prompt
from w2s_jax.text.rows import Row, check_writable, progress, read_rows, write_whole

AS_STORED = "as stored"
USUAL = ("int8", "int4")
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """What one policy did with the texts.

    logprobs float32 [n], likeliest int32 [n]: of each text's tokens but the first, the token's
    log-probability and the token that is likeliest there. continuations: greedy, of each prompt.
    scores: the best score of each prompt's search.
    """

    weight_bytes: int
    logprobs: tuple[np.ndarray, ...]
    likeliest: tuple[np.ndarray, ...]
    continuations: tuple[Tokens, ...]
    scores: tuple[float, ...] | None


@dataclass(frozen=True)
class Figures:
    """One policy against the unquantised one.

    perplexity: exp of the mean negative log-probability of all tokens; perplexity_change: its
    ratio to the other's, less 1. equal_next: the share of places with the same likeliest token.
    equal_continuations: the share of greedy continuations that are the same; equal_length: the
    mean share of a continuation before the first difference. score: the mean best score of the
    search, with the mean of the paired differences and its standard error (None for one row).
    """

    weight_bytes: int
    perplexity: float
    perplexity_change: float
    equal_next: float
    equal_continuations: float
    equal_length: float
    score: float | None = None
    score_change: float | None = None
    score_change_stderr: float | None = None


@dataclass(frozen=True)
class Report:
    """What quantising a policy changes, so far: figures of each policy by its quantisation."""

    policy: str
    data: str
    rows: int
    tokens: int
    policy_cache: str
    figures: dict[str, Figures]


def report_quantisation(config: QuantisationConfig) -> Iterator[Report]:
    """Measure a policy as it is stored, then with each quantisation.

    Yields the report as each policy is done, after writing it to `config.json`, so that what is
    finished is there when one fails.

    Raises:
        InputError: Before any weight is read, for what is wrong with settings and texts; later
            where weights cannot be read.
    """
    specs = {spec: read_quantize(spec) for spec in config.quantise or USUAL}
    _check(config)
    mesh = None if config.mesh is None else named_mesh(config.mesh)
    guides = (GuideSource(config.tuned, config.untuned),) if config.tuned and config.untuned else ()
    sources = Sources(config.quantisation_report, guides)
    looked_at = plan(sources, needs_tokens="--quantisation-report")
    for one in specs.values():
        model, axes = abstract_model(looked_at.configs["policy"], quantize_as=one)
        if mesh is not None:  # raises where the mesh divides a weight not
            resolve_tree(axes, model.params, ONE_DEVICE.policy, mesh)
    texts = _texts(config, looked_at)
    tokens, steps = sum(map(len, texts)), len(texts) * (3 if guides else 2) * (1 + len(specs))
    plain, figures, cache = None, dict[str, Figures](), config.policy_cache
    with progress(steps, "reading") as advance:
        for name, models in _policies(looked_at, specs, config.weights_dtype, Places(mesh)):
            options: dict[str, Any] = {"mesh": mesh, "policy_cache": cache if figures else "auto"}
            found = measure(models, texts, config, on_row=lambda: advance(1), **options)
            del models  # the next policy takes its place
            plain = plain or found
            figures |= {name: compare(plain, found)}
            told = (str(sources.policy), str(config.data), len(texts), tokens, cache)
            report = Report(*told, dict(figures))
            if config.json is not None:
                write_whole(config.json, [json.dumps(asdict(report), indent=2).encode(), b"\n"])
            yield report


def _check(config: QuantisationConfig) -> None:
    if config.data is None:
        raise InputError("--quantisation-report needs --data, a file of texts")
    if (config.tuned is None) != (config.untuned is None):
        raise InputError("a guide is a --tuned and an --untuned model; give both or none")
    for name in ("batch_size", "max_length", "prompt_tokens", "max_new_tokens"):
        if getattr(config, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is {getattr(config, name)}; it must be at least 1")
    if config.json is not None:
        check_writable(config.json)


def _texts(config: QuantisationConfig, plan: SteeringPlan) -> list[Tokens]:
    """Token ids of the texts of the data."""
    rows, source = read_rows(str(config.data))
    room = min(shape.max_positions for shape in plan.configs.values())
    if config.prompt_tokens + config.max_new_tokens > room:
        raise InputError(
            f"--prompt-tokens {config.prompt_tokens} and --max-new-tokens "
            f"{config.max_new_tokens} exceed the {room} positions of the models"
        )
    texts = []
    for number, row in enumerate(rows, start=1):
        where = f"{source} {number}"
        ids = encode_prompt(plan.tokenizer, _text_of(row, where))
        ids = ids[: min(config.max_length, room)]
        if len(ids) < 2:
            raise InputError(f"{where}: a text of {len(ids)} tokens; it takes two to score one")
        texts.append(tuple(ids))
    return texts


def _text_of(row: Row, where: str) -> str:
    parts = [row.get("text")] if "text" in row else [row.get("prompt"), row.get("response")]
    if not all(isinstance(part, str) for part in parts):
        raise InputError(f'{where}: no "text", and no "prompt" and "response", that are strings')
    return "".join(map(str, parts))


def _policies(
    plan: SteeringPlan, specs: Mapping[str, QuantizeConfig], dtype: str | None, places: Places
) -> Iterator[tuple[str, SearchModels]]:
    """Each policy, beside the same guides, by name: one is held at a time."""
    models = load(plan, dtype=dtype, places=places).models
    assert models is not None
    guides = models.guides
    yield AS_STORED, models
    del models
    place = plan.sources.checkpoints["policy"]
    options: dict[str, Any] = {"dtype": dtype, "mesh": places.mesh, "decoding": True}
    for spec, config in specs.items():
        options |= {"scan_layers": places.scan_layers, "quantize": config}
        policy = load_decoders({place: places.policy}, plan.adapters, **options)[place]
        yield spec, search_models(policy, guides)
        del policy


def measure(
    models: SearchModels,
    texts: Sequence[Tokens],
    config: QuantisationConfig,
    *,
    policy_cache: str = "auto",
    mesh: Mesh | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> Measured:
    """Read the texts, continue their beginnings and search behind them, with the models' policy.

    Args:
        models: The policy and the guides of the search; without guides nothing is searched.
        texts: Token ids, two at least.
        config: The sizes of prompts, continuations and the search.
        policy_cache: What the policy's keys and values are kept as, as in SearchConfig.
        mesh: That of the models.
        on_row: Called for every text read, continued or searched.

    Raises:
        InputError: For texts that do not fit the models.
    """
    prompts = [text[: min(config.prompt_tokens, max(1, len(text) // 2))] for text in texts]
    policy, slots = models.policy, config.batch_size
    scored = score_responses(
        SearchModels(policy, ()),
        PolicyProposer(),
        [Response((text[:1],), text[1:]) for text in texts],
        top=1,
        batch_size=slots,
        on_scored=lambda index, response: on_row(),
    )
    heard: dict[str, Any] = {"on_result": lambda result: on_row(), "mesh": mesh}
    settings: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens, "slots": slots, "policy_cache": policy_cache
    }  # fmt: skip
    greedy = sample(sampling=Sampling(0.0), **settings)
    continued = search(policy, (), prompts, greedy, **heard)
    scores = None
    if models.guides:
        beam = (config.beam_width, config.successors, config.chunk_length)
        searching = cbs(*beam, seed=config.seed, **settings)
        found = search(policy, models.guides, prompts, searching, **heard)
        scores = tuple(result.best.score for result in found)
    return Measured(
        weight_bytes(policy.params),
        tuple(response.logprobs for response in scored),
        tuple(response.top_ids[:, 0] for response in scored),
        tuple(result.best.tokens for result in continued),
        scores,
    )


def compare(plain: Measured, other: Measured) -> Figures:
    """The figures of one policy, given what the unquantised one did with the same texts."""
    loss, before = (-np.concatenate(one.logprobs).mean(dtype=np.float64) for one in (other, plain))
    same = np.concatenate(other.likeliest) == np.concatenate(plain.likeliest)
    pairs = list(zip(other.continuations, plain.continuations, strict=True))
    score: tuple[float | None, ...] = (None, None, None)
    if other.scores is not None and plain.scores is not None:
        values = np.asarray(other.scores, np.float64)
        mean, stderr = mean_and_stderr(values - np.asarray(plain.scores, np.float64))
        score = (float(values.mean()), mean, stderr)
    return Figures(
        other.weight_bytes,
        math.exp(loss),
        math.expm1(loss - before),
        float(same.mean()),
        float(np.mean([one == two for one, two in pairs])),
        float(np.mean([_common(one, two) / max(len(one), len(two), 1) for one, two in pairs])),
        *score,
    )


def _common(one: Tokens, other: Tokens) -> int:
    differ = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def print_report(report: Report) -> None:
    """Print the table, a column for each policy."""
    title = f"Quantisation ({report.rows} texts, {report.tokens} tokens)"
    table = Table(title=title, title_justify="left")
    table.add_column("weights", no_wrap=True)
    for name in report.figures:
        table.add_column(name, justify="right", no_wrap=True)
    told = [_told(one) for one in report.figures.values()]
    for heading in told[0]:
        table.add_row(heading, *(column[heading] for column in told))
    Console().print(table)


def _told(one: Figures) -> dict[str, str]:
    found = {
        "size": f"{one.weight_bytes / 1e6:.1f} MB",
        "perplexity": f"{one.perplexity:.3f}",
        "its change": f"{100 * one.perplexity_change:+.2f} %",
        "same next token": f"{100 * one.equal_next:.1f} %",
        "same continuation": f"{100 * one.equal_continuations:.1f} %",
        "up to a difference": f"{100 * one.equal_length:.1f} %",
    }
    if one.score is not None:
        spread = one.score_change_stderr
        found["search score"] = f"{one.score:+.3f}"
        found["its mean change"] = f"{one.score_change:+.3f}"
        found["standard error"] = "–" if spread is None else f"{spread:.3f}"
    return found
