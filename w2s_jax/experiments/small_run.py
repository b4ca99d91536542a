"""A small but real run: models of a few million parameters learn word problems, weak to strong.

    python -m w2s_jax.experiments.small_run --work DIR --size large --seeds 0,1,2

Writes data, a tokenizer and start checkpoints, pre-trains both models by `w2s sft`, and runs `w2s
reason` for every seed; `DIR/table` holds the table over seeds. Stages that are done are not run
again.

The models are pre-trained once, on one text. Seeds have their own questions in both parts, draws
and fine-tunings, and share the test. Weak and strong read the same general text, the weak model
fewer steps of it.

Budget of size large, in operations: 6 per parameter and token trained, 2 per parameter and token
read or generated. Strong pre-training: 3.2 M parameters × 6.0 M tokens, 1.2e14. Weak: 0.4 M × 4.0
M, 1e13. For each seed: eight fine-tunings and one preference tuning of the strong model, 1.2 M
tokens, 2.4e13; and 16,000 responses, 1.6 M tokens, 1e13. At 4e10 operations/s in training and
1.5e10 in generation (two cores), and 10 s per process, that is 55 minutes, and 25 for each seed.
Size tests: 3e12 in all, and some 30 processes.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.experiments.demo_models import LanguageConfig, run_command, write_start
from w2s_jax.experiments.problems import ProblemConfig, general_text, make_problems, question_rows
from w2s_jax.reasoning.measures import gap_over_seeds, over_seeds
from w2s_jax.reasoning.stages import Stage, run_stages
from w2s_jax.text.rows import write_jsonl, write_whole
from w2s_jax.text.tokenizer import load_tokenizer, save_bpe, train_bpe
from w2s_jax.train.watch import read_metrics

SEEDS = 5
"""Number of seeds with questions; the general text contains none of them."""
TEST, GENERAL, TOKENIZER = "test.jsonl", "general.jsonl", "tokenizer"
MODELS = ("weak", "strong")
HEADINGS = {
    "weak": "weak floor",
    "naive": "naive: strong on all weak labels",
    "strong-icl": "strong in context",
    "iteration-1-weak": "stage I, iteration 1, weak",
    "iteration-1-icl": "stage I, iteration 1, icl",
    "iteration-1-hybrid": "stage I, iteration 1, hybrid",
    "iteration-2-weak": "stage I, iteration 2, weak",
    "iteration-2-icl": "stage I, iteration 2, icl",
    "iteration-2-hybrid": "stage I, iteration 2, hybrid",
    "stage-two-1": "stage II",
    "ceiling": "strong ceiling",
}


@dataclass(frozen=True)
class ShapeConfig:
    """A Llama decoder, and the steps of its pre-training."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    steps: int

    def decoder(self, positions: int) -> LanguageConfig:
        """The decoder, for texts of at most `positions` tokens."""
        shape = (self.width, self.layers, self.heads, self.mlp_width)
        return LanguageConfig(*shape, max_positions=positions)


@dataclass(frozen=True)
class SizeConfig:
    """How large a run is.

    Attributes:
        problems: Problems of parts 1 and 2; those of the test have held-out wordings.
        part1, part2, test: Numbers of questions.
        texts: Number of general texts.
        vocabulary: Size of the vocabulary.
        weak, strong: The models.
        pretraining: Flags of `w2s sft` for both.
        reason: Fields of ReasonConfig.
        positions: Maximum tokens of a text.
    """

    problems: ProblemConfig
    part1: int
    part2: int
    test: int
    texts: int
    vocabulary: int
    weak: ShapeConfig
    strong: ShapeConfig
    pretraining: dict[str, Any]
    reason: dict[str, Any]
    positions: int = 512


PRETRAINING = {
    "packing": "best-fit",
    "truncation": "drop",
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "muon_learning_rate": 0.02,
    "schedule": "trapezoid",
    "warmup": 50,
    "decay": 0.4,
    "weight_decay": 0.05,
    "save_seconds": 60,
}
TUNING = {"optimizer": "adamw", "schedule": "cosine", "warmup": 0.1, "max_length": 160}
SIZES = {
    "tests": SizeConfig(
        problems=ProblemConfig(steps=(2,), largest=12, asides=0.0),
        part1=128,
        part2=96,
        test=64,
        texts=3000,
        vocabulary=512,
        weak=ShapeConfig(width=48, layers=2, heads=4, mlp_width=128, steps=150),
        strong=ShapeConfig(width=96, layers=2, heads=4, mlp_width=256, steps=300),
        pretraining=PRETRAINING | {"max_length": 256, "batch_size": 8},
        reason={
            "sets": ["hybrid"],
            "demonstrations": {"count": 1, "overflow": "drop-first"},
            "decoding": {"max_new_tokens": 48, "batch_size": 32},
            "sft": TUNING | {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3},
            "dpo": TUNING | {"epochs": 1, "batch_size": 8, "learning_rate": 1e-4},
            "stage_two": {
                "contrasts": {"samples": 4, "min_confidence": 0.5, "overrule_confidence": 0.5}
            },
            "pass_at": [1, 4],
        },
    ),
    "large": SizeConfig(
        problems=ProblemConfig(largest=40),
        part1=800,
        part2=800,
        test=400,
        texts=40_000,
        vocabulary=768,
        weak=ShapeConfig(width=96, layers=3, heads=4, mlp_width=256, steps=800),
        strong=ShapeConfig(width=224, layers=5, heads=7, mlp_width=608, steps=1200),
        pretraining=PRETRAINING | {"max_length": 416, "batch_size": 12},
        reason={
            "demonstrations": {"count": 3, "overflow": "drop-first"},
            "decoding": {"max_new_tokens": 80, "batch_size": 64},
            "sft": TUNING | {"epochs": 2, "batch_size": 16, "learning_rate": 5e-4},
            "dpo": TUNING | {"epochs": 1, "batch_size": 16, "learning_rate": 5e-5},
            "stage_two": {"contrasts": {"samples": 10}},
            "pass_at": [1, 5, 10],
        },
        positions=640,
    ),
}


@dataclass(frozen=True)
class SmallRun:
    """A run of some size with several seeds, and its folder."""

    size: SizeConfig
    seeds: tuple[int, ...]
    work: Path

    def __post_init__(self) -> None:
        if not self.seeds or not all(0 <= seed < SEEDS for seed in self.seeds):
            raise InputError(f"seeds {self.seeds}: numbers from 0 to {SEEDS - 1} are needed")

    def stages(self) -> list[Stage]:
        """The stages: data, two pre-trainings, a run for each seed, the table."""
        size = asdict(self.size)
        made = ("problems", "part1", "part2", "test", "texts", "vocabulary", "positions")
        shapes = {name: {**size[name], "steps": 0} for name in MODELS}
        outputs = (TEST, GENERAL, TOKENIZER, *(f"{name}-start" for name in MODELS))
        outputs += tuple(part for seed in range(SEEDS) for part in _parts(seed))
        settings = {name: size[name] for name in made} | shapes
        steps = {name: {"max_steps": size[name]["steps"]} for name in MODELS}
        runs, tables = tuple(map(_run_name, self.seeds)), ("table.md", "table.json")
        return [
            Stage("data", self._data, outputs, settings),
            *(self._pretraining(name, size["pretraining"] | steps[name]) for name in MODELS),
            *map(self._run, self.seeds),
            Stage("table", self._table, tables, {"seeds": list(self.seeds)}, runs),
        ]

    def _data(self, folder: Path) -> Mapping[str, Any]:
        """Write all questions, the test, general text, tokenizer, and configs of the models."""
        size = self.size
        test = make_problems(size.test, 0, replace(size.problems, wordings="held out"))
        write_jsonl(folder / TEST, question_rows(test, "test-"))
        asked = {problem.question for problem in test}
        for seed in range(SEEDS):
            # Seed 0 is that of the general text and the test.
            both = make_problems(size.part1 + size.part2, seed + 1, size.problems, without=asked)
            asked |= {problem.question for problem in both}
            parts = (both[: size.part1], both[size.part1 :])
            for name, problems in zip(_parts(seed), parts, strict=True):
                write_jsonl(folder / name, question_rows(problems, f"{Path(name).stem}-"))
        texts = general_text(size.texts, 0, size.problems, without=asked)
        write_jsonl(folder / GENERAL, [{"text": text} for text in texts])
        tokenizer = train_bpe(texts, size.vocabulary)
        save_bpe(tokenizer, folder / TOKENIZER, max_length=size.positions)
        for name in MODELS:
            decoder, read = getattr(size, name).decoder(size.positions), folder / TOKENIZER
            write_start(decoder, size.vocabulary, load_tokenizer(read), folder / f"{name}-start")
        lengths = [len(found.ids) for found in tokenizer.encode_batch(texts)]
        return {"questions": len(asked), "texts": len(texts), "tokens": sum(lengths)}

    def _pretraining(self, name: str, flags: dict[str, Any]) -> Stage:
        data = self.work / "data"

        def work(folder: Path) -> Mapping[str, Any]:
            start = {"model": str(data / f"{name}-start"), "data": str(data / GENERAL)}
            own = start | {"from_scratch": True, "output": str(folder)}
            run_command("sft", folder, flags | own)
            last = read_metrics(folder)[-1]
            kept = ("step", "loss", "seconds", "tokens_per_second")
            return {name: last[name] for name in kept if name in last}

        cost = f"{flags['max_steps']} × {flags['batch_size']} × {flags['max_length']} tokens"
        return Stage(f"{name}-pretrained", work, ("model",), flags, ("data",), (), cost)

    def _run(self, seed: int) -> Stage:
        weak, strong = (str(self.work / f"{name}-pretrained" / "model") for name in MODELS)
        part1, part2 = _parts(seed)
        values: dict[str, Any] = {"kind": "gsm8k", "questions": part2, "test": TEST}
        values |= {"strong": strong, "weak": {"model": weak, "train": part1}, "seed": seed}
        values |= self.size.reason

        def work(folder: Path) -> Mapping[str, Any]:
            words = ("--data", str(self.work / "data"), "--output", str(folder / "run"))
            run_command("reason", folder, values, *words)
            models = self._report(seed)["models"]
            return {name: found["value"] for name, found in models.items()}

        after = ("data", *(f"{name}-pretrained" for name in MODELS))
        return Stage(_run_name(seed), work, ("run/report.json",), values, after)

    def _table(self, folder: Path) -> Mapping[str, Any]:
        found = over_runs([self._report(seed) for seed in self.seeds])
        write_whole(folder / "table.json", [json.dumps(found, indent=2).encode(), b"\n"])
        write_whole(folder / "table.md", [table(found).encode()])
        return {"seeds": len(self.seeds)}

    def _report(self, seed: int) -> Any:
        return json.loads((self.work / _run_name(seed) / "run" / "report.json").read_text())


def over_runs(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy and gap recovered of each model over runs with different seeds, and their sets.

    Raises:
        InputError: If the runs tested different models.
    """
    models = [report["models"] for report in reports]
    names = [name for name in HEADINGS if name in models[0]]
    if any(set(found) != set(models[0]) for found in models):
        raise InputError("the runs tested different models; they are of different settings")
    values = {name: [found[name]["value"] for found in models] for name in names}
    result: dict[str, Any] = {}
    for name in names:
        gap = None
        if name not in ("weak", "ceiling") and {"weak", "ceiling"} <= set(values):
            gap = gap_over_seeds(values["weak"], values[name], values["ceiling"])
        result[name] = {
            "accuracy": over_seeds(values[name]).as_row(),
            "gap_recovered": None if gap is None else gap.as_row(),
            "by_seed": values[name],
        }
    return {"models": result, "sets": _sets(reports)}


def table(found: Mapping[str, Any]) -> str:
    """The result of `over_runs` as Markdown."""
    lines = ["| model | accuracy | 95 % interval | gap recovered |", "|---|---:|---:|---:|"]
    for name, row in found["models"].items():
        share, gap = row["accuracy"], row["gap_recovered"]
        told = "" if gap is None else f"{gap['mean']:.2f}{_interval(gap, scale=1, digits=2)}"
        mean, ends = f"{100 * share['mean']:.1f} %", _interval(share, scale=100, digits=1)
        lines.append(f"| {HEADINGS[name]} | {mean} |{ends} | {told} |")
    lines += ["", "| set | rows | accuracy |", "|---|---:|---:|"]
    for name, row in found["sets"].items():
        lines.append(f"| {name} | {row['size']:,.0f} | {100 * row['accuracy']:.1f} % |")
    return "\n".join(lines) + "\n"


def _sets(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Sizes and accuracies of each stage's responses and sets, as means over the runs."""
    found: dict[str, list[tuple[float, float]]] = {}
    for report in reports:
        for stage, row in report["data"].items():
            sets = [(f"{stage}: {one['name']}", one["size"], one) for one in row.get("sets", ())]
            answered = [(stage, row["rows"], row)] if "answered" in row else []
            for name, size, judged in (*answered, *sets):
                if judged.get("accuracy"):
                    found.setdefault(name, []).append((size, judged["accuracy"]["value"]))
    return {
        name: {"size": fmean(size for size, _ in each), "accuracy": fmean(one for _, one in each)}
        for name, each in found.items()
    }


def _interval(row: Mapping[str, Any], *, scale: int, digits: int) -> str:
    """The interval of an estimate; empty for a single run."""
    if row["count"] < 2:
        return ""
    return " " + " – ".join(f"{scale * row[end]:.{digits}f}" for end in ("low", "high"))


def _parts(seed: int) -> tuple[str, str]:
    return f"part1-{seed}.jsonl", f"part2-{seed}.jsonl"


def _run_name(seed: int) -> str:
    return f"seed-{seed}"


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(description="A small weak-to-strong run, from data to table.")
    parser.add_argument("--work", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--size", choices=sorted(SIZES), default="tests")
    parser.add_argument("--seeds", help="such as 0,1,2; by default 0 of tests, 0,1,2 of large")
    parser.add_argument("--until", metavar="STAGE", help="end with this stage")
    flags = parser.parse_args(arguments)
    given = flags.seeds or ("0" if flags.size == "tests" else "0,1,2")
    try:
        if not all(part.strip().isdigit() for part in given.split(",")):
            raise InputError(f"--seeds {given}: whole numbers with commas are needed")
        seeds = tuple(int(part) for part in given.split(","))
        run = SmallRun(SIZES[flags.size], seeds, flags.work.resolve())
        run_stages(run.stages(), run.work, last=flags.until, tell=_tell)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    text = run.work / "table" / "table.md"
    if flags.until in (None, "table"):
        sys.stdout.write(text.read_text())
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
