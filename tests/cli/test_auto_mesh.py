"""`--mesh auto` of the commands, on eight virtual devices: what is chosen, and what is said."""

import pytest

from tests.cli.test_search import PROMPTS, SMALL, tiny
from tests.cli.test_training import PAIRS
from tests.models.test_reward import tiny_reward_model
from w2s_jax.models.save import save_reward_model
from w2s_jax.text.rows import read_jsonl, write_jsonl
from w2s_jax.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
SHAPE = {"width": 32, "layers": 1, "heads": 8, "kv_heads": 4, "head_width": 8, "mlp_width": 64,
         "vocab_size": 304}  # fmt: skip

# Runs commands one after the other; shows their statuses, lines on stderr, and leaves' shardings.
RUN = """
import contextlib, io, sys
from w2s_jax.cli.main import main
for words in {!r}:
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = main(words)
    lines = [line for line in told.getvalue().splitlines() if "mesh" in line or "error" in line]
    print("STATUS", status, *lines, sep="|")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints policy, tuned, untuned, odd (two heads), and files of prompts and pairs."""
    place = tmp_path_factory.mktemp("auto")
    for seed, name in enumerate(("policy", "tuned", "untuned")):
        tiny(place / name, seed, **SHAPE)
    tiny(place / "odd", 3, **SHAPE | {"heads": 2, "kv_heads": 1, "mlp_width": 30})
    write_jsonl(place / "in.jsonl", PROMPTS)
    write_jsonl(place / "pairs.jsonl", PAIRS)
    return place


def search(folder, output, *flags, policy="policy"):
    return [
        "search", f"--policy={folder / policy}", f"--tuned={folder / 'tuned'}",
        f"--untuned={folder / 'untuned'}", f"--prompts={folder / 'in.jsonl'}",
        f"--output={output}", *SMALL, "--batch-size=8", *flags,
    ]  # fmt: skip


def train(command, folder, output, *flags):
    return [
        command, f"--model={folder / 'policy'}", f"--data={folder / 'pairs.jsonl'}",
        f"--output={output}", "--batch-size=8", "--max-length=32", "--max-steps=2", *flags,
    ]  # fmt: skip


def told(out):
    return [line.split("|")[1:] for line in out.splitlines() if line.startswith("STATUS")]


def run(run_python, commands, devices=8):
    return told(run_python(RUN.format(commands), devices=devices))


def test_searches_choose_what_divides_every_model_and_the_batch(folder, tmp_path, run_python):
    out = tmp_path / "{}.jsonl"
    commands = [
        search(folder, str(out).format(0), "--mesh=auto"),
        search(folder, str(out).format(1), "--mesh=auto", policy="odd"),
        search(folder, str(out).format(2), "--mesh=auto", "--batch-size=3"),
        search(folder, str(out).format(3), "--mesh=auto", "--batch-size=3", policy="odd"),
        search(folder, str(out).format(4)),
    ]
    found = run(run_python, commands)
    assert [one[0] for one in found] == ["0", "0", "0", "2", "0"]
    lines = [one[1] for one in found]
    for line in lines[:3]:
        assert line.startswith("--mesh auto: ")
        assert line.endswith(", for 8 devices (cpu)")
    # Two heads and 30 MLP units are in two tensor parts at most, three rows in no even ones.
    assert "tensor=4" not in lines[1]
    assert "tensor=8" not in lines[1]
    assert lines[2] == "--mesh auto: tensor=8, for 8 devices (cpu)"
    assert lines[3].startswith("error: --mesh auto, 8 devices: no mesh: --batch-size 3 is not div")
    # A mesh changes no response.
    alone = read_jsonl(str(out).format(4))
    for number in (0, 2):
        split = read_jsonl(str(out).format(number))
        assert [row["response"] for row in split] == [row["response"] for row in alone]


def test_guides_on_text_a_reward_model_and_no_guide(folder, tmp_path, run_python):
    judge = tiny_reward_model(vocab_size=304, heads=2, kv_heads=1, mlp_width=30)
    save_reward_model(judge, tmp_path / "judge", tokenizer=load_tokenizer(folder / "policy"))
    guide = [f"--tuned={folder / 'odd'}", f"--untuned={folder / 'odd'}", "--score-on=text"]
    commands = [
        search(folder, tmp_path / "0.jsonl", "--mesh=auto", *guide),
        search(folder, tmp_path / "1.jsonl", "--mesh=auto", "--method=sample"),
        search(folder, tmp_path / "2.jsonl", "--mesh=auto", "--method=eft"),
        search(folder, tmp_path / "3.jsonl", "--mesh=auto", f"--reward-model={tmp_path}/judge"),
    ]
    found = run(run_python, commands)
    assert [one[0] for one in found] == ["0"] * 4
    assert all(one[1].startswith("--mesh auto: ") for one in found)
    # Two heads are in two tensor parts at most.
    for one in (found[0], found[3]):
        assert "tensor=4" not in one[1]
        assert "tensor=8" not in one[1]


SERVED = """
import sys
from w2s_jax.cli.serve import Serve
from w2s_jax.errors import InputError
from w2s_jax.serve.run import load
sys.stderr = sys.stdout
policy, tuned, untuned = {!r}
models = dict(policy=policy, tuned=(tuned,), untuned=(untuned,), mesh="auto")
server = Serve(**models, slots=4)
_, mesh, _ = load(server, server.choose_mesh)
assert mesh.size == 8 and mesh.shape["data"] * mesh.shape["fsdp"] in (1, 2, 4), mesh
try:
    server = Serve(**models | dict(policy={!r}), slots=3)
    load(server, server.choose_mesh)
except InputError as error:
    print(error)
"""


def test_a_server_chooses_by_its_slots(folder, run_python):
    names = [str(folder / name) for name in ("policy", "tuned", "untuned")]
    chosen, refused = run_python(SERVED.format(names, str(folder / "odd")), devices=8).splitlines()
    assert chosen.startswith("--mesh auto: ")
    assert refused.startswith("--mesh auto, 8 devices: no mesh: --slots 3 is not divisible by 8")


def test_trainings_choose_and_a_resumed_run_says_what_it_had(folder, tmp_path, run_python):
    sft = train("sft", folder, tmp_path / "sft", "--mesh=auto")
    commands = [
        train("sft", folder, tmp_path / "none", "--mesh=auto", "--estimate"),
        sft,
        [*sft, "--max-steps=2", "--save-every=1"],
        train("dpo", folder, tmp_path / "dpo", "--mesh=auto", "--lora-rank=4",
              f"--reference={folder / 'odd'}", "--eval-batch-size=4"),
    ]  # fmt: skip
    found = run(run_python, commands)
    assert [one[0] for one in found] == ["0"] * 4
    first, again = found[0][1], found[2][1]
    assert first == found[1][1] == again
    assert not (tmp_path / "none" / "mesh.txt").exists()
    mesh = first.removeprefix("--mesh auto: ")
    assert (tmp_path / "sft" / "mesh.txt").read_text() == f"{mesh}\n"
    # The reference has two heads; an evaluation's batch is cut into four parts at most.
    assert "tensor=4" not in found[3][1]
    assert "tensor=8" not in found[3][1]
    assert "data=8" not in found[3][1]
    other, alone = run(run_python, [sft], devices=2), run(run_python, [sft], devices=1)
    assert [one[0] for one in (*other, *alone)] == ["0", "0"]
    assert other[0][1].endswith(f", for 2 devices (cpu); the run before had {mesh}")
    assert alone[0][1].startswith("--mesh auto: data=1, for one device (cpu); the run before had ")
    named = [argument.replace("--mesh=auto", "--mesh=fsdp=2") for argument in sft]
    (tmp_path / "sft" / "mesh.txt").write_bytes(b"\xff\xfe")
    told = run(run_python, [sft, named, sft], devices=2)
    assert [one[0] for one in told] == ["0"] * 3
    assert told[0][1].endswith("; the run before had \ufffd\ufffd")
    assert told[2][1].endswith("; the run before had fsdp=2, for 2 devices (cpu)")
