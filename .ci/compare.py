"""Compare the commands of two commits: flags, configs, and outputs on tiny models.

    .ci/compare COMMIT [CASE ..] [--keep DIR]

Both sides run in processes of their own with the same files, made by COMMIT's code, one after
another on this machine. Texts, tokens and flags must be equal, numbers within 1e-5; times and
paths are left out. What COMMIT left half-done (a journal, a training run, a reasoning run) is gone
on with by both sides. Needs the environment of the tests, and libtpu for plans. Commands are called
by their words, so that modules may move.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TOLERANCE = 1e-5
ROOT = Path(__file__).parent.parent
# What tells of the machine or the moment.
TIMED = re.compile(r"second|time|date|version|speed|peak|path|folder|digest|sha256")
# A plan's seconds are its figures.
TIMED_IN_PLANS = re.compile(r"compile_seconds")
SMALL = ["--w=2", "--k=2", "--l=2", "--n=3", "--max-new-tokens=6", "--batch-size=2"]
TRAIN = ["--batch-size=4", "--log-every=1", "--learning-rate=1e-2", "--max-steps=4"]
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a>{% endif %}"
)
PROMPTS: list[dict[str, Any]] = [
    {"prompt": "A film of the sea", "id": 7},
    {"messages": [{"role": "user", "content": "Say film"}]},
    {"instruction": "", "input": "the sea"},
    {"prompt": "We"},
]
PAIRS = [
    {
        "prompt": f"film {i} was",
        "chosen": " so good" * (1 + i % 3),
        "rejected": " bad" * (1 + i % 2),
    }
    for i in range(16)
]
SUMS = [(a, b) for a in range(5) for b in range(4)]
REASON: dict[str, Any] = {
    "kind": "gsm8k",
    "votes": "published",
    "judge": "published",
    "demonstrations": {"count": 0},
    "decoding": {"max_new_tokens": 8, "batch_size": 16},
    "sets": ["hybrid"],
    "iterations": 1,
    "naive": False,
    "ceiling": False,
    "sft": {
        "max_steps": 6,
        "batch_size": 16,
        "learning_rate": 0.008,
        "max_length": 64,
        "schedule": "constant",
        "warmup": 0,
    },
    "dpo": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-4, "max_length": 64},
    "stage_two": {
        "temperature": 1.5,
        "contrasts": {"samples": 4, "min_confidence": 0.5, "overrule_confidence": 0.5},
    },
    "pass_at": [1, 4],
}


def count_vowels(prompts: list[str], responses: list[str]) -> list[int]:
    """A scorer; where COMPARE_STOP is set it ends the search at its third call."""
    calls.append(1)
    if os.environ.get("COMPARE_STOP") and len(calls) > 3:
        raise KeyboardInterrupt
    return [sum(response.count(vowel) for vowel in "aeiou") for response in responses]


calls: list[int] = []


# --- Files that both sides take -----------------------------------------------------------------


def make_files(data: Path) -> None:
    """Models, rows and half-done work, by the code that this process imports."""
    from transformers import AutoTokenizer

    from tests.cli.test_search import tiny

    few, far = {"vocab_size": 270}, {"text": "our quiet seas", "vocab_size": 270}
    kinds: dict[str, dict[str, Any]] = {"policy": {}, "tuned": {}, "untuned": {}}
    kinds |= {"far-tuned": far, "far-untuned": far, "judge": few}
    for seed, (name, fields) in enumerate(kinds.items()):
        folder = Path(tiny(data / name, seed, max_positions=256, **fields))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
    make_reward_model(data / "judge")
    wide = {"width": 256, "heads": 2, "kv_heads": 2, "head_width": 128, "mlp_width": 512}
    tiny(data / "planned", 0, max_positions=4096, **wide)
    write_rows(data / "prompts.jsonl", PROMPTS)
    write_rows(data / "pairs.jsonl", PAIRS)
    sums = [
        {"id": f"q{i}", "question": f"{a} + {b}?", "answer": f"#### {a + b}"}
        for i, (a, b) in enumerate(SUMS)
    ]
    write_rows(data / "questions.jsonl", sums)
    write_rows(data / "test.jsonl", sums[:8])
    taught = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in sums
    ]
    write_rows(data / "taught.jsonl", taught)
    start = tiny(data / "start", 1, width=48, mlp_width=96)
    taken = ["--batch-size=16", "--learning-rate=0.008", "--max-length=64", "--max-steps=80"]
    taken += ["--schedule=constant", "--warmup=0"]
    told(["sft", f"--model={start}", f"--data={data}/taught.jsonl", f"--output={data}/strong",
          "--from-scratch", "--save-every=40", *taken])  # fmt: skip
    told(["convert", f"{data}/strong", f"{data}/weak", "--step=40"])
    models = {"strong": f"{data}/strong/model", "weak": {"model": f"{data}/weak"}}
    questions = {name: f"{data}/{name}.jsonl" for name in ("questions", "test")}
    (data / "reason.yaml").write_text(json.dumps(REASON | models | questions))
    leave_half_done(data)


def make_reward_model(folder: Path) -> None:
    """A head of one number in the place of a decoder's own."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    width = tensors["model.norm.weight"].size
    tensors["score.weight"] = np.linspace(-1, 1, width, dtype=np.float32)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    (folder / "config.json").write_text(json.dumps(config))


def leave_half_done(data: Path) -> None:
    """A journal of some rows, a training run at half its steps, a run without its last stages."""
    half = data / "half"
    half.mkdir()
    os.environ["COMPARE_STOP"] = "1"
    told(half_search(data, half), status=130)
    del os.environ["COMPARE_STOP"]
    assert any("journal" in path.name for path in half.iterdir()), list(half.iterdir())
    told([*dpo(data, half / "dpo"), "--save-every=2", "--keep-last=4"])
    shutil.rmtree(half / "dpo" / "model")
    for path in (half / "dpo" / "checkpoints").iterdir():
        if re.search(r"\b4\b", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    told(["reason", "--config", f"{data}/reason.yaml", "--output", f"{half}/reason"])
    for path in (half / "reason").iterdir():
        if "stage-two" in path.name or path.name.startswith("report"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def told(argv: list[str], status: int = 0) -> str:
    """What a command prints; fails unless it ends with this status."""
    from w2s_jax.cli.main import main

    print("w2s", *argv[:2], file=sys.stderr, flush=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ended = main(argv)
    assert ended == status, f"w2s {' '.join(argv)}: status {ended}, not {status}"
    return printed.getvalue()


# --- Cases: each writes what is compared into a folder ------------------------------------------


def search(
    data: Path, output: Path, *flags: str, guides: str | None = "", files: str = "rows"
) -> list[str]:
    """The words of a search; guides: what stands before the names of theirs."""
    models = [f"--policy={data}/policy"]
    if guides is not None:
        models += [f"--tuned={data}/{guides}tuned", f"--untuned={data}/{guides}untuned"]
    rows = [f"--prompts={data}/prompts.jsonl", f"--output={output}/{files}.jsonl"]
    return ["search", *models, *rows, *SMALL, *flags]


def half_search(data: Path, output: Path) -> list[str]:
    """The words of a search that COMPARE_STOP ends early."""
    scorer = ["--scorer=compare:count_vowels", "--batch-size=1"]
    return search(data, output, *scorer, guides=None, files="journalled")


def dpo(data: Path, output: Path, *flags: str) -> list[str]:
    """The words of a training run."""
    files = [f"--model={data}/policy", f"--data={data}/pairs.jsonl", f"--output={output}"]
    return ["dpo", *files, f"--eval-data={data}/pairs.jsonl", "--eval-every=2", *TRAIN, *flags]


def of_search(*flags: str, guides: str | None = "") -> Callable[[Path, Path], None]:
    """A case: the rows of a search."""

    def run(data: Path, output: Path) -> None:
        words = [flag.replace("DATA", str(data)) for flag in flags]
        told(search(data, output, *words, guides=guides))

    return run


def of_training(command: str, *flags: str) -> Callable[[Path, Path], None]:
    """A case: what a training run logs, and the configs it writes."""

    def run(data: Path, output: Path) -> None:
        words = dpo(data, output / "run", *flags)
        told([command, *words[1:]])
        keep_only(output / "run", "metrics.jsonl", "config.json", "adapter_config.json")

    return run


def of_reasoning(data: Path, output: Path) -> None:
    """A whole run's rows and report."""
    told(["reason", "--config", f"{data}/reason.yaml", "--output", f"{output}/run"])
    keep_only(output / "run", "graded.jsonl", "training.jsonl", "report.json", "report.md")


def of_plan(*flags: str) -> Callable[[Path, Path], None]:
    """A case: the figures of a plan."""

    def run(data: Path, output: Path) -> None:
        words = [flag.replace("DATA", str(data)) for flag in flags]
        told(["plan", *words, "--topology=v5e:2x2", f"--json={output}/plan.json"])

    return run


def go_on(data: Path, output: Path) -> None:
    """What the first side left half-done."""
    half = output / "half"
    shutil.copytree(data / "half", half)
    told(half_search(data, half))
    told([*dpo(data, half / "dpo"), "--save-every=2", "--keep-last=4"])
    told(["reason", "--config", f"{data}/reason.yaml", "--output", f"{half}/reason"])
    kept = ("journalled.jsonl", "metrics.jsonl", "graded.jsonl", "training.jsonl", "report.json")
    keep_only(half, *kept)


def of_help(data: Path, output: Path) -> None:
    """Flags, what they take, choices and defaults; not the prose."""
    from w2s_jax.cli.main import COMMANDS

    os.environ |= {"COLUMNS": "400", "NO_COLOR": "1"}
    found = {}
    for words in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            from w2s_jax.cli.main import main

            main([*words, "--help"])
        found[" ".join(words)] = dict(flags_of(printed.getvalue()))
    (output / "help.json").write_text(json.dumps(found))


def flags_of(page: str) -> Iterator[tuple[str, str]]:
    """(flag with what it takes, what is noted of its values) of a page of help."""
    flag, notes = None, ""
    for line in page.splitlines():
        text = line.strip(" │")
        if re.match(r"--?[a-z]", text):
            if flag is not None:
                yield flag, notes
            flag, notes = re.split(r"\s{2,}", text)[0], ""
        noted = re.findall(r"\((?:default|optional|required|sets|repeatable)[^)]*\)", text)
        notes += " ".join(noted)
    if flag is not None:
        yield flag, notes


def of_configs(data: Path, output: Path) -> None:
    """Every config of a command as the values of its fields, by name."""
    from w2s_jax.cli.main import parse

    found = {}
    for path in sorted(Path("configs").rglob("*.yaml")):
        kind = path.parent.name
        if kind in ("demo",):
            continue
        command = "reason" if kind == "reasoning" else "search"
        more = ["--output=o"] if command == "reason" else ["--prompts=p", "--output=o"]
        made = parse([command, f"--config={path}", *more])
        found[f"{kind}/{path.stem}"] = leaves(made)
        if command == "reason":
            found[f"{kind}/{path.stem}"] = {}
            with contextlib.suppress(ImportError):
                import yaml

                from w2s_jax.reasoning.config import ReasonConfig
                from w2s_jax.text.typed_yaml import from_mapping

                value = from_mapping(ReasonConfig, yaml.safe_load(path.read_text()), str(path))
                found[f"{kind}/{path.stem}"] = leaves(value)
    (output / "configs.json").write_text(json.dumps(found, default=str))


def leaves(value: Any) -> dict[str, Any]:
    """Fields of nested dataclasses by their own names, those that two share by all of them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        if dataclasses.is_dataclass(held) and not isinstance(held, type):
            for name, inner in leaves(held).items():
                found[f"{field.name}.{name}" if name in found else name] = inner
        else:
            found[field.name] = held
    return found


def keep_only(folder: Path, *names: str) -> None:
    """Remove all files but these: others hold weights, times and digests."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in names:
            path.unlink()


CBS = "--method=cbs"
CASES: dict[str, Callable[[Path, Path], None]] = {
    "help": of_help,
    "configs": of_configs,
    "search-cbs": of_search(CBS),
    "search-bon": of_search("--method=bon"),
    "search-eft": of_search("--method=eft", "--beta=0.5"),
    "search-ivg": of_search("--method=ivg", "--beta=0.5"),
    "search-sample": of_search("--method=sample", guides=None),
    "search-other-vocabulary": of_search(CBS, guides="far-"),
    "search-function": of_search(CBS, "--scorer=compare:count_vowels", guides=None),
    "search-reward-model": of_search(CBS, "--reward-model=DATA/judge"),
    "search-quantised": of_search(CBS, "--quantise-policy=int8", "--policy-cache=int8"),
    "sft": of_training("sft"),
    "dpo": of_training("dpo"),
    "dpo-lora": of_training("dpo", "--lora-rank=2", "--accumulate=2"),
    "dpo-ipo": of_training("dpo", "--loss-type=ipo"),
    "reason": of_reasoning,
    "plan-search": of_plan("search", "--policy=DATA/planned", "--tuned=DATA/planned",
                           "--untuned=DATA/planned"),
    "plan-dpo": of_plan("dpo", "--model=DATA/planned", "--lora-rank=8", "--max-length=256"),
    "go-on": go_on,
}  # fmt: skip


def run_cases(data: Path, output: Path, names: list[str]) -> None:
    """Run cases into folders of their own; what one raises is written there, for comparison."""
    for name in names:
        place = output / name
        place.mkdir(parents=True)
        start = time.monotonic()
        try:
            CASES[name](data, place)
        except BaseException as error:
            (place / "raised.txt").write_text(f"{type(error).__name__}: {error}"[:500])
            if isinstance(error, KeyboardInterrupt):
                raise
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


# --- What differs -------------------------------------------------------------------------------


def differences(base: Path, new: Path) -> Iterator[str]:
    """A line for each thing that differs between two folders."""
    files = [{p.relative_to(side) for p in side.rglob("*") if p.is_file()} for side in (base, new)]
    for path in sorted(files[0] ^ files[1]):
        yield f"{path}: only {'before' if path in files[0] else 'here'}"
    for path in sorted(files[0] & files[1]):
        if path.name == "raised.txt":
            yield f"{path}: {(new / path).read_text()}"
        timed = TIMED_IN_PLANS if path.name == "plan.json" else TIMED
        yield from unequal(read(base / path), read(new / path), str(path), timed)


def read(path: Path) -> Any:
    """A file as values; lines of text with the folder of the side left out."""
    text = re.sub(r"/[^\s\"']*/(base|new)/", "/", path.read_text())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text) if path.suffix == ".json" else text.splitlines()


def unequal(base: Any, new: Any, where: str, timed: re.Pattern[str]) -> Iterator[str]:
    """A line for each value that differs, but those under names that `timed` finds."""
    if isinstance(base, Mapping) and isinstance(new, Mapping):
        for key in sorted({*base, *new}):
            if not timed.search(key):
                yield from unequal(base.get(key), new.get(key), f"{where}: {key}", timed)
    elif isinstance(base, list) and isinstance(new, list) and len(base) == len(new):
        for place, pair in enumerate(zip(base, new, strict=True)):
            yield from unequal(*pair, f"{where}[{place}]", timed)
    elif isinstance(base, float) or isinstance(new, float):
        numbers = isinstance(base, int | float) and isinstance(new, int | float)
        if not (numbers and math.isclose(base, new, rel_tol=TOLERANCE, abs_tol=TOLERANCE)):
            yield f"{where}: {base!r} before, {new!r} here"
    elif base != new:
        yield f"{where}: {shortened(base)} before, {shortened(new)} here"


def shortened(value: Any) -> str:
    """A value as it is told."""
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "…"


# --- Both sides ---------------------------------------------------------------------------------


def side(code: Path, *words: str) -> None:
    """Run this script with the package and the tests of a checkout."""
    paths = os.pathsep.join([str(code), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(Path(words[1]) / "compiled")}
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    subprocess.run(command, cwd=code, env=environment, check=True)


def compare(commit: str, names: list[str], work: Path) -> int:
    """Run both sides and print what differs; returns the exit status."""
    code = work / "checkout"
    subprocess.run(["git", "worktree", "add", "--detach", code, commit], cwd=ROOT, check=True)
    try:
        data = work / "data"
        data.mkdir()
        side(code, "--files", str(data))
        for name, checkout in (("base", code), ("new", ROOT)):
            side(checkout, "--side", str(data), str(work / name), *names)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", code], cwd=ROOT, check=True)
    found = list(differences(work / "base", work / "new"))
    print(*found, sep="\n")
    print(f"{len(found)} differences in {len(names)} cases: {', '.join(names)}")
    return 1 if found else 0


def main() -> int:
    """The command line; `--files` and `--side` are what it calls itself with."""
    if sys.argv[1:2] == ["--files"]:
        make_files(Path(sys.argv[2]))
        return 0
    if sys.argv[1:2] == ["--side"]:
        run_cases(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="what the working tree is compared with")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--keep", type=Path, help="an empty folder that keeps what both sides wrote"
    )
    given = parser.parse_args()
    unknown = [name for name in given.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as scratch:
        work = given.keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        return compare(given.commit, given.cases or list(CASES), work.resolve())


if __name__ == "__main__":
    sys.exit(main())
