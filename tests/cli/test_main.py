import dataclasses
import importlib
import typing

import pytest
from tyro.conf import Positional

import w2s_jax
from w2s_jax.cli.main import COMMANDS, each_alone, main, parse
from w2s_jax.errors import InputError

SEARCH = ["search", "--policy", "P", "--prompts", "in.jsonl", "--output", "out.jsonl"]


def test_version_and_overview(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"w2s {w2s_jax.__version__}\n"
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for words in COMMANDS:
        assert " ".join(words) in overview
    assert main([]) == 2


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("word", ["plan", "bench"])
def test_help_of_a_word_lists_those_that_follow(word, flag, capsys):
    assert main([word, flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"usage: w2s {word} WORD [flags]")
    for words, (_, _, about) in COMMANDS.items():
        assert (f"  {' '.join(words)} " in out and about in out) == (words[0] == word)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_help_for_every_flag(words, capsys):
    module, name, _ = COMMANDS[words]
    command = getattr(importlib.import_module(f"w2s_jax.cli.{module}"), name)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        notes = getattr(hints[field.name], "__metadata__", ())
        named = next((note.name for note in notes if getattr(note, "name", None)), field.name)
        wanted = f"--{named.replace('_', '-')}"
        if Positional in notes:
            wanted = next(note.metavar for note in notes if hasattr(note, "metavar"))
        assert wanted in text
    assert command.__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["srch"], "unknown command 'srch'; the commands are demo, search, sft, dpo, reason,"),
        (["bench"], "bench is followed by another word: bench search, bench generate, bench train"),
        (
            ["bench", "--repeats", "2"],
            "bench is followed by another word: bench search, bench generate, bench train",
        ),
        (["bench", "train", "--shape", "llama-9b"], "--shape llama-9b: no such shape; known are"),
        ([*SEARCH, "--config", "none.yaml"], "--config none.yaml: no such file"),
        ([*SEARCH, "--w", "0"], "--w is 0; it must be at least 1"),
        ([*SEARCH, "--method", "sample", "--seed", "-1"], "seed is -1"),
        ([*SEARCH, "--method", "sample", "--temperature", "inf"], "temperature is inf"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(args, problem, capsys):
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {problem}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("args", [["search"], [*SEARCH, "--w", "four"], [*SEARCH, "--beem", "3"]])
def test_wrong_flags_exit_with_status_2(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    from w2s_jax.cli.search import Search

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "run", interrupted)
    assert main(SEARCH) == 130
    assert "interrupted" in capsys.readouterr().err


def test_short_and_long_flags_are_the_same():
    short = parse([*SEARCH, "--w", "2", "--k", "3", "--l", "7", "--n", "9"])
    long = ["--beam-width", "2", "--successors", "3", "--chunk-length", "7", "--samples", "9"]
    assert parse([*SEARCH, *long]) == short
    assert dataclasses.asdict(short)["chunk_length"] == 7


def test_a_flag_takes_several_values():
    from w2s_jax.cli.train import SFT

    flags = [
        "--data",
        "a[1].jsonl",
        "b.jsonl",
        "--lora-targets=q_proj",
        "v_proj",
        "--lora-rank",
        "2",
    ]
    assert each_alone(SFT, flags) == [
        "--data", "a[1].jsonl", "--data", "b.jsonl",
        "--lora-targets=q_proj", "--lora-targets", "v_proj", "--lora-rank", "2",
    ]  # fmt: skip


@pytest.mark.parametrize("spelling", ["w: 2", "beam_width: 2", "beam-width: 2"])
def test_a_config_file_gives_values_and_flags_override_them(tmp_path, spelling):
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"{spelling}\nl: 7\nstop: [\"\\n\", '--x']\nreference_quirks: true\ntemperature: 1\n"
        "policy: from-file\ntuned: null\n"
    )
    command = parse([*SEARCH, "--config", str(file), "--chunk-length", "9"])
    assert command.beam_width == 2
    assert command.chunk_length == 9
    assert command.stop == ("\n", "--x")
    assert command.reference_quirks is True
    assert command.temperature == 1.0
    assert command.policy == "P"
    assert command.tuned == ()

    command = parse(
        [*SEARCH, f"--config={file}", "--stop", "END", "--no-reference-quirks", "--w=5"]
    )
    assert command.stop == ("END",)
    assert command.reference_quirks is False
    assert command.beam_width == 5


def test_a_config_file_may_give_required_flags(tmp_path):
    file = tmp_path / "all.yaml"
    file.write_text("policy: P\nprompts: in.jsonl\noutput: out.jsonl\n")
    assert parse(["search", "--config", str(file)]) == dataclasses.replace(
        parse(SEARCH), config=str(file)
    )


def test_built_in_configs_are_found_by_name():
    command = parse([*SEARCH, "--config", "cbs-instructions"])
    assert (command.beam_width, command.successors, command.chunk_length) == (2, 2, 30)
    assert command.max_new_tokens == 2048


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("w: [", "not YAML"),
        ("- w\n", "not a mapping"),
        ("", "not a mapping"),
        ("beam_widht: 3\n", "unknown key 'beam_widht'; perhaps beam-width"),
        ("no-reference-quirks: true", "is for the command line"),
        ("config: other.yaml", "is for the command line"),
        ("w: [1, 2]", "'w' is a list; it takes one value"),
        ("stop: {a: b}", "'stop' is a dict; it takes one value"),
        ("w: 1\nbeam-width: 2", "'beam-width' and 'w' set the same flag"),
    ],
)
def test_wrong_config_files(tmp_path, content, problem):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=problem) as error:
        parse([*SEARCH, "--config", str(file)])
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_an_unknown_config_name_lists_the_known_ones():
    with pytest.raises(InputError, match="names: .*cbs-sentiment"):
        parse([*SEARCH, "--config", "nonsense"])


QUICK = """
import sys
from w2s_jax.cli.main import main
try:
    main(["search", "--help"])
except SystemExit:
    pass
main(["--version"])
heavy = {"jax", "flax", "transformers", "numpy", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_loads_nothing_heavy(run_python):
    run_python(QUICK)


def test_the_module_is_the_command(run_python):
    code = "import runpy, sys; sys.argv = ['w2s', '--version']; runpy.run_module('w2s_jax')"
    assert run_python(
        f"try:\n    {code}\nexcept SystemExit as stop:\n    assert not stop.code"
    ) == (f"w2s {w2s_jax.__version__}\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "out.jsonl"), "No space left on device: out.jsonl"),
        (MemoryError("3 TB"), "out of memory (3 TB); try a smaller --batch-size or other sizes"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 TB"), "out of memory (RESOURCE_EXHAUSTED: 3 TB)"),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(monkeypatch, capsys, error, line):
    def fail(args):
        raise error

    monkeypatch.setattr("w2s_jax.cli.main.parse", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    def fail(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("w2s_jax.cli.main.parse", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["demo"])
