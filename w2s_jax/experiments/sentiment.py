"""The controlled-sentiment experiment of arXiv 2405.19262 section 4.1: every method, measured.

Figures, table and picture are made from the methods' rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Array, Float

from w2s_jax.demo import Demo
from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import compare, gold_rewards, mean_and_stderr
from w2s_jax.experiments.demo_models import journalled, opening_words
from w2s_jax.models.model import Model
from w2s_jax.ops.logits import Sampling
from w2s_jax.search.config import SearchConfig, best_of_n, cbs, eft, sample
from w2s_jax.search.likelihood import Response, score_responses
from w2s_jax.search.methods import EFTProposer, Logits, PolicyProposer, Proposer
from w2s_jax.search.models import Guide, SearchModels, search_models
from w2s_jax.search.run import search
from w2s_jax.search.session import hypothesis_text
from w2s_jax.text.prompts import encode_prompt
from w2s_jax.text.rows import Journal, Row
from w2s_jax.train.curves import as_png, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASE, BEST_OF_N, EFT, CBS, DIRECT = "base", "bon", "eft", "cbs", "tuned_policy"
RESPONSES = "responses"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is decoded after the first `words` words of `prompts` test reviews, drawn by `seed`.

    `beam_width`, `successors` and `chunk_length` are those of CBS, `samples` is best-of-N's N,
    `beta` is EFT's. The methods share the other settings.

    Raises:
        InputError: For fewer than two prompts, and for sizes below one.
    """

    prompts: int = 1000
    words: int = 8
    new_tokens: int = 50
    temperature: float = 0.7
    top_k: int = 50
    beam_width: int = 4
    successors: int = 4
    chunk_length: int = 5
    samples: int = 16
    beta: float = 1.0
    slots: int = 16
    block: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"prompts": 2, "words": 1, "samples": 1, "block": 1}
        for name, size in least.items():
            if getattr(self, name) < size:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {size}")
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}; it must be above 0")


@dataclass(frozen=True)
class Method:
    """A way to decode.

    Attributes:
        heading: Its name in tables.
        model: The model that is sampled from.
        guide: Its guide, if any.
        search: The search.
        likelihood: The proposer from whose distribution the responses are drawn; None if they are
            selected among samples and have no likelihood in closed form.
    """

    heading: str
    model: Model
    guide: Guide | None
    search: SearchConfig
    likelihood: Proposer | None = None


@dataclass(frozen=True)
class Tempered:
    """A proposer whose distribution is taken at a temperature, without top-k.

    All else is the proposer's own.
    """

    proposer: Proposer
    temperature: float | int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.proposer, name)

    def mix(
        self, models: SearchModels, logits: Logits, beta: Float[Array, " P"]
    ) -> Float[Array, "P *rows V"]:
        return self.proposer.mix(models, logits, beta) / self.temperature


def experiment_methods(
    config: EvaluationConfig, models: Demo, direct: Model | None = None
) -> dict[str, Method]:
    """The methods by name, in the order of tables; `direct` is the directly tuned policy."""
    settings: dict[str, Any] = {
        "max_new_tokens": config.new_tokens,
        "sampling": Sampling(config.temperature, config.top_k),
        "seed": config.seed,
        "slots": config.slots,
    }
    guide, beta = Guide(models.tuned, models.untuned), config.beta
    sizes = (config.beam_width, config.successors, config.chunk_length)
    policy, plain = models.policy, sample(**settings)
    found = {
        BASE: Method("base", policy, None, plain, PolicyProposer()),
        BEST_OF_N: Method(
            f"best-of-{config.samples}", policy, guide, best_of_n(config.samples, **settings)
        ),
        EFT: Method(
            f"EFT, β = {beta:g}", policy, guide, eft(beta, **settings), EFTProposer(beta)
        ),
        CBS: Method(f"CBS {'/'.join(map(str, sizes))}", policy, guide, cbs(*sizes, **settings)),
    }  # fmt: skip
    if direct is not None:
        found[DIRECT] = Method("directly tuned policy", direct, None, plain, PolicyProposer())
    return found


def draw_prompts(config: EvaluationConfig, texts: Sequence[str]) -> list[str]:
    """The openings of reviews drawn by the seed, since files are sorted by label.

    Raises:
        InputError: If there are fewer texts than prompts.
    """
    if len(texts) < config.prompts:
        raise InputError(
            f"evaluation: prompts is {config.prompts}, and there are {len(texts)} test reviews"
        )
    order = np.random.default_rng(config.seed).permutation(len(texts))[: config.prompts]
    return [opening_words(texts[i], config.words) for i in order]


def decode_all(
    config: EvaluationConfig,
    models: Demo,
    methods: Mapping[str, Method],
    prompts: Sequence[str],
    folder: Path,
    identity: Mapping[str, Any],
) -> dict[str, tuple[Journal, list[Row]]]:
    """Every method's journal and rows, in the order of `prompts`; resumes after a kill.

    `identity` identifies the models' weights. The fields of a row are those of `answer`.
    """
    fingerprint = {"config": repr(config), **identity}
    return {
        name: journalled(
            responses_path(folder, name),
            fingerprint,
            len(prompts),
            config.block,
            partial(answer, method, models, prompts, temperature=config.temperature),
        )
        for name, method in methods.items()
    }


def responses_path(folder: Path, method: str) -> Path:
    """Path of a method's rows."""
    return folder / RESPONSES / f"{method}.jsonl"


def answer(
    method: Method,
    models: Demo,
    prompts: Sequence[str],
    row_ids: Sequence[int],
    *,
    temperature: float | int,
) -> list[Row]:
    """One response to each of the prompts at `row_ids`, and its measurements.

    Returns:
        Rows of prompt; response; tokens, the ids of the response with EOS; score, its implicit
        reward; gold_reward; logprob, log p(response | prompt) under the policy at temperature 1, in
        nats; and log_ratio, log p_method − log p_policy, both at `temperature`, None for a method
        without a likelihood. The mean of log_ratio estimates KL(method ‖ policy), ignoring top-k:
        with its top-k the policy has probability 0 for some of the tokens.
    """
    tokenizer, asked = models.tokenizer, [prompts[i] for i in row_ids]
    encoded = [tuple(encode_prompt(tokenizer, prompt)) for prompt in asked]
    results = search(method.model, method.guide, encoded, method.search, row_ids=row_ids)
    best = [result.best for result in results]
    said = [hypothesis_text(tokenizer, *pair) for pair in zip(encoded, best, strict=True)]
    texts = [prompt + response for prompt, response in zip(asked, said, strict=True)]
    gold = gold_rewards(models.gold, tokenizer, texts)
    pairs = [Response((prompt,), one.tokens) for prompt, one in zip(encoded, best, strict=True)]
    plain = partial(summed_logprobs, models.policy, None, PolicyProposer(), pairs)
    logprobs = plain(1.0)
    ratios: list[float] | list[None] = [None] * len(asked)
    if method.likelihood is not None:
        own = summed_logprobs(method.model, method.guide, method.likelihood, pairs, temperature)
        ratios = (own - plain(temperature)).tolist()
    return [
        {
            "prompt": asked[i],
            "response": said[i],
            "tokens": list(best[i].tokens),
            "score": best[i].score,
            "gold_reward": float(gold[i]),
            "logprob": float(logprobs[i]),
            "log_ratio": ratios[i],
        }
        for i in range(len(asked))
    ]


def summed_logprobs(
    model: Model,
    guide: Guide | None,
    proposer: Proposer,
    responses: Sequence[Response],
    temperature: float | int,
) -> Float[np.ndarray, " n"]:
    """log p(response | prompt), in nats, under a proposer's distribution at a temperature."""
    tempered = cast(Proposer, Tempered(proposer, temperature))
    scored = score_responses(search_models(model, guide), tempered, responses, batch_size=32)
    return np.array([row.logprobs.astype(np.float64).sum() for row in scored])


HEADINGS = (
    "method", "gold reward", "over base", "over best-of-{n}", "log-prob per token",
    "log-prob per response", "KL estimate",
)  # fmt: skip
GAIN_COLUMNS = (BASE, BEST_OF_N)
# Two colours of Okabe and Ito's palette, which colour-blind readers can distinguish.
BAR, LINE = "#0072B2", "#D55E00"


def best_of_n_bound(samples: int) -> float:
    """log N − (N − 1)/N: an upper bound of KL(best-of-N ‖ sampled distribution), in nats.

    Source: arXiv 2401.01879, which proves that this well-known formula is an upper bound.
    """
    return math.log(samples) - (samples - 1) / samples


def summarise_experiment(
    rows: Mapping[str, Sequence[Row]], headings: Mapping[str, str], *, samples: int
) -> dict[str, Any]:
    """Means with standard errors over prompts for each method, and paired comparisons.

    A figure is {mean, stderr}. kl is None for a method without a likelihood; only best-of-N has
    kl_bound. Paired figures, METHOD-base and METHOD-bon, are those of `evaluate.rewards.compare`.

    Args:
        rows: By method, the rows of `answer` to the same prompts.
        headings: Names of the methods in tables.
        samples: N of best-of-N.
    """
    methods = {name: {"heading": headings[name]} | _figures(found) for name, found in rows.items()}
    methods[BEST_OF_N]["kl_bound"] = best_of_n_bound(samples)
    gold = {name: _column(found, "gold_reward") for name, found in rows.items()}
    paired = {
        f"{name}-{other}": asdict(compare(gold[name], gold[other]))
        for other in GAIN_COLUMNS
        for name in rows
        if name not in GAIN_COLUMNS[: GAIN_COLUMNS.index(other) + 1]
    }
    return {"prompts": len(gold[BASE]), "samples": samples, "methods": methods, "paired": paired}


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    lengths = np.array([len(row["tokens"]) for row in rows], np.float64)
    logprobs = _column(rows, "logprob")
    has_ratio = rows[0]["log_ratio"] is not None
    return {
        "gold_reward": _figure(_column(rows, "gold_reward")),
        "logprob_per_token": _figure(logprobs / lengths),
        "logprob": _figure(logprobs),
        "tokens": _figure(lengths),
        "kl": _figure(_column(rows, "log_ratio")) if has_ratio else None,
    }


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)


def _figure(values: np.ndarray) -> dict[str, float | None]:
    mean, stderr = mean_and_stderr(values)
    return {"mean": mean, "stderr": stderr}


def result_table(summary: Mapping[str, Any]) -> str:
    """A Markdown table of a summary, one line per method, figures with standard errors."""
    headings = [text.format(n=summary["samples"]) for text in HEADINGS]
    lines = [_line(headings), _line(["---"] * len(headings))]
    for name, figures in summary["methods"].items():
        gains = (summary["paired"].get(f"{name}-{other}") for other in GAIN_COLUMNS)
        cells = [
            figures["heading"],
            _shown(figures["gold_reward"]),
            *("" if gain is None else _difference(gain) for gain in gains),
            _shown(figures["logprob_per_token"], sign=""),
            _shown(figures["logprob"], sign="", digits=1),
            _kl(figures),
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(figure: Mapping[str, float | int], *, sign: str = "+", digits: int = 2) -> str:
    return f"{figure['mean']:{sign}.{digits}f} ± {figure['stderr']:.{digits}f}"


def _difference(comparison: Mapping[str, float | int]) -> str:
    return f"{comparison['difference']:+.2f} ± {comparison['difference_stderr']:.2f}"


def _kl(figures: Mapping[str, Any]) -> str:
    if figures["kl"] is not None:
        return "0" if not figures["kl"]["mean"] else _shown(figures["kl"], sign="", digits=1)
    return f"≤ {figures['kl_bound']:.1f}" if "kl_bound" in figures else "–"


def need_matplotlib() -> None:
    """Raise InputError if matplotlib is missing, before hours are spent."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError(
            "the evaluation draws a figure with matplotlib; pip install 'w2s-jax[plot]'"
        ) from None


def draw_experiment(summary: Mapping[str, Any]) -> bytes:
    """A PNG of the gold reward by method, and beside it the log-prob per token under the policy.

    Bars have standard errors over prompts. The directly tuned policy is also a line, as the
    reference for the methods that leave the policy unchanged.
    """
    figure = new_figure(9.6, 0.55 * len(summary["methods"]) + 1.3)
    left, right = figure.subplots(1, 2, sharey=True)
    methods, told = summary["methods"], "log-prob per token under the policy (nats)"
    _draw_bars(left, methods, "gold_reward", "gold reward (log-odds of “positive”)")
    _draw_bars(right, methods, "logprob_per_token", told)
    figure.suptitle(f"{summary['prompts']} openings of IMDb test reviews", fontsize=10)
    return as_png(figure)


def _draw_bars(axis: "Axes", methods: Mapping[str, Any], name: str, title: str) -> None:
    headings = [method["heading"] for method in methods.values()]
    means, errors = ([one[name][end] for one in methods.values()] for end in ("mean", "stderr"))
    axis.barh(headings, means, xerr=errors, color=BAR, height=0.6, capsize=3)
    if DIRECT in methods:
        axis.axvline(methods[DIRECT][name]["mean"], color=LINE, linestyle="--", linewidth=1)
    axis.axvline(0.0, color="black", linewidth=0.6)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
    axis.set_xlabel(title, fontsize=9)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
