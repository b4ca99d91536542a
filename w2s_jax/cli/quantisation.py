"""`w2s eval --quantisation-report`: a policy quantised against itself as it is stored.

The figures are made in w2s_jax/evaluate/quantisation.py.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from w2s_jax.evaluate.quantisation import Figures, Trial
    from w2s_jax.models.quantize import QuantizeConfig
    from w2s_jax.search.checkpoints import SteeringPlan
    from w2s_jax.search.config import SearchConfig

AS_STORED = "as stored"
USUAL = ("int8", "int4")


@dataclass(frozen=True, kw_only=True)
class QuantisationFlags:
    """What is measured of a policy, quantised and not."""

    quantisation_report: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """In place of rewards: what quantising this policy changes, on the texts of --data."""
    data: Annotated[str | None, arg(metavar="FILE")] = None
    """Texts for the quantisation report: rows with "text", or with "prompt" and "response"."""
    quantise: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="SPEC")]] = ()
    """A quantisation to report, as --quantise-policy of search takes it; by default int8, int4."""
    policy_cache: Literal["auto", "int8"] = "auto"
    """What quantised policies keep keys and values as; auto is the dtype of the weights."""
    tuned: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """A guide's tuned model, for the scores of a search with each policy."""
    untuned: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """The guide's untuned model."""
    beam_width: Annotated[int, arg(aliases=["--w"])] = 2
    """W of that search."""
    successors: Annotated[int, arg(aliases=["--k"])] = 2
    """K of that search."""
    chunk_length: Annotated[int, arg(aliases=["--l"])] = 5
    """L of that search."""
    max_length: int = 512
    """Tokens of each text that are read."""
    prompt_tokens: int = 32
    """Tokens of each text that are continued; at most half of it."""
    max_new_tokens: int = 32
    """Tokens of a continuation, and of a response in the search."""

    def report_quantisation(
        self, *, dtype: str | None, mesh: str | None, batch_size: int, seed: int, out: str | None
    ) -> None:
        """Measure every quantisation, print the table and write the JSON file `out`.

        Both hold what was finished when one fails. Raises InputError, before any weight is read,
        for what is wrong.
        """
        from w2s_jax.evaluate.quantisation import Trial
        from w2s_jax.models.quantize import read_quantize
        from w2s_jax.ops.meshes import named_mesh
        from w2s_jax.text.rows import check_writable, write_whole

        specs = {spec: read_quantize(spec) for spec in self.quantise or USUAL}
        if self.data is None:
            raise InputError("--quantisation-report needs --data, a file of texts")
        if (self.tuned is None) != (self.untuned is None):
            raise InputError("a guide is a --tuned and an --untuned model; give both or none")
        sizes = {
            "--batch-size": batch_size,
            "--max-length": self.max_length,
            "--prompt-tokens": self.prompt_tokens,
            "--max-new-tokens": self.max_new_tokens,
        }
        for flag, size in sizes.items():
            if size < 1:
                raise InputError(f"{flag} is {size}; it must be at least 1")
        if out is not None:
            check_writable(out)
        searching = self._searching(seed, batch_size) if self.tuned else None
        devices = None if mesh is None else named_mesh(mesh)
        plan = self._plan()
        _check_shapes(plan, specs.values(), devices)
        texts = self._texts(plan)
        prompts = [text[: min(self.prompt_tokens, max(1, len(text) // 2))] for text in texts]
        trial = Trial(texts, prompts, self.max_new_tokens, searching, batch_size, mesh=devices)
        tokens, figures = sum(map(len, texts)), dict[str, "Figures"]()
        try:
            for name, one in self._measure(plan, trial, specs, dtype):
                figures[name] = one
                told = {
                    "policy": self.quantisation_report,
                    "data": self.data,
                    "rows": len(texts),
                    "tokens": tokens,
                    "policy_cache": self.policy_cache,
                    "figures": {name: asdict(one) for name, one in figures.items()},
                }
                if out is not None:
                    write_whole(out, [json.dumps(told, indent=2).encode(), b"\n"])
        finally:
            if figures:
                show(figures, f"{len(texts)} texts, {tokens} tokens")

    def _searching(self, seed: int, batch_size: int) -> "SearchConfig":
        from w2s_jax.search.config import cbs

        beam = (self.beam_width, self.successors, self.chunk_length)
        return cbs(*beam, max_new_tokens=self.max_new_tokens, seed=seed, slots=batch_size)

    def _plan(self) -> "SteeringPlan":
        from w2s_jax.search.checkpoints import GuideSource, Sources, plan

        guides: tuple[GuideSource, ...] = ()
        if self.tuned and self.untuned:
            guides = (GuideSource(self.tuned, self.untuned),)
        sources = Sources(self.quantisation_report, guides)
        return plan(sources, needs_tokens="--quantisation-report")

    def _texts(self, plan: "SteeringPlan") -> list[tuple[int, ...]]:
        from w2s_jax.evaluate.quantisation import text_of
        from w2s_jax.text.prompts import encode_prompt
        from w2s_jax.text.rows import read_rows

        rows, source = read_rows(str(self.data))
        room = min(config.max_positions for config in plan.configs.values())
        length = min(self.max_length, room)
        if self.prompt_tokens + self.max_new_tokens > room:
            raise InputError(
                f"--prompt-tokens {self.prompt_tokens} and --max-new-tokens {self.max_new_tokens} "
                f"exceed the {room} positions of the models"
            )
        texts = []
        for number, row in enumerate(rows, start=1):
            where = f"{source} {number}"
            ids = tuple(encode_prompt(plan.tokenizer, text_of(row, where))[:length])
            if len(ids) < 2:
                raise InputError(f"{where}: a text of {len(ids)} tokens; it takes two to score one")
            texts.append(ids)
        return texts

    def _measure(
        self, plan: "SteeringPlan", trial: "Trial", specs: dict[str, Any], dtype: str | None
    ) -> "Iterator[tuple[str, Figures]]":
        """Every policy's name and figures, as each is done."""
        from w2s_jax.evaluate.progress import progress
        from w2s_jax.evaluate.quantisation import compare, measure
        from w2s_jax.search.adapters import load_decoders
        from w2s_jax.search.checkpoints import load
        from w2s_jax.search.models import Places, search_models

        places = Places(trial.mesh)
        steps = len(trial.texts) * (3 if trial.searching else 2) * (1 + len(specs))
        with progress(steps, "reading") as advance:
            models = load(plan, dtype=dtype, places=places).models
            assert models is not None
            plain = measure(models, trial, lambda: advance(1))
            guides = models.guides
            del models  # the next policy takes its place
            yield AS_STORED, compare(plain, plain)
            cache = self.policy_cache
            if trial.searching is not None:
                searching = replace(trial.searching, policy_cache=cache)
                trial = replace(trial, searching=searching)
            trial = replace(trial, policy_cache=cache)
            place = plan.sources.checkpoints["policy"]
            for spec, config in specs.items():
                policy = load_decoders(
                    {place: places.policy},
                    plan.adapters,
                    dtype=dtype,
                    mesh=trial.mesh,
                    scan_layers=places.scan_layers,
                    quantize=config,
                )[place]
                other = measure(search_models(policy, guides), trial, lambda: advance(1))
                yield spec, compare(plain, other)
                del policy


def _check_shapes(
    plan: "SteeringPlan", configs: "Iterable[QuantizeConfig]", mesh: "Mesh | None"
) -> None:
    """Raise InputError, naming the weight, where a group or a mesh divides the policy's not."""
    from w2s_jax.models.model import abstract_model
    from w2s_jax.ops.sharding import resolve_tree
    from w2s_jax.search.models import ONE_DEVICE

    for config in configs:
        model, axes = abstract_model(plan.configs["policy"], quantize_as=config)
        if mesh is not None:
            resolve_tree(axes, model.params, ONE_DEVICE.policy, mesh)


def show(figures: "dict[str, Figures]", of: str) -> None:
    """Print the table, a column for each policy."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Quantisation ({of})", title_justify="left")
    table.add_column("weights", no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    told = [_told(one) for one in figures.values()]
    for heading in told[0]:
        table.add_row(heading, *(column[heading] for column in told))
    Console().print(table)


def _told(one: "Figures") -> dict[str, str]:
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
