"""From the names of checkpoints to a policy and what steers it, with every model's own template.

Tokenizers and configs are looked at first (`plan`), so that what is wrong is said before any weight
is read (`load`).
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
    """A reward model's checkpoint, its weight and template; label chooses one of several."""

    path: str
    weight: Number = 1.0
    template: str = "auto"
    label: str | int | None = None


@dataclass(frozen=True)
class Sources:
    """What a search is made of, by name: a folder, a Hugging Face id, or a name in `folders`.

    policy: None where it is behind an API. score_on: "tokens" has guides score the policy's tokens,
    on the device; "text" has them encode responses anew; "auto" takes the first for every guide
    whose token maps are the policy's. quantize: how the policy's weights are quantised (None: not);
    those of guides never are, since log-ratios are small differences. template_args: values for all
    chat templates.
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
        """What to call the tuned and the untuned model of each guide."""
        return tuple((f"tuned{mark}", f"untuned{mark}") for mark in _marks(self.guides))

    @property
    def named(self) -> dict[str, tuple[str, str, str]]:
        """Every model by what to call it: its name, its template, and the flag that gives that."""
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
        """Where every checkpoint is, under what to call it in messages."""
        return {role: self.folders.get(name, name) for role, (name, _, _) in self.named.items()}


def _marks(items: Sequence[Any]) -> list[str]:
    """What tells the items apart in names: nothing where there is one, else their numbers."""
    return [""] if len(items) == 1 else [f" {index}" for index in range(len(items))]


@dataclass(frozen=True)
class ModelPlan:
    """A checkpoint that was looked at.

    Attributes:
        role: its name in `Sources.checkpoints`.
        called: its kind and where it is, for messages.
        path: its folder or hub id.
        template: behind which it reads conversations.
        config: None of reward models, whose heads are read with their weights.
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
        """Both, in the order in which searches read them."""
        return (self.tuned, self.untuned)


@dataclass(frozen=True)
class SteeringPlan:
    """Sources whose tokenizers, templates and configs were looked at; no weight is loaded yet.

    policy: None behind an API. adapters: which checkpoints are, by path.
    """

    sources: Sources
    policy: ModelPlan | None
    guides: tuple[GuidePlan, ...]
    rewards: tuple[ModelPlan, ...] = ()
    adapters: Mapping[str, Adapted] = field(default_factory=dict)

    @property
    def models(self) -> tuple[ModelPlan, ...]:
        """All of them: policy, tuned 0, untuned 0, ..., reward models."""
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
        """The template of each model, under the names of `Sources.checkpoints`."""
        return {model.role: model.template for model in self.models}

    @property
    def configs(self) -> dict[str, ModelConfig]:
        """The configs of the policy and of the guides' models, under the same names."""
        return {model.role: model.config for model in self.models if model.config is not None}

    @property
    def tokenizer(self) -> Any:
        """The policy's."""
        return self.members[0].template.tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a response: the policy's EOS ids and the end of a turn in its template."""
        policy = self.members[0]
        assert policy.config is not None
        return ending_ids(policy.config, policy.template)

    def notes(self) -> list[str]:
        """A line for each guide: where it scores, and why there; and for each adapter its base.

        And for each value that is given to chat templates and that none reads.
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
        """Token ids of a prompt: one sequence for all members that read tokens, or one each.

        Raises:
            InputError: where a template fails.
        """
        read = [tuple(model.template.encode(conversation)) for model in self.members]
        return (read[0],) if all(one == read[0] for one in read) else tuple(read)

    def check_length(self, conversation: Conversation, max_new_tokens: int, where: str) -> None:
        """Raise InputError, naming `where`, where prompt and response do not fit a model.

        For models that read texts the response's length in their own tokens is not known before;
        it is taken to be as long as the policy's.
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
    """A policy (None behind an API) with its guides on tokens, and scorers of texts.

    names: what to call the objectives of a hypothesis, in their order: guides on tokens, then
    scorers.
    """

    models: SearchModels | None
    scorers: tuple[TextScorer, ...]
    names: tuple[str, ...] = ()

    def beside(self, scorers: Sequence[TextScorer], names: Sequence[str]) -> "Steering":
        """The same with further scorers of these names."""
        return Steering(self.models, (*self.scorers, *scorers), _distinct([*self.names, *names]))


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, numbered from the second on where one is there again."""
    seen = [names[: index + 1].count(name) for index, name in enumerate(names)]
    pairs = zip(names, seen, strict=True)
    return tuple(name if count == 1 else f"{name} ({count})" for name, count in pairs)


def read_folders(path: str | Path) -> dict[str, str]:
    """A file that maps names of checkpoints to local folders: YAML or JSON, {name: folder}.

    Folders are relative to the file.

    Raises:
        InputError: for a file that is not such a mapping, and for a folder that is not there.
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
    """Look at the tokenizers, templates and configs of all sources.

    needs_tokens names what needs every guide on the policy's tokens, such as "--method eft". Raises
    InputError for what is missing or unreadable, templates that do not fit, and guides of another
    vocabulary where they must have the policy's.
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
    """What ends a response: a policy's EOS ids and the end of a turn in its template."""
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
    """Read the weights; a checkpoint that is named twice, or stood on by adapters, is read once.

    dtype as in `load_model`.

    Raises:
        InputError: for checkpoints that cannot be read, and for a mesh that does not divide them.
    """
    from w2s_jax.models.load import load_reward_model

    quantize = plan.sources.quantize
    options: dict[str, Any] = {
        "dtype": dtype, "mesh": places.mesh, "scan_layers": places.scan_layers
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
        InputError: for an adapter that names no base.
    """
    from w2s_jax.models.huggingface import is_adapter
    from w2s_jax.models.peft import base_of

    kinds = ("json", "safetensors", "jinja", "model", "txt", "bpe")
    files = sorted(path for kind in kinds for path in folder.glob(f"*.{kind}"))
    stats: list[Any] = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    if is_adapter(folder) and Path(base_of(folder)).is_dir():
        stats.append(weights_stamp(Path(base_of(folder))))
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
