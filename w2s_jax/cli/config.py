"""Config files: YAML values of a command's flags, which flags on the command line override.

A file becomes flags put before the user's own, so that both are checked by the same rules.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tyro.conf import UseAppendAction

import w2s_jax
from w2s_jax.errors import InputError
from w2s_jax.text.typed_yaml import read_mapping

FLAG = "--config"

PRESETS = {"search": ("instruction_following", "sentiment", "summarization")}
"""Folders of published experiments, by the command that runs them."""


def find_config(flags: Sequence[str], *, folder: str) -> Path | None:
    """The file that `--config FILE` or `--config NAME` names in these flags; None without the flag.

    A name stands for `NAME.yaml` among the package's configs, in `folder` or, as FOLDER/NAME, in
    another. Raises InputError for a file or a name that is not there.
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

    Keys are flag names in any spelling (`chunk_length`, `chunk-length`, `l`). Raises InputError for
    a file that is not YAML, is not a mapping or holds an unknown key.
    """
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
