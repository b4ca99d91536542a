"""From names of checkpoints to a policy and what steers it, each model with its own chat template.

`plan` reads tokenizers and configs only, so that errors are raised before `load` reads weights.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.quantize import QuantizeConfig
from w2s_jax.search.models import (
    ONE_DEVICE,
    Adapted,
    Guide,
    Places,
    SearchModels,
    find_adapters,
    load_decoders,
    search_models,
    tokenizer_place,
)
from w2s_jax.search.scorers import RewardScorer, TextLogRatio, TextModel, TextScorer
from w2s_jax.text.chat import Template, load_template
from w2s_jax.text.prompts import Conversation
from w2s_jax.text.tokenizer import load_tokenizer, same_vocabulary, tell_left_out
from w2s_jax.text.typed_yaml import read_mapping

Number = float | int


@dataclass(frozen=True)
class GuideSource:
    """Checkpoints of a guide's tuned and untuned model, its weight, and their templates."""

    tuned: str
    untuned: str
    weight: Number = 1.0
    tuned_template: str = "auto"
    untuned_template: str = "auto"


@dataclass(frozen=True)
class RewardSource:
    """A reward model.

    Attributes:
        path: Its checkpoint.
        weight: What its rewards are multiplied by.
        template: Its chat template.
        label: The label whose logit is the reward, where it has more than two.
    """

    path: str
    weight: Number = 1.0
    template: str = "auto"
    label: str | int | None = None


@dataclass(frozen=True)
class Sources:
    """The models of a search by name: a folder, a Hugging Face id, or a name in `folders`.

    Attributes:
        policy: None where it is behind an API.
        guides: Pairs of models.
        rewards: Reward models.
        policy_template: The policy's chat template.
        score_on: "tokens" has guides score the policy's tokens, on the device; "text" has them
            encode responses anew; "auto" is "tokens" for every guide with the policy's vocabulary.
        folders: Where checkpoints of these names are.
        quantize: How the policy's weights are quantised, None for not at all. Guides never are,
            since a log-ratio is a small difference.
        template_args: Values for all chat templates.
    """

    policy: str | None
    guides: tuple[GuideSource, ...] = ()
    rewards: tuple[RewardSource, ...] = ()
    policy_template: str = "auto"
    score_on: str = "auto"
    folders: Mapping[str, str] = field(default_factory=dict)
    quantize: QuantizeConfig | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def guide_roles(self) -> tuple[tuple[str, str], ...]:
        """The roles of each guide's tuned and untuned model, as used in messages."""
        return tuple((f"tuned{mark}", f"untuned{mark}") for mark in _marks(self.guides))

    @property
    def named(self) -> dict[str, tuple[str, str, str]]:
        """Every model's name, template, and the flag that sets the template, by its role."""
        found = {}
        if self.policy is not None:
            found["policy"] = (self.policy, self.policy_template, "--policy-template")
        for guide, (up, down) in zip(self.guides, self.guide_roles, strict=True):
            found[up] = (guide.tuned, guide.tuned_template, "--guide-template")
            found[down] = (guide.untuned, guide.untuned_template, "--guide-template")
        for reward, mark in zip(self.rewards, _marks(self.rewards), strict=True):
            found[f"reward-model{mark}"] = (reward.path, reward.template, "--reward-template")
        return found

    @property
    def checkpoints(self) -> dict[str, str]:
        """The folder or hub id of every checkpoint, by its role."""
        return {role: self.folders.get(name, name) for role, (name, _, _) in self.named.items()}


def _marks(items: Sequence[Any]) -> list[str]:
    """Suffixes that tell the items apart in names: none for a single one, else their numbers."""
    return [""] if len(items) == 1 else [f" {index}" for index in range(len(items))]


@dataclass(frozen=True)
class ModelPlan:
    """A checkpoint whose tokenizer and config have been read.

    Attributes:
        role: Its key in `Sources.checkpoints`.
        called: Its kind and path, for messages.
        path: Its folder or hub id.
        template: The chat template that it reads conversations with.
        config: None for reward models, whose heads are read with their weights.
    """

    role: str
    called: str
    path: str
    template: Template
    config: ModelConfig | None = None


@dataclass(frozen=True)
class GuidePlan:
    """A guide's two models, and whether it scores the policy's tokens on the device."""

    source: GuideSource
    tuned: ModelPlan
    untuned: ModelPlan
    on_device: bool

    @property
    def models(self) -> tuple[ModelPlan, ModelPlan]:
        """Tuned and untuned, the order in which a search reads them."""
        return (self.tuned, self.untuned)


@dataclass(frozen=True)
class SteeringPlan:
    """Sources whose tokenizers, templates and configs have been read; no weights are loaded yet.

    Attributes:
        sources: What was planned.
        policy: None where it is behind an API.
        guides: In the order of the sources.
        rewards: In the order of the sources.
        adapters: The checkpoints that are adapters, by path.
    """

    sources: Sources
    policy: ModelPlan | None
    guides: tuple[GuidePlan, ...]
    rewards: tuple[ModelPlan, ...] = ()
    adapters: Mapping[str, Adapted] = field(default_factory=dict)

    @property
    def models(self) -> tuple[ModelPlan, ...]:
        """All models: policy, tuned 0, untuned 0, ..., reward models."""
        guides = (model for guide in self.guides for model in guide.models)
        return (*((self.policy,) if self.policy else ()), *guides, *self.rewards)

    @property
    def members(self) -> tuple[ModelPlan, ...]:
        """The models that read the policy's tokens, in the order of their prompts."""
        assert self.policy is not None
        guides = (model for guide in self.guides if guide.on_device for model in guide.models)
        return (self.policy, *guides)

    @property
    def templates(self) -> dict[str, Template]:
        """The template of each model, by its role."""
        return {model.role: model.template for model in self.models}

    @property
    def configs(self) -> dict[str, ModelConfig]:
        """The configs of the policy and of the guides' models, by role."""
        return {model.role: model.config for model in self.models if model.config is not None}

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self.members[0].template.tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a response: the policy's EOS ids and its template's end of a turn."""
        policy = self.members[0]
        assert policy.config is not None
        return ending_ids(policy.config, policy.template)

    def notes(self) -> list[str]:
        """Lines for the user.

        They say where each guide scores and why, which values for chat templates no template reads,
        how the policy is quantised, and which base each adapter is on.
        """
        lines = []
        for guide, mark in zip(self.guides, _marks(self.guides), strict=True):
            name = f"guide{mark}" if mark else "the guide"
            if guide.on_device:
                lines.append(f"{name} scores tokens on the device: its vocabulary is the policy's")
                continue
            why = "as asked"
            if self.policy is None:
                why = "the policy gives text only"
            elif self.sources.score_on == "auto":
                pair = f"{guide.source.tuned} or {guide.source.untuned}"
                why = f"{pair} does not have the policy's vocabulary"
            lines.append(f"{name} scores texts, encoded anew behind its own template: {why}")
        if self.policy is not None:  # whose template is not here behind an API
            lines += [
                f"no chat template here reads {name!r}, which is given to all of them"
                for name in self.sources.template_args
                if not any(model.template.reads(name) for model in self.models)
            ]
        if self.sources.quantize is not None:
            lines.append(f"the policy's weights are read as {self.sources.quantize}")
        return lines + [self._adapter_note(path) for path in self.adapters]

    def _adapter_note(self, path: str) -> str:
        adapted = self.adapters[path]
        model = next(model for model in self.models if model.path == path)
        if model is self.policy and self.sources.quantize is not None:
            return f"policy {path} is an adapter beside {adapted.base}, quantised"
        rest = {one.path for one in self.models if one.config and model.config} - {path}
        on = [self.adapters[other].base if other in self.adapters else other for other in rest]
        return adapted.note(model.role, path, on)

    def prompts(self, conversation: Conversation) -> tuple[tuple[int, ...], ...]:
        """Encode a conversation for the models that read tokens.

        Returns:
            Token ids: one sequence where all models read the same, else one for each.

        Raises:
            InputError: Where a template fails.
        """
        read = [tuple(model.template.encode(conversation)) for model in self.members]
        return (read[0],) if all(one == read[0] for one in read) else tuple(read)

    def check_length(self, conversation: Conversation, max_new_tokens: int, where: str) -> None:
        """Check that prompt and response fit the positions of every model.

        The length of a response in the tokens of a model that reads texts is not known in advance;
        it is taken to be the policy's.

        Raises:
            InputError: Where they do not; the message begins with `where`.
        """
        for model in self.models:
            if model.config is None:
                continue
            length, room = len(model.template.encode(conversation)), model.config.max_positions
            if length + max_new_tokens > room:
                raise InputError(
                    f"{where}: a prompt of {length} tokens and {max_new_tokens} new ones exceed "
                    f"the {room} positions of the {model.role} model"
                )


@dataclass(frozen=True)
class Steering:
    """A policy with its guides on tokens, and scorers of texts.

    Attributes:
        models: Policy and guides; None where the policy is behind an API.
        scorers: Of texts.
        names: Of a hypothesis's objectives in their order: guides on tokens, then scorers.
    """

    models: SearchModels | None
    scorers: tuple[TextScorer, ...]
    names: tuple[str, ...] = ()

    def beside(self, scorers: Sequence[TextScorer], names: Sequence[str]) -> "Steering":
        """The same with further scorers of these names."""
        return Steering(self.models, (*self.scorers, *scorers), _distinct([*self.names, *names]))


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with a number added from the second occurrence on."""
    seen = [names[: index + 1].count(name) for index, name in enumerate(names)]
    pairs = zip(names, seen, strict=True)
    return tuple(name if count == 1 else f"{name} ({count})" for name, count in pairs)


def read_folders(path: str | Path) -> dict[str, str]:
    """Read a YAML or JSON file {name: folder} that maps names of checkpoints to local folders.

    Folders are relative to the file.

    Raises:
        InputError: For a file that is not such a mapping, and for a folder that does not exist.
    """
    folders = {}
    for name, folder in read_mapping(path).items():
        if not isinstance(folder, str):
            raise InputError(f"{path}: {name!r} is {type(folder).__name__}; it takes a folder")
        place = Path(path).parent / Path(folder).expanduser()
        if not place.is_dir():
            raise InputError(f"{path}: {name!r}: no such folder {place}")
        folders[str(name)] = str(place)
    return folders


def plan(sources: Sources, *, needs_tokens: str = "") -> SteeringPlan:
    """Read the tokenizers, templates and configs of all sources.

    Args:
        sources: The models by name.
        needs_tokens: What requires every guide to score tokens, such as "--method eft", for
            messages; "" if nothing does.

    Raises:
        InputError: For files that are missing or unreadable, templates that do not fit, and guides
            of another vocabulary where tokens are required.
    """
    places, decoders = sources.checkpoints, {"policy", *chain(*sources.guide_roles)}
    beside = {up: places[down] for up, down in sources.guide_roles}
    # Untuned models first: they may stand for the bases of tuned ones.
    order = sorted(places, key=lambda role: role in beside)
    pairs = [(places[role], beside.get(role, "")) for role in order]
    adapters = find_adapters(pairs, sources.folders)
    tokenizers: dict[str, Any] = {}
    models: dict[str, ModelPlan] = {}
    for role, (_, template, flag) in sources.named.items():
        path, is_decoder = places[role], role in decoders
        config = _config(path, adapters) if is_decoder else None
        if path not in tokenizers:
            found = load_tokenizer(tokenizer_place(path, adapters))
            tokenizers[path] = _shared(found, tokenizers.values())
            if tokenizers[path] is found and is_decoder:
                tell_left_out(found, path)
        args = sources.template_args
        chosen = load_template(tokenizers[path], template, where=flag, args=args)
        called = f"{role} model {path}" if is_decoder and role != "policy" else f"{role} {path}"
        models[role] = ModelPlan(role, called, path, chosen, config)
    policy, guides = models.get("policy"), []
    for source, (up, down) in zip(sources.guides, sources.guide_roles, strict=True):
        on_device = _on_device(sources, policy, (models[up], models[down]), needs_tokens)
        guides.append(GuidePlan(source, models[up], models[down], on_device))
    rewards = tuple(model for role, model in models.items() if role not in decoders)
    return SteeringPlan(sources, policy, tuple(guides), rewards, adapters)


def _config(path: str, adapters: Mapping[str, Adapted]) -> ModelConfig:
    from w2s_jax.models.load import load_config
    from w2s_jax.models.peft import adapted_config

    if path not in adapters:
        return load_config(path)
    try:
        return adapted_config(path, load_config(adapters[path].base))
    except InputError as error:
        raise InputError(f"{path} is an adapter; its base: {error}") from None


def ending_ids(config: ModelConfig, template: Template) -> tuple[int, ...]:
    """Token ids that end a response: a policy's EOS ids and its template's end of a turn."""
    ids, turn = config.eos_ids, template.eos_id
    return ids if turn is None or turn in ids else (*ids, turn)


def _shared(tokenizer: Any, others: Any) -> Any:
    """One of the others that encodes alike, so that two models share one encoding of a text."""
    for other in others:
        if (
            _backend(tokenizer) == _backend(other)
            and tokenizer.special_tokens_map == other.special_tokens_map
            and tokenizer.chat_template == other.chat_template
        ):
            return other
    return tokenizer


def _backend(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return repr(id(tokenizer)) if backend is None else backend.to_str()


def _on_device(
    sources: Sources,
    policy: ModelPlan | None,
    guide: tuple[ModelPlan, ModelPlan],
    needs_tokens: str,
) -> bool:
    """Whether a guide scores the policy's tokens; InputError where it must and cannot."""
    differs = next(filter(None, (_difference(policy, model) for model in guide)), None)
    if differs and (needs_tokens or sources.score_on == "tokens"):
        raise InputError(f"{differs}; {needs_tokens or '--score-on tokens'} needs one")
    if needs_tokens and sources.score_on == "text":
        raise InputError(f"{needs_tokens} needs guides on tokens; leave --score-on text out")
    return differs is None and sources.score_on != "text"


def _difference(policy: ModelPlan | None, model: ModelPlan) -> str | None:
    """Why a guide's model cannot read the policy's tokens; None where it can."""
    if policy is None:
        return f"the policy behind an API and --{model.role} share no token ids"
    assert policy.config is not None
    assert model.config is not None
    own, other = policy.template.tokenizer, model.template.tokenizer
    pair = f"--policy {policy.path} and --{model.role} {model.path}"
    if not same_vocabulary(own, other):
        return f"{pair} have different vocabularies ({len(own)} and {len(other)} tokens)"
    # The policy could not draw a token that a guide has no logit for.
    ids = ending_ids(policy.config, policy.template)
    unknown = [id for id in ids if id >= model.config.vocab_size]
    if not unknown:
        return None
    token = own.convert_ids_to_tokens(unknown[0])
    return f"{pair} do not both have {token!r}, which ends the policy's responses"


def load(plan: SteeringPlan, *, dtype: str | None = None, places: Places = ONE_DEVICE) -> Steering:
    """Read the weights; a checkpoint that is named twice, or is the base of adapters, is read once.

    Args:
        plan: What to load.
        dtype: As in `load_model`.
        places: Mesh and sharding rules.

    Raises:
        InputError: For checkpoints that cannot be read, and for a mesh that does not divide them.
    """
    from w2s_jax.models.load import load_reward_model

    quantize = plan.sources.quantize
    options: dict[str, Any] = {
        "dtype": dtype, "mesh": places.mesh, "scan_layers": places.scan_layers, "decoding": True
    }  # fmt: skip
    # A quantised policy is of its own even where a guide is the same checkpoint: guides are not
    # quantised. Else the policy comes first, and such a guide lies as the policy does.
    own = {} if plan.policy is None else {plan.policy.path: places.policy}
    decoders = {} if quantize else dict(own)
    for guide in plan.guides:
        for model in guide.models:
            decoders.setdefault(model.path, places.others)
    models = load_decoders(decoders, plan.adapters, **options)
    alone = load_decoders(own if quantize else {}, plan.adapters, quantize=quantize, **options)
    guides: list[Guide] = []
    scorers: list[TextScorer] = []
    names: tuple[list[str], list[str]] = ([], [])
    for guide in plan.guides:
        names[not guide.on_device].append(Path(guide.source.tuned).name)
        if guide.on_device:
            tuned, untuned = (models[one.path] for one in guide.models)
            guides.append(Guide(tuned, untuned, float(guide.source.weight)))
        else:
            up, down = (TextModel(models[m.path], m.template, m.called) for m in guide.models)
            scorers.append(TextLogRatio(up, down, guide.source.weight))
    for reward, model in zip(plan.sources.rewards, plan.rewards, strict=True):
        names[1].append(Path(reward.path).name)
        base = plan.adapters[model.path].base if model.path in plan.adapters else None
        read = load_reward_model(model.path, base=base, rules=places.others, **options)
        told = (model.template, reward.weight, reward.label, model.called)
        scorers.append(RewardScorer(read, *told))
    found = None
    if plan.policy is not None:
        found = search_models((models | alone)[plan.policy.path], guides)
    return Steering(found, tuple(scorers), _distinct([*names[0], *names[1]]))


def weights_stamp(folder: Path) -> str:
    """A short hash of the names, sizes and times of a checkpoint's files, and of its base's.

    Raises:
        InputError: For an adapter that names no base.
    """
    from w2s_jax.models.huggingface import is_adapter
    from w2s_jax.models.peft import base_of

    kinds = ("json", "safetensors", "jinja", "model", "txt", "bpe")
    files = sorted(path for kind in kinds for path in folder.glob(f"*.{kind}"))
    stats: list[Any] = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    if is_adapter(folder) and Path(base_of(folder)).is_dir():
        stats.append(weights_stamp(Path(base_of(folder))))
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
