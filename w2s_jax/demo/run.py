"""The demo: one small policy, five ways to decode, and what each gains in gold reward.

Holds the comparison and its report; the models and how they were made are elsewhere in this room.
"""

import importlib.resources
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from w2s_jax.demo import Demo, DemoConfig, OtherGuide, load_demo, load_other_guide
from w2s_jax.errors import InputError
from w2s_jax.evaluate.rewards import gold_rewards, mean_and_stderr
from w2s_jax.search import Guide, SearchConfig, search
from w2s_jax.search.config import preset
from w2s_jax.search.results import SearchResult
from w2s_jax.search.scorers import TextLogRatio, TextModel
from w2s_jax.search.session import hypothesis_text
from w2s_jax.text.chat import load_template
from w2s_jax.text.prompts import Conversation, decode_tokens, encode_prompt
from w2s_jax.text.rows import check_writable, progress, write_jsonl
from w2s_jax.text.tokenizer import buckets


@dataclass(frozen=True)
class Method:
    """A preset, and how tables call it; `across` has the guide of another vocabulary steer."""

    preset: str
    heading: str
    note: str = ""
    across: bool = False


METHODS = {
    "base": Method("sample", "base"),
    "bon": Method("bon", "best-of-16"),
    "eft": Method("eft", "EFT"),
    "cbs": Method("cbs", "CBS 4/4/5"),
    "cbs-across": Method(
        "cbs", "CBS 4/4/5, a Mistral guide", " of another vocabulary", across=True
    ),
}
PAIRS = (("cbs", "base"), ("cbs", "bon"), ("cbs-across", "base"))
SLOTS = 16
SHOWN = 3


@dataclass(frozen=True)
class Outcome:
    """What a method wrote for every opening, its implicit and gold rewards, and its speed."""

    responses: list[str]
    scores: list[float]
    gold_rewards: list[float]
    seconds_per_prompt: float


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Compare the methods, print tables, write results.jsonl and summary.json.

    Returns:
        The summary, as `summarise` gives it.

    Raises:
        InputError: For more prompts than there are openings, or an output that cannot be written.
    """
    folder, openings = Path(config.output), read_openings(config.prompts)
    settings: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens, "seed": config.seed, "slots": SLOTS
    }  # fmt: skip
    searches = {name: preset(method.preset, **settings) for name, method in METHODS.items()}
    for name in ("results.jsonl", "summary.json"):
        check_writable(folder / name)
    models, other = load_demo(), load_other_guide()
    outcomes = {
        name: steer(models, openings, searching, name, other if METHODS[name].across else None)
        for name, searching in searches.items()
    }
    summary = summarise(outcomes)
    write_jsonl(folder / "results.jsonl", result_rows(openings, outcomes))
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report(Console(), openings, outcomes, summary)
    return summary


def read_openings(count: int) -> list[str]:
    """The first `count` built-in openings of a film review; InputError where there are fewer."""
    text = importlib.resources.files("w2s_jax.demo").joinpath("openings.txt").read_text("utf-8")
    openings = text.splitlines()
    if not 2 <= count <= len(openings):
        raise InputError(f"--prompts is {count}; it must lie between 2 and {len(openings)}")
    return openings[:count]


def steer(
    models: Demo,
    openings: Sequence[str],
    config: SearchConfig,
    name: str,
    other: OtherGuide | None = None,
) -> Outcome:
    """Decode every opening with one method; compilation is not in its seconds.

    The other guide, where there is one, scores texts in place of the models' own.
    """
    tokenizer = models.tokenizer
    prompts = [encode_prompt(tokenizer, opening) for opening in openings]
    guide = Guide(models.tuned, models.untuned) if other is None else None

    def run(members: Sequence[int], on_result: Callable[[SearchResult], Any]) -> list[SearchResult]:
        return search(
            models.policy,
            guide,
            [prompts[i] for i in members],
            config,
            scorers=() if other is None else (text_scorer(other),),
            conversations=[Conversation(openings[i]) for i in members],
            decode=partial(decode_tokens, tokenizer),
            on_result=on_result,
        )

    with progress(len(prompts), "prompt", name=name) as advance:
        for members in warm_up(prompts, text=other is not None):
            run(members, lambda _: None)
        start = time.perf_counter()
        results = run(range(len(prompts)), lambda _: advance(1))
        seconds = time.perf_counter() - start
    best = [result.best for result in results]
    responses = [hypothesis_text(tokenizer, *pair) for pair in zip(prompts, best, strict=True)]
    texts = [opening + response for opening, response in zip(openings, responses, strict=True)]
    rewards = gold_rewards(models.gold, tokenizer, texts, batch_size=SLOTS)
    return Outcome(
        responses,
        [hypothesis.score for hypothesis in best],
        rewards.tolist(),
        seconds / len(prompts),
    )


def text_scorer(guide: OtherGuide) -> TextLogRatio:
    """The implicit reward of a guide that encodes responses anew, as texts that continue texts."""
    template = load_template(guide.tokenizer, "none", where="the other guide")
    return TextLogRatio(TextModel(guide.tuned, template), TextModel(guide.untuned, template))


def warm_up(prompts: Sequence[Sequence[int]], *, text: bool) -> list[Sequence[int]]:
    """The indices of prompts whose searches, one after the other, compile what all need together.

    One of every padded length; all where texts are scored, since their sizes are not known before.
    """
    if text:
        return [range(len(prompts))]
    lengths = [len(prompt) for prompt in prompts]
    together = buckets(lengths, slots=SLOTS).values()
    return [[max(members, key=lengths.__getitem__)] for members in together]


def summarise(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Means with standard errors of each method, and of differences over the same prompts."""
    rewards = {name: np.array(outcome.gold_rewards) for name, outcome in outcomes.items()}
    methods, paired = {}, {}
    for name, outcome in outcomes.items():
        mean, stderr = mean_and_stderr(rewards[name])
        seconds = outcome.seconds_per_prompt
        methods[name] = {"gold_reward": mean, "stderr": stderr, "seconds_per_prompt": seconds}
    for better, worse in PAIRS:
        mean, stderr = mean_and_stderr(rewards[better] - rewards[worse])
        paired[f"{better}-{worse}"] = {"mean": mean, "stderr": stderr}
    return {"methods": methods, "paired": paired}


def result_rows(openings: Sequence[str], outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """One row for each opening and method: method, prompt, response, score, gold_reward."""
    return [
        {
            "method": method,
            "prompt": opening,
            "response": outcome.responses[index],
            "score": outcome.scores[index],
            "gold_reward": outcome.gold_rewards[index],
        }
        for index, opening in enumerate(openings)
        for method, outcome in outcomes.items()
    ]


def report(
    console: Console,
    openings: Sequence[str],
    outcomes: Mapping[str, Outcome],
    summary: Mapping[str, Any],
) -> None:
    """Print a few continuations side by side, the table of methods and the paired differences."""
    for index, opening in enumerate(openings[:SHOWN]):
        samples = Table(title=f"{opening} …", title_justify="left", expand=True)
        for method, outcome in outcomes.items():
            samples.add_column(
                f"{METHODS[method].heading} {outcome.gold_rewards[index]:+.1f}", ratio=1
            )
        samples.add_row(*(Text(outcome.responses[index].strip()) for outcome in outcomes.values()))
        console.print(samples)

    table = Table(title=f"Gold reward over {len(openings)} openings")
    for heading in ("method", "gold reward", "stderr", "seconds / prompt"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, row in summary["methods"].items():
        table.add_row(
            METHODS[method].heading + METHODS[method].note,
            f"{row['gold_reward']:+.2f}",
            f"{row['stderr']:.2f}",
            f"{row['seconds_per_prompt']:.2f}",
        )
    console.print(table)
    for pair, row in summary["paired"].items():
        console.print(f"{pair}: {row['mean']:+.2f} ± {row['stderr']:.2f} over the same openings")
