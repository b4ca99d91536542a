"""The models of a search: the policy and the guides that steer it, where they lie, how they load.

One mesh, with rules for the policy and rules for what steers it. Checkpoints may be adapters: what
several of them stand on is in memory once.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from w2s_jax.errors import InputError, check_kind
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.model import Model
from w2s_jax.models.quantize import is_quantized
from w2s_jax.ops.sharding import SEARCH_RULES, Rules
from w2s_jax.text.tokenizer import holds_tokenizer

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guide:
    """A tuned and an untuned model whose log-ratio is the implicit reward, and its weight.

    implicit reward(y|x) = log p_tuned(y|x) − log p_untuned(y|x); arXiv 2405.19262 eq. 5.
    """

    tuned: Model
    untuned: Model
    weight: float | Array = 1.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SearchModels:
    """A policy and any number of guides over one vocabulary."""

    policy: Model
    guides: tuple[Guide, ...]

    @property
    def members(self) -> tuple[Model, ...]:
        """Policy, tuned 0, untuned 0, tuned 1, ...: the order in which prompts are given."""
        return (self.policy, *(m for guide in self.guides for m in (guide.tuned, guide.untuned)))

    @property
    def member_names(self) -> tuple[str, ...]:
        """What to call the members in messages."""
        return member_names(len(self.guides))

    @property
    def sources(self) -> tuple[str, ...]:
        """Where logits come from, F of them: the members, then what a proposer mixes of them."""
        return (*self.member_names, "mixture of policy and guides")

    def at_fault(self, faults: Iterable[Any]) -> tuple[str, ...]:
        """The sources that [F] flags name; the mixture only where no member is at fault."""
        names = [name for name, flag in zip(self.sources, faults, strict=True) if flag]
        return tuple(names[:-1] if len(names) > 1 and names[-1] == self.sources[-1] else names)

    @property
    def vocabulary(self) -> int:
        """Token ids that every model knows; only these are proposed. Embeddings may be padded."""
        return min(model.config.vocab_size for model in self.members)

    def known_eos_ids(self, ids: tuple[int, ...] | None) -> tuple[int, ...]:
        """The token ids that end a response: these, or else the policy's, that all models know.

        Raises:
            InputError: Where there are such ids and none of them can be proposed.
        """
        ids = self.policy.config.eos_ids if ids is None else ids
        known = tuple(eos for eos in ids if 0 <= eos < self.vocabulary)
        if ids and not known:
            raise InputError(
                f"no EOS id of {ids} is among the {self.vocabulary} token ids that all models "
                "share; give others as eos_ids (() for none)"
            )
        return known

    def prompts_of_members(
        self, prompts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[str, Model, Sequence[int], int]]:
        """Each member's name, itself, its prompt, and the vocabulary that this is of.

        prompts: one for all members, or one each; behind a template of its own, a model may read
        tokens that only it knows.
        """
        shared = len(prompts) == 1
        own = [prompts[0]] * len(self.members) if shared else prompts
        for name, model, prompt in zip(self.member_names, self.members, own, strict=True):
            yield name, model, prompt, self.vocabulary if shared else model.config.vocab_size


def check_ids(tokens: Sequence[int], vocabulary: int, where: str) -> None:
    """Raise InputError, naming `where`, for a token id that is none of the vocabulary's."""
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise InputError(f"{where}: a token id lies outside the vocabulary of {vocabulary}")


def check_prompts_fit(
    models: SearchModels, prompts: Sequence[Sequence[int]], limit: int, where: str
) -> None:
    """Check that the models can search behind a prompt for all of them, or one each.

    Args:
        models: The policy and the guides.
        prompts: Token ids.
        limit: New tokens at most.
        where: What messages begin with.

    Raises:
        InputError: Where they cannot.
    """
    count, members = len(prompts), len(models.members)
    if count not in (1, members):
        raise InputError(f"{where}: {count} prompts for {members} models; give one each")
    for name, model, prompt, vocabulary in models.prompts_of_members(prompts):
        if not len(prompt):
            raise InputError(f"{where}: the prompt has no tokens; give at least one (BOS, say)")
        check_ids(prompt, vocabulary, where)
        positions = model.config.max_positions
        if len(prompt) + limit > positions:
            raise InputError(
                f"{where}: a prompt of {len(prompt)} tokens and {limit} new ones do not fit the "
                f"{name}'s {positions} positions; shorten it or lower max_new_tokens"
            )


def member_names(guides: int) -> tuple[str, ...]:
    """What to call the policy and the models of so many guides in messages."""
    if guides == 1:
        return ("policy", "tuned model", "untuned model")
    pairs = ((f"tuned model {i}", f"untuned model {i}") for i in range(guides))
    return ("policy", *(name for pair in pairs for name in pair))


def in_one_dtype(tuned: Model, untuned: Model) -> tuple[Model, Model]:
    """Both models in the wider of their dtypes; they are as they were where it is one.

    A log-ratio is small beside what rounding to bfloat16 does to a log-probability: where a tuned
    model is float32 and its untuned one bfloat16, the difference would be the rounding's.
    """
    wide = jnp.promote_types(tuned.dtype, untuned.dtype)
    pair = {"tuned": tuned, "untuned": untuned}
    for name, model in pair.items():
        if model.dtype != wide and not is_quantized(model.params):
            log.info("the %s model computes in %s, as the other of its guide does", name, wide)
            params = jax.tree.map(
                lambda x: x.astype(wide) if jnp.issubdtype(x.dtype, jnp.floating) else x,
                model.params,
            )
            pair[name] = replace(model, params=params)
    return pair["tuned"], pair["untuned"]


LARGEST_PADDING = 1024


def search_models(policy: Model, guides: Guide | Sequence[Guide] | None) -> SearchModels:
    """Bundle the models of a search, whose vocabularies must be one.

    Padding may make their sizes differ. Both models of a guide compute in one dtype
    (`in_one_dtype`). Whether the token maps are equal is for whoever holds the tokenizers to check
    (`text.tokenizer.same_vocabulary`).

    Raises:
        InputError: Where the sizes differ by more than padding does (1024), and for what is no
            model or guide.
    """
    if isinstance(guides, Model):
        raise InputError("a guide is Guide(tuned, untuned), not a model alone")
    chosen = (guides,) if isinstance(guides, Guide) else tuple(guides or ())
    for guide in chosen:
        if not isinstance(guide, Guide):
            raise InputError(f"a guide is Guide(tuned, untuned), not {type(guide).__name__}")
        check_kind("a guide's weight", guide.weight, float | Array | np.ndarray, "a number")
    members = (policy, *(model for guide in chosen for model in (guide.tuned, guide.untuned)))
    for name, model in zip(member_names(len(chosen)), members, strict=True):
        if not isinstance(model, Model):
            raise InputError(f"the {name} is what load_model gives, not {type(model).__name__}")
    for index, guide in enumerate(chosen):
        for role, model in (("tuned", guide.tuned), ("untuned", guide.untuned)):
            if abs(model.config.vocab_size - policy.config.vocab_size) > LARGEST_PADDING:
                raise InputError(
                    f"guide {index}: the {role} model has {model.config.vocab_size} logits, the "
                    f"policy {policy.config.vocab_size}; token-level guidance needs one vocabulary "
                    "(search.scorers.TextLogRatio reads texts in any)"
                )
    pairs = [in_one_dtype(guide.tuned, guide.untuned) for guide in chosen]
    alike = (Guide(*pair, guide.weight) for pair, guide in zip(pairs, chosen, strict=True))
    return SearchModels(policy, tuple(alike))


@dataclass(frozen=True)
class Places:
    """A mesh for all models, or one device; a large policy may be split otherwise than its guides.

    Attributes:
        policy, others: Rules of the policy, and of guides and reward models.
        stacked: Whether layers are stacked for a scan, so that programs of many layers compile
            quickly; None stacks them on a mesh of several devices.
    """

    mesh: Mesh | None = None
    policy: Rules = SEARCH_RULES
    others: Rules = SEARCH_RULES
    stacked: bool | None = None

    @property
    def scan_layers(self) -> bool:
        """Whether layers are stacked."""
        if self.stacked is not None:
            return self.stacked
        return self.mesh is not None and self.mesh.size > 1

    def notes(self, configs: Mapping[str, ModelConfig]) -> list[str]:
        """A line for each model of which every device holds all key/value heads."""
        lines = []
        for role, config in configs.items():
            rules = self.policy if role == "policy" else self.others
            if self.mesh is None:
                continue
            split = rules.targets("kv_heads", config.kv_heads, self.mesh.shape)
            if rules.mesh_axes("kv_heads") and not split:
                lines.append(
                    f"{role}: every device holds all {config.kv_heads} key/value heads, which are "
                    "fewer than the parts of the mesh"
                )
        return lines


ONE_DEVICE = Places()


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


def find_adapters(
    paths: Iterable[tuple[str, str]], folders: Mapping[str, str]
) -> dict[str, Adapted]:
    """Those of the checkpoints that are adapters, by path.

    Args:
        paths: Each with that of a guide's untuned model, where it is the tuned one, or "". The base
            of a tuned model that names one which is not here is its untuned model, where that is a
            folder.
        folders: Where the names of bases are.

    Raises:
        InputError: For a checkpoint that is not there and an adapter that names no base.
    """
    from w2s_jax.models.huggingface import is_adapter, locate
    from w2s_jax.models.peft import base_of

    found: dict[str, Adapted] = {}
    for path, beside in paths:
        if path in found or not is_adapter(locate(path)):
            continue
        named = base_of(path)
        place = folders.get(named, named)
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
    paths: Mapping[str, Rules], adapters: Mapping[str, Adapted], **options: Any
) -> dict[str, Model]:
    """Every checkpoint's model, by path; what several stand on is held in memory once.

    Each lies on the mesh by the rules that are given with its path; what several share, by those of
    the first one. An adapter whose base is used by nothing else, and float32, is merged into it,
    which computes faster; others keep their factors beside the arrays of the one base, as weights
    of fewer bits would lose most of what is added to them. `options` are those of `load_model`.

    Raises:
        InputError: For checkpoints that cannot be read and adapters for another base.
    """
    from w2s_jax.models.load import load_adapted, load_model

    users: dict[str, list[str]] = {}
    for path in paths:
        place = adapters[path].base if path in adapters else path
        users.setdefault(same_place(place), []).append(path)
    models: dict[str, Model] = {}
    mesh = options.get("mesh")
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
