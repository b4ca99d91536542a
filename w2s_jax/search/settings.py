"""The settings of a search as frozen values: models, scorers, method, and files.

Commands inherit from these, so that a flag, a key of a YAML file and an argument in Python are one
field, declared here with its default and its help. jax is not imported here, as `w2s search --help`
would wait for it: methods import what builds models and plans when they are called.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from w2s_jax.ops.meshes import ChosenMesh
    from w2s_jax.search.checkpoints import RewardSource, Sources
    from w2s_jax.search.config import SearchConfig
    from w2s_jax.search.models import Places
    from w2s_jax.search.scorers import TextScorer


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """What writes, what steers it, and how each model reads conversations."""

    policy: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Checkpoint that writes: a folder, or an id on the Hugging Face hub."""
    tuned: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="DIR|ID")]] = ()
    """A guide's tuned model; again, with another --untuned, for a second guide."""
    untuned: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="DIR|ID")]] = ()
    """Checkpoint of a guide's untuned model."""
    guide_weight: UseAppendAction[tuple[float, ...]] = ()
    """Weight of each guide's log-ratio, 1 by default."""
    score_on: Literal["auto", "tokens", "text"] = "auto"
    """What guides score: the policy's tokens, which takes one vocabulary, or text."""
    policy_template: Annotated[str, arg(metavar="NAME|FILE")] = "auto"
    """Chat template of the policy: auto is its tokenizer's own for messages, and none for texts."""
    guide_template: Annotated[str, arg(metavar="NAME|FILE")] = "auto"
    """Chat template of the guides: auto, none, chat, a published name, or a .jinja file."""
    untuned_template: Annotated[str | None, arg(metavar="NAME|FILE")] = None
    """Chat template of the guides' untuned models, where it differs."""
    template_args: Annotated[str | None, arg(metavar="JSON")] = None
    """Values for all chat templates as a JSON object, such as {"enable_thinking": false}."""
    models_map: Annotated[str | None, arg(metavar="FILE")] = None
    """YAML or JSON file of {name: folder}: where the checkpoints of these names are."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto is as stored, but float32 on a CPU, where it is faster."""
    quantise_policy: Annotated[str | None, arg(metavar="SPEC")] = None
    """Keep the policy's weights as int8 (a scale a channel) or int4 (in groups of 128); :GROUP sets
    another group, +head and +embedding add those. Guides stay as they are."""
    policy_cache: Literal["auto", "int8"] = "auto"
    """What the policy's keys and values are kept as; auto is the dtype of its weights."""
    mesh: Annotated[str | None, arg(metavar="SPEC")] = None
    """Device mesh such as data=2,tensor=4, dcn_data=2 between slices; one axis may be -1. auto (of
    search and serve, in one slice) is the likeliest to fit and be quick, as of `w2s plan`."""
    policy_rules: Annotated[str, arg(metavar="RULES")] = "search"
    """How the mesh splits the policy: search, train or replicated, and changes to it, such as
    search,mlp=tensor,kv_heads=."""
    guide_rules: Annotated[str, arg(metavar="RULES")] = "search"
    """How the mesh splits guides and reward models."""
    scan_layers: bool | None = None
    """Stack the layers, so that large models compile quickly; by default on a mesh."""

    def places(self, choose: "Callable[[Places], ChosenMesh] | None" = None) -> "Places":
        """The mesh, and the rules by which models are placed on it.

        Args:
            choose: Picks the mesh for "auto", given the rules alone.

        Raises:
            InputError: For wrong rules, and as `mesh_of` does.
        """
        from w2s_jax.ops.meshes import mesh_of
        from w2s_jax.ops.sharding import parse_rules
        from w2s_jax.search.models import Places

        rules = (parse_rules(self.policy_rules), parse_rules(self.guide_rules))
        places = Places(None, *rules, self.scan_layers)
        return replace(places, mesh=mesh_of(self.mesh, choose and partial(choose, places)))

    def sources(self, *, guided: bool = True) -> "Sources":
        """The checkpoints that the flags name.

        Args:
            guided: False leaves the guides out.

        Raises:
            InputError: For guides that are not pairs, a wrong file of names, and wrong
                quantisation.
        """
        from w2s_jax.models.quantize import read_quantize
        from w2s_jax.search.checkpoints import GuideSource, Sources, read_folders

        if self.policy is None and (self.quantise_policy or self.policy_cache != "auto"):
            flag = "--quantise-policy" if self.quantise_policy else "--policy-cache"
            raise InputError(f"{flag} is for a --policy in this process")
        try:
            quantize = read_quantize(self.quantise_policy) if self.quantise_policy else None
        except InputError as error:
            raise InputError(f"--quantise-policy: {error}") from None
        up, down = len(self.tuned), len(self.untuned)
        if up != down:
            raise InputError(f"{up} --tuned and {down} --untuned models; a guide is one of each")
        if self.guide_weight and len(self.guide_weight) != up:
            raise InputError(
                f"{len(self.guide_weight)} --guide-weight for {up} guides; give one each"
            )
        weights = self.guide_weight or (1.0,) * up
        templates = (self.guide_template, self.untuned_template or self.guide_template)
        guides = (
            GuideSource(*pair, *templates)
            for pair in zip(self.tuned, self.untuned, weights, strict=True)
        )
        args = self.given_template_args
        return Sources(
            policy=self.policy,
            guides=tuple(guides) if guided else (),
            policy_template=self.policy_template,
            score_on=self.score_on,
            folders=read_folders(self.models_map) if self.models_map else {},
            quantize=quantize,
            template_args=args,
        )

    @property
    def given_template_args(self) -> dict[str, Any]:
        """The values of --template-args.

        Raises:
            InputError: Where it is no JSON object.
        """
        from w2s_jax.text.chat import read_template_args

        given = self.template_args
        return read_template_args(given, "--template-args") if given else {}

    @property
    def weights_dtype(self) -> str | None:
        """The dtype for loading; None for "auto"."""
        return None if self.dtype == "auto" else self.dtype


@dataclass(frozen=True, kw_only=True)
class TextScorersConfig:
    """What scores responses beside the guides."""

    reward_model: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="DIR|ID")]] = ()
    """Checkpoint of a reward model that scores responses, whole or not; may be given again."""
    reward_weight: UseAppendAction[tuple[float, ...]] = ()
    """Weight of each reward model, 1 by default."""
    reward_label: Annotated[str | None, arg(metavar="LABEL")] = None
    """The label whose logit is the reward, where reward models have more than two."""
    reward_template: Annotated[str, arg(metavar="NAME|FILE")] = "auto"
    """Chat template of the reward models."""
    scorer: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="MODULE:FUNCTION")]] = ()
    """A Python function as package.module:function; (prompts, responses) to a number each."""
    scorer_weight: UseAppendAction[tuple[float, ...]] = ()
    """Weight of each function, 1 by default."""

    def rewards(self) -> "tuple[RewardSource, ...]":
        """The reward models.

        Raises:
            InputError: Where the number of weights differs from that of models.
        """
        from w2s_jax.search.checkpoints import RewardSource

        weights = _weights("--reward", "-model", self.reward_weight, self.reward_model)
        return tuple(
            RewardSource(path, weight, self.reward_template, self.reward_label)
            for path, weight in zip(self.reward_model, weights, strict=True)
        )

    def functions(self) -> "list[TextScorer]":
        """The Python functions as scorers.

        Raises:
            InputError: For a function that cannot be imported, and where the number of weights
                differs.
        """
        from w2s_jax.search.scorers import FunctionScorer

        weights = _weights("--scorer", "", self.scorer_weight, self.scorer)
        pairs = zip(self.scorer, weights, strict=True)
        return [FunctionScorer(import_function(name), weight) for name, weight in pairs]


def _weights(
    flag: str, kind: str, given: tuple[float, ...], of: tuple[str, ...]
) -> tuple[float, ...]:
    """The given weights, or ones; InputError where their number differs from that of `of`."""
    if given and len(given) != len(of):
        raise InputError(
            f"{len(given)} {flag}-weight for {len(of)} {flag}{kind}; give one each or none"
        )
    return given or (1.0,) * len(of)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """How a response is searched."""

    method: Literal["cbs", "bon", "eft", "ivg", "sample"] = "cbs"
    """Chunk-level beam search, best-of-N, EFT, EFT under CBS (ivg), or plain sampling."""
    beam_width: Annotated[int, arg(aliases=["--w"])] = 4
    """W, hypotheses kept (cbs, ivg)."""
    successors: Annotated[int, arg(aliases=["--k"])] = 4
    """K, successors sampled from each hypothesis (cbs, ivg)."""
    chunk_length: Annotated[int, arg(aliases=["--l"])] = 5
    """L, tokens in a chunk (cbs, ivg)."""
    samples: Annotated[int, arg(aliases=["--n"])] = 16
    """N, whole responses to choose from (bon)."""
    beta: float = 1.0
    """Weight of tuned − untuned logits (eft, ivg)."""
    eft_top_k: int = 0
    """Steer only among the policy's k likeliest tokens (eft, ivg; PAD); 0 is off."""
    select: Literal["top", "maximin"] = "top"
    """Keep the best sum of scores, or the best under their worst-case weights (RMOD)."""
    maximin_scale: float = 1.0
    """How sharply maximin looks at the best successors; larger is sharper."""
    max_new_tokens: int = 50
    """Tokens in a response at most."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""
    top_k: int = 50
    """Sample from the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Sample from the likeliest tokens of this mass; 1 is off."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """A string that ends a response and is not part of it."""
    seed: int = 0
    """With a row's place in the input, decides its draws."""
    batch_size: int = 8
    """Prompts searched side by side."""
    reference_quirks: bool = False
    """Do as the published PyTorch code does where it differs from the paper."""

    @property
    def mixes(self) -> bool:
        """Whether the guides' logits are mixed into the policy's, which needs one vocabulary."""
        return self.method in ("eft", "ivg")

    def search_config(self) -> "SearchConfig":
        """The search that these flags describe.

        Raises:
            InputError: For a value out of range, and a flag of another method.
        """
        from w2s_jax.ops.logits import Sampling
        from w2s_jax.search.config import preset
        from w2s_jax.search.methods import Maximin

        sizes = {
            "--w": self.beam_width,
            "--k": self.successors,
            "--l": self.chunk_length,
            "--n": self.samples,
            "--max-new-tokens": self.max_new_tokens,
            "--batch-size": self.batch_size,
        }
        for flag, size in sizes.items():
            if size < 1:
                raise InputError(f"{flag} is {size}; it must be at least 1")
        if self.eft_top_k and not self.mixes:
            raise InputError(f"--eft-top-k is for eft and ivg, not {self.method}")
        chosen = {}
        if self.select == "maximin":
            if self.method not in ("cbs", "ivg"):
                raise InputError(f"--select maximin is for cbs and ivg, not {self.method}")
            chosen["selector"] = Maximin(self.maximin_scale)
        return preset(
            self.method,
            w=self.beam_width,
            k=self.successors,
            l=self.chunk_length,
            n=self.samples,
            beta=self.beta,
            eft_top_k=self.eft_top_k,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, self.top_k, self.top_p),
            stop=self.stop,
            seed=self.seed,
            slots=self.batch_size,
            reference_quirks=self.reference_quirks,
            **chosen,
        )


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A policy behind an OpenAI-compatible completions API, in place of --policy."""

    endpoint: Annotated[str | None, arg(metavar="URL")] = None
    """Address of the API; --top-k then acts with --share-draws only."""
    endpoint_model: Annotated[str | None, arg(metavar="NAME")] = None
    """The model's name there."""
    api_key_env: Annotated[str, arg(metavar="NAME")] = "OPENAI_API_KEY"
    """Environment variable that holds the key; it is written nowhere."""
    concurrency: int = 8
    """Requests at a time."""
    timeout: float = 120.0
    """Seconds that a request may take."""
    attempts: int = 6
    """Times that a request is made before the endpoint counts as not answering."""
    prompts_per_request: Annotated[int | None, arg(metavar="INT")] = None
    """Hypotheses of a prompt that share a request; by default all."""
    share_draws: bool = False
    """The endpoint is w2s serve: ask for the draws of a search in one process."""
    price_prompt: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Price of a million prompt tokens, for the cost told at the end."""
    price_completion: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Price of a million completion tokens."""


# How a run is carried out, not what it computes: these may change when a journal is taken up again.
NOT_IN_FINGERPRINT = (
    "prompts", "output", "batch_size", "mesh", "policy_rules", "guide_rules", "scan_layers",
    "prompt_field",  # the rows are told apart by what it makes of them
    "config", "models_map", "format", "generator", "report", "show", "concurrency",
    "timeout", "attempts", "prompts_per_request",
    "price_prompt", "price_completion", "api_key_env",
    "hosts",
)  # fmt: skip
# Of these, what hosts that search together must have alike all the same.
ALIKE = (
    "mesh", "policy_rules", "guide_rules", "scan_layers", "batch_size", "report", "show", "format",
)  # fmt: skip
# What a report does not show.
HIDDEN = ("prompts", "output", "report", "show", "config", "hosts", "api_key_env")


@dataclass(frozen=True, kw_only=True)
class SearchFileConfig(EndpointConfig, TextScorersConfig, MethodConfig, GuidanceConfig):
    """A file of prompts that is searched, and what with: `search.file.search_file` does it."""

    prompts: Annotated[str, arg(metavar="FILE")]
    """Rows with "prompt", "messages", "instruction" or ShareGPT's "conversations"; JSON lines or
    array, also .gz and .xz."""
    output: Annotated[str, arg(metavar="FILE")]
    """Output rows: prompt, response, score, hypotheses, and the other input fields."""
    prompt_field: Annotated[str | None, arg(metavar="NAME")] = None
    """Field of the rows that is their prompt, such as question or text; written as "prompt" too."""
    format: Literal["rows", "alpaca_eval"] = "rows"
    """Output as JSON lines, or as the JSON array that alpaca_eval reads."""
    generator: Annotated[str | None, arg(metavar="NAME")] = None
    """The system's name in alpaca_eval's files; by default made from method and policy."""
    report: Annotated[str | None, arg(metavar="FILE")] = None
    """Also write a page (.html) that shows what every search looked at and kept."""

    @property
    def generator_name(self) -> str:
        """The system's name for alpaca_eval."""
        writer = self.endpoint_model or Path(str(self.policy)).name
        return self.generator or f"{writer}-w2s-{self.method}"

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the results: a journal is only resumed with the same ones."""
        return {name: own for name, own in asdict(self).items() if name not in NOT_IN_FINGERPRINT}

    def alike(self) -> dict[str, Any]:
        """The settings that must agree between hosts that search together."""
        free = set(NOT_IN_FINGERPRINT) - set(ALIKE)
        return {name: own for name, own in asdict(self).items() if name not in free}

    def shown(self) -> dict[str, Any]:
        """The settings that were given, for a report; none of them holds a key."""
        return {name: own for name, own in asdict(self).items() if own and name not in HIDDEN}

    def sources_of_all(self) -> "Sources":
        """All checkpoints.

        Raises:
            InputError: Where the method lacks one or does not use one.
        """
        if (self.policy is None) == (self.endpoint is None):
            raise InputError("name what writes: either --policy or --endpoint")
        if self.endpoint and not self.endpoint_model:
            raise InputError("--endpoint needs --endpoint-model, the model's name there")
        sources = self.sources(guided=self.method != "sample")
        if self.method == "sample":
            if self.reward_model or self.scorer:
                raise InputError(
                    "--method sample scores nothing; leave --reward-model and --scorer out, or "
                    "take --method bon"
                )
            return sources
        rewards = self.rewards()
        if not sources.guides and (self.mixes or not (rewards or self.scorer)):
            others = "" if self.mixes else ", --reward-model or --scorer"
            raise InputError(f"--method {self.method} needs --tuned and --untuned{others}")
        return replace(sources, rewards=rewards)


def import_function(name: str) -> Callable[..., Any]:
    """The function that "package.module:function" names; the working directory is searched too.

    Raises:
        InputError: Where there is none.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InputError(f"--scorer {name}: give it as package.module:function")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--scorer {name}: {error}") from None
    if not callable(found):
        raise InputError(f"--scorer {name}: {type(found).__name__} is no function")
    return found
