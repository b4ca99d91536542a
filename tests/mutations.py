"""Deliberate faults that the quick suite must catch: `python -m tests.mutations [NAME ...]`.

Each fault is made in a copy of the checkout's tracked files, where the tests that guard the place
then run. Ends with status 1 where a fault is not caught, or is none any more because the text that
it replaces is not there exactly once.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

SECONDS = 900


@dataclass(frozen=True)
class Fault:
    """`text`, which stands in `file` once, becomes `replacement`; `guards` are to notice.

    breaks: what is then wrong.
    """

    name: str
    file: str
    text: str
    replacement: str
    breaks: str
    guards: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a fault. tests: those that caught it; problem: why it could not be tried."""

    tests: tuple[str, ...]
    seconds: float
    problem: str = ""


FAULTS = (
    Fault(
        "ops-unscaled-part",
        "w2s_jax/ops/attention.py",
        "weighted = sum((factor[..., None] * partial.weighted for factor, partial in pairs), zero)",
        "weighted = sum((partial.weighted for factor, partial in pairs), zero)",
        "parts of the cache merge without the exponential of their maxima",
        ("tests/ops/test_attention.py",),
    ),
    Fault(
        "ops-wide-nucleus",
        "w2s_jax/ops/logits.py",
        "keep = (before < top_p).at[..., 0].set(True)",
        "keep = (probabilities + before < top_p).at[..., 0].set(True)",
        "top-p leaves out the token with which the mass is reached",
        ("tests/ops/test_logits.py",),
    ),
    Fault(
        "ops-wrong-shard-axis",
        "w2s_jax/ops/sharding.py",
        'embed="fsdp",\n',
        'embed="data",\n',
        "training splits the widths of weights over the axis of the data",
        ("tests/ops/test_sharding.py",),
    ),
    Fault(
        "models-mask-off-by-one",
        "w2s_jax/models/forward.py",
        "prefix = (index < cache.prefix_length[:, None])[:, None, None, :]",
        "prefix = (index <= cache.prefix_length[:, None])[:, None, None, :]",
        "tokens see one entry behind the prompt's prefix, which is arbitrary",
        ("tests/search/test_decode.py",),
    ),
    Fault(
        "models-stale-cache",
        "w2s_jax/models/cache.py",
        "committed = _follow(committed, parents, jnp.max(lengths))",
        "committed = jax.tree.map(lambda held: held, committed)",
        "after selection a hypothesis keeps the cache of its place, not of its parent",
        ("tests/search/test_oracle.py",),
    ),
    Fault(
        "models-unmapped-tensor",
        "w2s_jax/models/load.py",
        "tensors.keys() - shapes.keys(),",
        "frozenset[str](),",
        "a tensor that no parameter asks for is left out in silence",
        ("tests/models/test_huggingface.py",),
    ),
    Fault(
        "search-unscored-eos",
        "w2s_jax/search/step.py",
        "counts = (positions < proposal.lengths[..., None])[..., None]",
        "counts = (positions < (proposal.lengths - proposal.finished)[..., None])[..., None]",
        "the score of a finished response leaves out its EOS",
        ("tests/search/test_oracle.py",),
    ),
    Fault(
        "search-dropped-beta",
        "w2s_jax/search/methods.py",
        "steer = jnp.where(jnp.isfinite(ratio), beta * guide.weight * ratio, -jnp.inf)",
        "steer = jnp.where(jnp.isfinite(ratio), guide.weight * ratio, -jnp.inf)",
        "emulated fine-tuning is at its full strength whatever β is",
        ("tests/search/test_guidance.py",),
    ),
    Fault(
        "search-late-stop",
        "w2s_jax/search/results.py",
        "    return bisect_left(range(len(tokens)), True, key=holds)\n",
        "    return bisect_left(range(len(tokens)), True, key=holds) + 1\n",
        "a stop string leaves one token of its own in the response",
        ("tests/search/test_run.py",),
    ),
    Fault(
        "text-lost-row",
        "w2s_jax/text/rows.py",
        "                file.truncate(end)\n",
        "                pass\n",
        "a half-written last line stays, and takes the next finished row with it",
        ("tests/text/test_journal.py",),
    ),
    Fault(
        "text-second-bos",
        "w2s_jax/text/prompts.py",
        "special = not (bos and prompt.startswith(bos))",
        "special = True",
        "a prompt that begins with BOS gets another one",
        ("tests/text/test_prompts.py",),
    ),
    Fault(
        "text-untrained-first-token",
        "w2s_jax/text/supervised.py",
        '(1 if loss == "all" else max(border, 1))',
        '(1 if loss == "all" else max(border + 1, 1))',
        "the first token of a response is no target",
        ("tests/text/test_training_data.py",),
    ),
    Fault(
        "train-wrong-mean",
        "w2s_jax/train/objectives.py",
        "return -total, count, metrics",
        "return -total, jnp.float32(len(targets)), metrics",
        "micro-batches of SFT count by rows and not by targets",
        ("tests/train/test_objectives.py",),
    ),
    Fault(
        "train-wrong-sign",
        "w2s_jax/train/losses.py",
        "jnp.where(labels, -rewards, rewards)",
        "jnp.where(labels, rewards, -rewards)",
        "KTO pushes desirable responses down",
        ("tests/train/test_losses_trl.py",),
    ),
    Fault(
        "train-unchecked-bytes",
        "w2s_jax/train/checkpoint.py",
        "if _checksum(path) != checksum:",
        "if not _checksum(path):",
        "a checkpoint with flipped bytes is restored as if it were sound",
        ("tests/train/test_checkpoint.py",),
    ),
    Fault(
        "serve-lost-piece",
        "w2s_jax/serve/app.py",
        "rest = choice.text[len(sent[index]) :]",
        'rest = ""',
        "a stream ends without the text that settled last",
        ("tests/serve/test_app.py",),
    ),
    Fault(
        "serve-leaked-stop",
        "w2s_jax/serve/answers.py",
        "longest = max(map(len, stop), default=1) - 1",
        "longest = max(map(len, stop), default=1) - 2",
        "a stream shows a stop string but for its last character",
        ("tests/serve/test_answers.py",),
    ),
    Fault(
        "serve-shared-lanes",
        "w2s_jax/serve/jobs.py",
        'given + index * body.n if name == "lane" else given',
        'given + index if name == "lane" else given',
        "samples of two prompts of one request share their draws",
        ("tests/serve/test_jobs.py",),
    ),
    Fault(
        "reasoning-moved-threshold",
        "w2s_jax/reasoning/selection.py",
        "sure = confidence >= config.overrule_confidence",
        "sure = confidence > config.overrule_confidence",
        "a confidence of exactly the threshold no longer overrules the weak response",
        ("tests/reasoning/test_selection.py",),
    ),
    Fault(
        "reasoning-agreed-silence",
        "w2s_jax/reasoning/selection.py",
        "if first == second and (first or empty))",
        "if first == second)",
        "stage I keeps questions on which both models give no answer",
        ("tests/reasoning/test_selection.py",),
    ),
    Fault(
        "reasoning-whole-ties",
        "w2s_jax/reasoning/measures.py",
        " * so_far / total / (ties + 1)",
        " * so_far / total",
        "majority@k counts a tied vote as won by each of its answers",
        ("tests/reasoning/test_measures.py",),
    ),
)


def tried(fault: Fault, *, every: bool) -> Outcome:
    """The first of the guarding tests that catches a fault, or every one."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="w2s-mutation-") as folder:
        copy = Path(folder) / ROOT.name
        copy_tracked(copy)
        path = copy / fault.file
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := source.count(fault.text)) != 1:
            return Outcome((), 0.0, f"its text stands {count} times in {fault.file}, not once")
        path.write_text(source.replace(fault.text, fault.replacement), encoding="utf-8")
        status, output = tested(copy, fault.guards, every=every)
    tests = tuple(dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) (\S+?::\w+)", output, re.MULTILINE)))
    problem = ""
    if status not in (0, 1):
        problem = f"pytest ended with status {status}: {output.strip()[-300:]}"
    return Outcome(tests, time.monotonic() - started, problem)


def copy_tracked(target: Path) -> None:
    """Copy the files that git tracks, as they stand in the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, place = ROOT / name, target / name
        if source.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)


def tested(copy: Path, guards: tuple[str, ...], *, every: bool) -> tuple[int, str]:
    """pytest's status and output on the guarding files of a copy, in one process."""
    env = os.environ | {"PYTHONPATH": str(copy)}
    # What the fault leaves as it is was compiled before.
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "programs"))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--tb=no"]
    done = subprocess.run(
        [*command, *([] if every else ["-x"]), *guards],
        cwd=copy,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


def main() -> int:
    """Try the faults that are named, all by default, and print what became of each."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    names = [fault.name for fault in FAULTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--all", action="store_true", help="name all tests that catch a fault")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(names):
        parser.error(f"no fault is named {', '.join(sorted(unknown))}")
    escaped = 0
    for fault in FAULTS:
        if asked.names and fault.name not in asked.names:
            continue
        outcome = tried(fault, every=asked.all)
        is_caught = bool(outcome.tests) and not outcome.problem
        escaped += not is_caught
        told = "caught" if is_caught else "NOT CAUGHT"
        print(f"{fault.name:28} {told:10} {outcome.seconds:5.0f} s  {fault.breaks}", flush=True)
        for line in (*outcome.tests, *([outcome.problem] if outcome.problem else [])):
            print(f"    {line}", flush=True)
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
