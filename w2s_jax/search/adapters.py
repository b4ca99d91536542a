"""Checkpoints that are adapters: the base that each stands on, and every base loaded once.

Knows names and folders; what an adapter is belongs to `models/`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.models.model import Model
from w2s_jax.models.quantize import QuantizeConfig
from w2s_jax.ops.sharding import Rules
from w2s_jax.text.tokenizer import holds_tokenizer


@dataclass(frozen=True)
class Adapted:
    """What an adapter is put on, a folder or hub id, and for which other base that stands."""

    base: str
    stands_for: str | None = None

    def note(self, role: str, path: str, others: Iterable[str]) -> str:
        """A line that says on what the adapter is, given the checkpoints or bases of the rest."""
        told = f"{role} {path} is an adapter on {self.base}"
        if self.stands_for is not None:
            told += f" (it names {self.stands_for}, which is not here)"
        if same_place(self.base) in {same_place(other) for other in others}:
            return f"{told}, whose weights are held once"
        return f"{told}, on which nothing else stands"


def same_place(name: str) -> str:
    """One text for all names of a folder; a hub id as it is."""
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name


def find_adapters(checkpoints: Mapping[str, str], folders: Mapping[str, str]) -> dict[str, Adapted]:
    """Those of the checkpoints (path by role) that are adapters, by path.

    `folders` says where the names of bases are. The base of a tuned model that names one which is
    not here is its untuned model, where that is a folder.

    Raises InputError for a checkpoint that is not there and an adapter that names no base.
    """
    from w2s_jax.models.huggingface import is_adapter, locate
    from w2s_jax.models.lora_huggingface import base_of

    found: dict[str, Adapted] = {}
    # Untuned models first: they may stand for the bases of tuned ones.
    for role in sorted(checkpoints, key=lambda role: role.startswith("tuned")):
        path = checkpoints[role]
        if path in found or not is_adapter(locate(path)):
            continue
        named = base_of(path)
        place, beside = folders.get(named, named), checkpoints.get(f"un{role}", "")
        beside = found[beside].base if beside in found else beside
        here = Path(place).expanduser().is_dir()
        if here or place == beside or not (beside and Path(beside).expanduser().is_dir()):
            found[path] = Adapted(place)
        else:
            found[path] = Adapted(beside, stands_for=named)
    return found


def tokenizer_place(path: str, adapters: Mapping[str, Adapted]) -> str:
    """Where a checkpoint's tokenizer is: with it, or with the base of an adapter without one."""
    if path not in adapters or holds_tokenizer(path):
        return path
    return adapters[path].base


def load_decoders(
    paths: Mapping[str, Rules],
    adapters: Mapping[str, Adapted],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    quantize: QuantizeConfig | None = None,
) -> dict[str, Model]:
    """Every checkpoint's model, by path; what several stand on is held in memory once.

    Each lies on the mesh by the rules that are given with its path; what several share, by those of
    the first one. An adapter whose base is used by nothing else, and float32, is merged into it,
    which computes faster; others keep their factors beside the arrays of the one base, as weights
    of fewer bits would lose most of what is added to them.

    Raises InputError for checkpoints that cannot be read and adapters for another base.
    """
    from w2s_jax.models.load import load_adapted, load_model

    users: dict[str, list[str]] = {}
    for path in paths:
        place = adapters[path].base if path in adapters else path
        users.setdefault(same_place(place), []).append(path)
    models: dict[str, Model] = {}
    options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "scan_layers": scan_layers}
    options["quantize"] = quantize
    for place, together in users.items():
        try:
            base = load_model(place, rules=paths[together[0]], **options)
        except InputError as error:
            raise (error if place in str(error) else error.at(place)) from None
        merged = len(together) == 1 and base.dtype == "float32"
        for path in together:
            models[path] = base
            if path in adapters:
                rules = base.placement.rules
                models[path] = load_adapted(path, base, merged=merged, mesh=mesh, rules=rules)
    return models
