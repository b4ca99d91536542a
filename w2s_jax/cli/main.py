"""The entry point `w2s`: finds the command, reads its flags, has its programs kept, tells errors.

A command is a frozen dataclass with a `run` method, in a module imported only when asked for. The
values of a config file become flags put before the user's own, so that the same rules check both.
"""

import dataclasses
import difflib
import gc
import hashlib
import importlib
import inspect
import os
import platform
import sys
import typing
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tyro.conf import UseAppendAction

import w2s_jax
from w2s_jax import distributed
from w2s_jax.cli.multihost_launch import Attempt, End, run_started, run_together
from w2s_jax.errors import Diverged, InputError, Preempted, Undivided

FLAG = "--config"

PRESETS = {"search": ("instruction_following", "sentiment", "summarization")}
"""Folders of published experiments, by the command that runs them."""


def find_config(flags: Sequence[str], *, folder: str) -> Path | None:
    """The file that `--config FILE` or `--config NAME` names in these flags; None without the flag.

    A name stands for `NAME.yaml` among the package's configs, in `folder` or, as FOLDER/NAME, in
    another.

    Raises:
        InputError: For a file or a name that is not there.
    """
    asked = None
    for place, flag in enumerate(flags):
        if flag == FLAG:
            asked = flags[place + 1] if place + 1 < len(flags) else None
        elif flag.startswith(f"{FLAG}="):
            asked = flag.removeprefix(f"{FLAG}=")
    if asked is None:
        return None
    if Path(asked).suffix in (".yaml", ".yml"):
        if not Path(asked).is_file():
            raise InputError(f"--config {asked}: no such file")
        return Path(asked)
    root = configs_folder()
    for named in (root / folder / f"{asked}.yaml", root / f"{asked}.yaml"):
        if named.is_file() and root in named.resolve().parents:
            return named
    known = ", ".join(_names(root, folder)) or "none"
    raise InputError(f"--config {asked}: neither a .yaml file nor one of the names: {known}")


def _names(root: Path, folder: str) -> list[str]:
    """Names of the configs for a command: those in its folder, then FOLDER/NAME of its presets."""
    own = sorted(path.stem for path in (root / folder).glob("*.yaml"))
    return own + sorted(
        f"{path.parent.name}/{path.stem}" for kind in PRESETS.get(folder, ())
        for path in (root / kind).glob("*.yaml")
    )  # fmt: skip


def configs_folder() -> Path:
    """Where the package's configs lie: inside it when installed, beside it in a checkout."""
    package = Path(w2s_jax.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_flags(source: Path, command: type[Any], flags: Sequence[str]) -> list[str]:
    """The flags a config file stands for, without those that `flags` gives itself.

    Keys are flag names in any spelling (`chunk_length`, `chunk-length`, `l`).

    Raises:
        InputError: For a file that is not YAML, is not a mapping or holds an unknown key.
    """
    from w2s_jax.text.typed_yaml import read_mapping

    return mapping_flags(read_mapping(source), str(source), command, flags)


def mapping_flags(
    values: Mapping[Any, Any], source: str, command: type[Any], flags: Sequence[str] = ()
) -> list[str]:
    """What `config_flags` gives, of a mapping; `source` says in errors where that stands."""
    names = flag_names(command)
    given = {names.get(_plain(flag)) for flag in flags if flag.startswith("--")}
    expanded: list[str] = []
    taken: dict[str, Any] = {}
    hints = typing.get_type_hints(command, include_extras=True)
    for key, value in values.items():
        field = names.get(_plain(str(key)))
        if field == "config" or _plain(str(key)).startswith("no-"):
            raise InputError(
                f"{source}: key {key!r} is for the command line; give a flag's own name"
            )
        if field is None:
            near = difflib.get_close_matches(_plain(str(key)), names, n=1)
            hint = f"; perhaps {near[0]}" if near else ""
            raise InputError(f"{source}: unknown key {key!r}{hint}")
        if field in taken:
            raise InputError(f"{source}: {key!r} and {taken[field]!r} set the same flag")
        taken[field] = key
        several = "tuple" in str(hints[field])
        if isinstance(value, dict) or (isinstance(value, list) and not several):
            raise InputError(f"{source}: {key!r} is a {type(value).__name__}; it takes one value")
        if field not in given and value is not None:
            expanded += _as_flags(field.replace("_", "-"), value)
    return expanded


def each_alone(command: type[Any], flags: Sequence[str]) -> list[str]:
    """The flags with each value of those that take several behind a flag of its own.

    `--data a b` is `--data a --data b`. The first value may look like a flag; others may not.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    names = flag_names(command)
    several = {
        field for field, hint in hints.items()
        if UseAppendAction in getattr(hint, "__metadata__", ())
    }  # fmt: skip
    found: list[str] = []
    current: str | None = None
    values = 0
    for flag in flags:
        if flag.startswith("--") and not (current and values == 0):
            current = flag.split("=")[0] if names.get(_plain(flag)) in several else None
            values = int("=" in flag)
        elif current:
            values += 1
            found += [current] * (values > 1)
        found.append(flag)
    return found


def flag_names(command: type[Any]) -> dict[str, str]:
    """Every spelling of a command's flags, without dashes before it, and the field it sets."""
    names: dict[str, str] = {}
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        aliases = [
            alias
            for note in getattr(hints[field.name], "__metadata__", ())
            for alias in getattr(note, "aliases", None) or ()
        ]
        for name in (field.name, f"no-{field.name}", *aliases):
            names[_plain(name)] = field.name
    return names


def _plain(flag: str) -> str:
    return flag.split("=")[0].lstrip("-").replace("_", "-")


def _as_flags(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [flag for item in value for flag in _as_flags(name, item)]
    return [f"--{name}={value}"]


# Words of a command: (module, class, one line of help).
COMMANDS: dict[tuple[str, ...], tuple[str, str, str]] = {
    ("demo",): ("demo", "Demo", "steer a small built-in model and show what it gains"),
    ("search",): ("search", "Search", "answer a file of prompts, steered by two small models"),
    ("sft",): ("train", "SFT", "fine-tune a model on texts, prompts with completions, or chats"),
    ("dpo",): ("train", "DPO", "tune a model on preferences: DPO, its relatives, KTO, WSPO"),
    ("reason",): ("reason", "Reason", "train a strong model on weak supervision that it can trust"),
    ("plot",): ("plot", "Plot", "draw the curves of training runs"),
    ("cache",): ("cache", "Cache", "show or delete the compiled programs kept for later runs"),
    ("convert",): ("convert", "Convert", "write a checkpoint anew: merge an adapter, change dtype"),
    ("eval",): ("evaluate", "Evaluate", "rewards of a file of responses, and who wins"),
    ("lm-eval",): ("lm_eval", "LMEval", "tasks of lm-evaluation-harness on a steered policy"),
    ("serve",): ("serve", "Serve", "answer OpenAI's API with a steered policy"),
    ("plan", "search"): ("plan", "PlanSearch", "compile a search for a TPU slice: does it fit?"),
    ("plan", "sft"): ("plan", "PlanSFT", "compile a step of sft for a TPU slice"),
    ("plan", "dpo"): ("plan", "PlanDPO", "compile a step of dpo for a TPU slice"),
    ("plan", "matrix"): ("plan", "PlanMatrix", "plan every chip, model size and work: one table"),
    ("bench", "search"): ("bench", "BenchSearch", "measure search on random weights"),
    ("bench", "generate"): ("bench", "BenchGenerate", "measure plain sampling on random weights"),
    ("bench", "train"): ("bench", "BenchTrain", "measure training on random weights, and TRL's"),
}

INTERRUPTED = 130
PREEMPTED = 75
"""A run was asked to stop and is saved: EX_TEMPFAIL, "run again"."""
FAILED = 1
WRONG_INPUT = 2
CACHE = "W2S_CACHE_DIR"
"""The folder of what may be made again; set to nothing, no programs are kept."""
FOLDER, LIMIT = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"
ENABLED = "JAX_ENABLE_COMPILATION_CACHE"
SETTINGS = {
    LIMIT: str(2 * 2**30),
    # A small program takes less time to compile than to find.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""jax's settings beside the folder of programs; those that the environment gives stay."""
NO_CACHE = "--no-cache"
"""Before the command: it keeps no compiled programs and uses none."""
COMPILES_ANEW = ("cache", "convert", "plot", "bench", "plan")
"""First words of commands that keep none: programs of absent machines cannot be read again."""
HEED_STOP = {("sft",), ("dpo",)}
"""Commands that save and end when SIGTERM comes."""


@typing.runtime_checkable
class Command(Protocol):
    """What every command is."""

    def run(self) -> None:
        """Do the work; raises InputError for wrong input."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    gc.set_threshold(5_000)  # Imports and tracing make many objects, of which few are in cycles.
    while args[:1] == [NO_CACHE]:
        args = args[1:]
        keep_none()
    if args == ["--version"]:
        print(f"w2s {w2s_jax.__version__}")
        return 0
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0 if args else WRONG_INPUT
    further = _further(args[0])
    if further and args[1:2] in (["-h"], ["--help"]):
        print(_overview_of(args[0], further))
        return 0
    try:
        command = parse(args)
        together = _hosts_of(command, _words(args))
        # Of several hosts one writes: a folder that they do not share would help it alone.
        shared = together is None or CACHE in os.environ
        if shared and args[0] not in COMPILES_ANEW and (note := keep_programs()):
            print(note, file=sys.stderr)
        if together is not None:
            return together(partial(_attempt, command))
        _run(command)
    except (Exception, KeyboardInterrupt) as error:
        end = _end(error)
        if end is None:
            raise
        print(end.line, file=sys.stderr)
        return end.status
    gc.freeze()  # Else the interpreter looks for cycles in all of it once more when it ends.
    return 0


def programs_folder() -> Path | None:
    """The folder of all machines' programs; None where none are kept.

    Raises:
        RuntimeError: Where nothing tells which folder is the user's home.
    """
    import platformdirs

    given = os.environ.get(CACHE)
    if given == "":
        return None
    found = platformdirs.user_cache_path("w2s_jax") if given is None else Path(given).expanduser()
    return found.absolute() / "programs"


def machine() -> str:
    """A name that machines share whose CPUs have the same instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    told = {line for line in lines if line.partition(":")[0].strip() in ("flags", "Features")}
    instructions = " ".join([platform.processor(), *sorted(told)])
    return f"{platform.machine()}-{hashlib.sha256(instructions.encode()).hexdigest()[:12]}"


def keep_programs() -> str | None:
    """Have jax keep the compiled programs of this process, and of those that it starts.

    jax holds its folder to a size and locks it; its keys are of the program, of jax, XLA and their
    flags, and of the kind of device. Which instructions a CPU has is not in them, so every kind of
    machine has a folder of its own. A folder that the environment names for jax is left alone.

    Returns:
        One line for the user, where none can be kept.
    """
    folder: Path | None = None
    try:
        folder = programs_folder()
        folder = folder and folder / machine()
        if folder is None or os.environ.get(FOLDER, str(folder)) != str(folder):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"0")
        probe.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        os.environ[CACHE] = ""
        why = getattr(error, "strerror", None) or str(error)
        place = f"{folder}: " if folder else ""
        return f"compiled programs are not kept: {place}{why} ({CACHE} names another folder)"
    given = {name: os.environ.get(name, value) for name, value in SETTINGS.items()}
    _configure(given | {FOLDER: str(folder)})
    _tell_faults_once()
    return None


def _configure(given: Mapping[str, str]) -> None:
    """Settings of jax, here and in processes started from here."""
    os.environ.update(given)
    if "jax" not in sys.modules:
        return
    import jax  # which has read the environment before

    kinds: dict[str, Any] = {FOLDER: str, ENABLED: lambda told: told == "true"}
    for name, value in given.items():
        kind = kinds.get(name, float if "SECS" in name else int)
        jax.config.update(name.lower(), kind(value))


def _tell_faults_once() -> None:
    """Have what jax warns of its cache be one line in all; it compiles then, as without one."""
    show = warnings.showwarning
    told: list[str] = []

    def showwarning(message: Any, *rest: Any, **named: Any) -> None:
        text = str(message).split("\n")[0]
        if "persistent compilation cache" not in text and not text.startswith("Cache value for"):
            show(message, *rest, **named)
        elif not told:
            told.append(text)
            line = f"compiled anew, or not kept for later runs: {text} (`w2s cache --clear` helps)"
            sys.stderr.write(f"{line}\n")

    warnings.showwarning = showwarning


def keep_none() -> None:
    """Keep no programs and use none, here and in processes started from here."""
    os.environ[CACHE] = ""
    _configure({ENABLED: "false"})


def _attempt(command: Command) -> End:
    """Run a command; raises what is a fault of the program."""
    try:
        _run(command)
    except (Exception, KeyboardInterrupt) as error:
        end = _end(error)
        if end is None:
            raise
        return end
    return End()


def _run(command: Command) -> None:
    """Run a command; its errors advise what its flags can do."""
    try:
        command.run()
    except Undivided as error:
        if hasattr(command, "policy_rules"):
            raise
        raise InputError(error.without_rules) from None


def _end(error: BaseException) -> End | None:
    """The status and the line that an exception ends with; None for a fault of the program."""
    if isinstance(error, InputError):
        return End(WRONG_INPUT, f"error: {error}")
    if isinstance(error, Preempted):
        return End(PREEMPTED, str(error), together=True)
    if isinstance(error, Diverged):
        return End(FAILED, f"error: {error}", together=True)
    if isinstance(error, KeyboardInterrupt):
        return End(INTERRUPTED, "interrupted")
    if isinstance(error, OSError | MemoryError | RuntimeError):
        told = _out_of_resources(error)
        return None if told is None else End(FAILED, f"error: {told}")
    return None


def _hosts_of(command: Command, words: tuple[str, ...]) -> Callable[[Attempt], int] | None:
    """What runs the command's attempt on several hosts; None on one.

    Raises InputError for a command that runs on one host and was started on several.
    """
    asked = getattr(command, "hosts", None)
    running = distributed.started()
    found = None
    if not running:
        # What runs on one host may run on one of a TPU slice's, so no slice is looked for.
        found = distributed.find_hosts(asked or "auto", slices=asked is not None)
    if not running and found is None:
        return None
    if asked is None:
        count = distributed.own_number()[1] if found is None else found.count
        raise InputError(
            f"w2s {' '.join(words)} runs on one host, and {count} were started; start it once"
        )
    if found is None:
        return run_started
    return partial(run_together, found, heeds_stop=words in HEED_STOP)


def _out_of_resources(error: Exception) -> str | None:
    """One line for what the machine could not do; None for a fault of the program."""
    first = str(error).strip().split("\n")[0]
    if isinstance(error, OSError):
        return f"{error.strerror or first}" + (f": {error.filename}" if error.filename else "")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first:
        return f"out of memory ({first[:200]}); try a smaller --batch-size or other sizes"
    return None


def parse(args: Sequence[str]) -> Command:
    """The command that a command line asks for, its config file under its flags.

    Raises:
        InputError: For an unknown command and a wrong config file.
        SystemExit: With status 2, after a message, where flags are wrong; with 0 after --help.
    """
    words = _words(args)
    module, name, _ = COMMANDS[words]
    command = getattr(importlib.import_module(f"w2s_jax.cli.{module}"), name)
    flags = each_alone(command, args[len(words) :])
    source = find_config(flags, folder="/".join(words)) if _takes_config(command) else None
    preset = config_flags(source, command, flags) if source else []
    return read_flags(command, [*preset, *flags], words)


def _words(args: Sequence[str]) -> tuple[str, ...]:
    for words in COMMANDS:
        if tuple(args[: len(words)]) == words:
            return words
    asked = [arg for arg in args[:2] if not arg.startswith("-")]
    further = ", ".join(map(" ".join, _further(args[0])))
    if further:
        raise InputError(f"{args[0]} is followed by another word: {further}")
    known = ", ".join(" ".join(words) for words in COMMANDS)
    raise InputError(f"unknown command {' '.join(asked)!r}; the commands are {known}")


def _further(word: str) -> list[tuple[str, ...]]:
    """The commands of several words that begin with this one."""
    return [words for words in COMMANDS if len(words) > 1 and words[0] == word]


def _takes_config(command: type) -> bool:
    return any(field.name == "config" for field in dataclasses.fields(command))


def read_flags(command: type[Any], flags: list[str], words: tuple[str, ...]) -> Command:
    """A command from its flags; exits as `parse` does."""
    import tyro

    about = inspect.cleandoc(command.__doc__ or "")
    read = tyro.cli(command, args=flags, prog=" ".join(("w2s", *words)), description=about)
    return typing.cast(Command, read)


def _overview() -> str:
    lines = _lines_of(COMMANDS)
    return "\n".join(
        [
            "usage: w2s COMMAND [flags]    (w2s COMMAND --help lists its flags)",
            "",
            "Weak-to-strong alignment: small tuned models steer large frozen ones.",
            "",
            *lines,
            "",
            "  --version   print the version",
            f"  {NO_CACHE}  before a command: keep no compiled programs and use none",
        ]
    )


def _overview_of(word: str, further: Sequence[tuple[str, ...]]) -> str:
    usage = f"usage: w2s {word} WORD [flags]    (w2s {word} WORD --help lists its flags)"
    return "\n".join([usage, "", *_lines_of(further)])


def _lines_of(commands: Collection[tuple[str, ...]]) -> list[str]:
    width = max(len(" ".join(words)) for words in commands)
    return [f"  {' '.join(words):{width}}  {COMMANDS[words][2]}" for words in commands]
