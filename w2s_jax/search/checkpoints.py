"""From the names of checkpoints to a policy and what steers it, with every model's own template.

Looks at tokenizers and configs first, so that what is wrong is said before any weight is read.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w2s_jax.errors import InputError
from w2s_jax.models.config import ModelConfig
from w2s_jax.models.quantize import QuantizeConfig
from w2s_jax.ops.sharding import Rules
from w2s_jax.search.adapters import Adapted, find_adapters, load_decoders, tokenizer_place
from w2s_jax.search.model_scorers import RewardScorer, TextLogRatio, TextModel
from w2s_jax.search.models import (
    ONE_DEVICE,
    Guide,
    Places,
    SearchModels,
    member_names,
    search_models,
)
from w2s_jax.search.texts import TextScorer
from w2s_jax.text.chat import Template, load_template
from w2s_jax.text.conversations import Conversation
from w2s_jax.text.prompts import tell_left_out
from w2s_jax.text.tokenizer import load_tokenizer, same_vocabulary
from w2s_jax.text.typed_yaml import read_mapping

Number = float | int
SCORE_ON = ("auto", "tokens", "text")

FLAGS = {
    "policy": "--policy-template",
    "tuned": "--guide-template",
    "untuned": "--guide-template",
    "reward-model": "--reward-template",
}
"""The flag that names the template of each kind of model."""


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

    def locate(self, name: str) -> str:
        """The folder that stands for a name, or the name."""
        return self.folders.get(name, name)

    @property
    def checkpoints(self) -> dict[str, str]:
        """Where every checkpoint is, under what to call it in messages."""
        found = {} if self.policy is None else {"policy": self.policy}
        for index, guide in enumerate(self.guides):
            mark = "" if len(self.guides) == 1 else f" {index}"
            found |= {f"tuned{mark}": guide.tuned, f"untuned{mark}": guide.untuned}
        for index, reward in enumerate(self.rewards):
            mark = "" if len(self.rewards) == 1 else f" {index}"
            found[f"reward-model{mark}"] = reward.path
        return {role: self.locate(name) for role, name in found.items()}


@dataclass(frozen=True)
class SteeringPlan:
    """Sources whose tokenizers, templates and configs were looked at; no weight is loaded yet.

    on_device: for each guide whether it scores the policy's tokens. templates and configs are under
    the names of `Sources.checkpoints`. adapters: which checkpoints are, by path.
    """

    sources: Sources
    templates: Mapping[str, Template]
    configs: Mapping[str, ModelConfig]
    on_device: tuple[bool, ...]
    adapters: Mapping[str, Adapted] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        """The policy's."""
        return self.templates["policy"].tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a response: the policy's EOS ids and the end of a turn in its template."""
        return ending_ids(self.configs["policy"], self.templates["policy"])

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the models that read the policy's tokens, in the order of their prompts."""
        roles = iter(role for role in self.templates if "tuned" in role)
        pairs = list(zip(roles, roles, strict=True))
        on_device = [pair for pair, here in zip(pairs, self.on_device, strict=True) if here]
        return ("policy", *(role for pair in on_device for role in pair))

    def called(self, role: str) -> str:
        """What to call a model in messages: its role and where it is."""
        kind = f"{role} model" if "tuned" in role else role
        return f"{kind} {self.sources.checkpoints[role]}"

    def called_members(self) -> dict[str, str]:
        """The same for the models that read the policy's tokens, under `guides.member_names`."""
        names = member_names(sum(self.on_device))
        return dict(zip(names, map(self.called, self.members), strict=True))

    def notes(self) -> list[str]:
        """A line for each guide: where it scores, and why there; and for each adapter its base.

        And for each value that is given to chat templates and that none reads.
        """
        lines = []
        for index, (guide, here) in enumerate(
            zip(self.sources.guides, self.on_device, strict=True)
        ):
            name = "the guide" if len(self.on_device) == 1 else f"guide {index}"
            if here:
                lines.append(f"{name} scores tokens on the device: its vocabulary is the policy's")
                continue
            why = "as asked"
            if self.sources.policy is None:
                why = "the policy gives text only"
            elif self.sources.score_on == "auto":
                why = f"{guide.tuned} or {guide.untuned} does not have the policy's vocabulary"
            lines.append(f"{name} scores texts, encoded anew behind its own template: {why}")
        if self.sources.policy is not None:  # whose template is not here behind an API
            lines += [
                f"no chat template here reads {name!r}, which is given to all of them"
                for name in self.sources.template_args
                if not any(template.reads(name) for template in self.templates.values())
            ]
        checkpoints = self.sources.checkpoints
        if self.sources.quantize is not None:
            lines.append(f"the policy's weights are read as {self.sources.quantize}")
        for path, adapted in self.adapters.items():
            role = next(role for role in checkpoints if checkpoints[role] == path)
            rest = {checkpoints[other] for other in self.configs if role in self.configs} - {path}
            if role == "policy" and self.sources.quantize is not None:
                lines.append(f"policy {path} is an adapter beside {adapted.base}, quantised")
                continue
            on = [self.adapters[other].base if other in self.adapters else other for other in rest]
            lines.append(adapted.note(role, path, on))
        return lines

    def prompts(self, conversation: Conversation) -> tuple[tuple[int, ...], ...]:
        """Token ids of a prompt: one sequence for all members that read tokens, or one each.

        Raises InputError where a template fails.
        """
        read = [tuple(self.templates[role].encode(conversation)) for role in self.members]
        return (read[0],) if all(one == read[0] for one in read) else tuple(read)

    def check_length(self, conversation: Conversation, max_new_tokens: int, where: str) -> None:
        """Raise InputError, naming `where`, where prompt and response do not fit a model.

        For models that read texts the response's length in their own tokens is not known before;
        it is taken to be as long as the policy's.
        """
        for role, template in self.templates.items():
            if role not in self.configs:
                continue
            length, room = len(template.encode(conversation)), self.configs[role].max_positions
            if length + max_new_tokens > room:
                raise InputError(
                    f"{where}: a prompt of {length} tokens and {max_new_tokens} new ones exceed "
                    f"the {room} positions of the {role} model"
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

    Folders are relative to the file. Raises InputError for a file that is not such a mapping, and
    for a folder that is not there.
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
    checkpoints = sources.checkpoints
    names = _template_names(sources)
    adapters = find_adapters(checkpoints, sources.folders)
    loaded: dict[str, Any] = {}
    templates, configs = {}, {}
    for role, path in checkpoints.items():
        if not role.startswith("reward-model"):
            configs[role] = _config(path, adapters)
        if path not in loaded:
            found = load_tokenizer(tokenizer_place(path, adapters))
            loaded[path] = _shared(found, loaded.values())
            if loaded[path] is found and role in configs:
                tell_left_out(found, path)
        flag = FLAGS[role.split()[0]]
        args = sources.template_args
        templates[role] = load_template(loaded[path], names[role], where=flag, args=args)
    on_device = _on_device(sources, templates, configs, needs_tokens)
    return SteeringPlan(sources, templates, configs, on_device, adapters)


def _config(path: str, adapters: Mapping[str, Adapted]) -> ModelConfig:
    from w2s_jax.models.load import load_config
    from w2s_jax.models.lora_huggingface import adapted_config

    if path not in adapters:
        return load_config(path)
    try:
        return adapted_config(path, load_config(adapters[path].base))
    except InputError as error:
        raise InputError(f"{path} is an adapter; its base: {error}") from None


def _template_names(sources: Sources) -> dict[str, str]:
    names = [] if sources.policy is None else [sources.policy_template]
    for guide in sources.guides:
        names += [guide.tuned_template, guide.untuned_template]
    names += [reward.template for reward in sources.rewards]
    return dict(zip(sources.checkpoints, names, strict=True))


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
    templates: Mapping[str, Template],
    configs: Mapping[str, ModelConfig],
    needs_tokens: str,
) -> tuple[bool, ...]:
    eos_ids: tuple[int, ...] = ()
    if sources.policy is not None:
        eos_ids = ending_ids(configs["policy"], templates["policy"])
    roles = iter([role for role in templates if "tuned" in role])
    found = []
    for tuned, untuned in zip(roles, roles, strict=True):
        differs = None
        for role in (tuned, untuned):
            if sources.policy is None:
                differs = f"the policy behind an API and --{role} share no token ids"
                break
            policy, other = templates["policy"].tokenizer, templates[role].tokenizer
            checkpoints = sources.checkpoints
            pair = f"--policy {checkpoints['policy']} and --{role} {checkpoints[role]}"
            if not same_vocabulary(policy, other):
                sizes = f"({len(policy)} and {len(other)} tokens)"
                differs = f"{pair} have different vocabularies {sizes}"
                break
            # The policy could not draw a token that a guide has no logit for.
            unknown = [id for id in eos_ids if id >= configs[role].vocab_size]
            if unknown:
                token = policy.convert_ids_to_tokens(unknown[0])
                differs = f"{pair} do not both have {token!r}, which ends the policy's responses"
                break
        if differs and (needs_tokens or sources.score_on == "tokens"):
            raise InputError(f"{differs}; {needs_tokens or '--score-on tokens'} needs one")
        if needs_tokens and sources.score_on == "text":
            raise InputError(f"{needs_tokens} needs guides on tokens; leave --score-on text out")
        found.append(differs is None and sources.score_on != "text")
    return tuple(found)


def load(plan: SteeringPlan, *, dtype: str | None = None, places: Places = ONE_DEVICE) -> Steering:
    """Read the weights; a checkpoint that is named twice, or stood on by adapters, is read once.

    dtype as in `load_model`. Raises InputError for checkpoints that cannot be read, and for a mesh
    that does not divide them.
    """
    from w2s_jax.models.load import load_reward_model

    sources, checkpoints = plan.sources, plan.sources.checkpoints
    options: dict[str, Any] = {
        "dtype": dtype, "mesh": places.mesh, "scan_layers": places.scan_layers
    }  # fmt: skip
    # A quantised policy is of its own even where a guide is the same checkpoint: guides are not
    # quantised. Else the policy comes first, and such a guide lies as the policy does.
    roles = sorted(plan.configs, key=lambda role: role != "policy")
    apart = [role for role in roles if role == "policy" and sources.quantize]
    decoders: dict[str, Rules] = {}
    for role in (role for role in roles if role not in apart):
        rules = places.policy if role == "policy" else places.others
        decoders.setdefault(checkpoints[role], rules)
    models = load_decoders(decoders, plan.adapters, **options)
    own = {checkpoints[role]: places.policy for role in apart}
    alone = load_decoders(own, plan.adapters, quantize=sources.quantize, **options)
    guides: list[Guide] = []
    scorers: list[TextScorer] = []
    names: tuple[list[str], list[str]] = ([], [])
    guiding = iter([role for role in plan.templates if "tuned" in role])
    pairs = zip(guiding, guiding, strict=True)
    for guide, here, pair in zip(sources.guides, plan.on_device, pairs, strict=True):
        tuned, untuned = (models[checkpoints[role]] for role in pair)
        names[0 if here else 1].append(Path(guide.tuned).name)
        if here:
            guides.append(Guide(tuned, untuned, float(guide.weight)))
            continue
        readers = [
            TextModel(model, plan.templates[role], plan.called(role))
            for model, role in zip((tuned, untuned), pair, strict=True)
        ]
        scorers.append(TextLogRatio(readers[0], readers[1], guide.weight))
    judges = [role for role in plan.templates if role.startswith("reward-model")]
    for reward, role in zip(sources.rewards, judges, strict=True):
        names[1].append(Path(reward.path).name)
        adapted = plan.adapters.get(checkpoints[role])
        base = None if adapted is None else adapted.base
        judge = load_reward_model(checkpoints[role], base=base, rules=places.others, **options)
        options_of = (plan.templates[role], reward.weight, reward.label, plan.called(role))
        scorers.append(RewardScorer(judge, *options_of))
    policy = None if sources.policy is None else (models | alone)[checkpoints["policy"]]
    found = None if policy is None else search_models(policy, guides)
    return Steering(found, tuple(scorers), _distinct([*names[0], *names[1]]))


def guide_sources(
    tuned: Sequence[str],
    untuned: Sequence[str],
    weights: Sequence[Number] = (),
    *,
    tuned_template: str = "auto",
    untuned_template: str = "auto",
) -> tuple[GuideSource, ...]:
    """Guides from lists of flags, each `--tuned` with the `--untuned` at its place.

    Raises InputError where their numbers, or those of the weights, differ.
    """
    if len(tuned) != len(untuned):
        raise InputError(
            f"{len(tuned)} --tuned and {len(untuned)} --untuned models; a guide is one of each"
        )
    if weights and len(weights) != len(tuned):
        raise InputError(f"{len(weights)} --guide-weight for {len(tuned)} guides; give one each")
    return tuple(
        GuideSource(up, down, weight, tuned_template, untuned_template)
        for up, down, weight in zip(tuned, untuned, weights or [1.0] * len(tuned), strict=True)
    )


def weights_stamp(folder: Path) -> str:
    """A short hash of the names, sizes and times of a checkpoint's files, and of its base's.

    Raises InputError for an adapter that names no base.
    """
    from w2s_jax.models.huggingface import is_adapter
    from w2s_jax.models.lora_huggingface import base_of

    kinds = ("json", "safetensors", "jinja", "model", "txt", "bpe")
    files = sorted(path for kind in kinds for path in folder.glob(f"*.{kind}"))
    stats: list[Any] = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    if is_adapter(folder) and Path(base_of(folder)).is_dir():
        stats.append(weights_stamp(Path(base_of(folder))))
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
