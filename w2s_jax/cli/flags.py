"""Flags that several commands share, and what they stand for."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from w2s_jax.errors import InputError
from w2s_jax.hosts import own_number, started

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from w2s_jax.plan.meshes import Shapes
    from w2s_jax.plan.programs import SearchShapes
    from w2s_jax.search.checkpoints import RewardSource, Sources, SteeringPlan
    from w2s_jax.search.config import SearchConfig
    from w2s_jax.search.models import Places
    from w2s_jax.search.texts import TextScorer

MESH = "mesh.txt"
"""Where a training run's folder says, in words, on which mesh it last ran."""


def search_shapes(
    plan: "SteeringPlan",
    config: "SearchConfig",
    places: "Places",
    *,
    prompt_tokens: int,
    slots: int,
    dtype: str | None,
    slots_flag: str = "--batch-size",
) -> "SearchShapes":
    """The shapes of a search with the models of a plan, by the rules of `places`.

    dtype: of the weights, None is what loading takes. A checkpoint that is named twice counts
    twice.
    """
    from w2s_jax.models.config import ModelConfig
    from w2s_jax.models.huggingface import locate
    from w2s_jax.models.load import load_reward_config
    from w2s_jax.models.model import STORED, quickest_dtype
    from w2s_jax.plan.programs import GuideShapes, SearchShapes

    checkpoints = plan.sources.checkpoints
    guiding = iter([role for role in plan.configs if "tuned" in role])
    pairs = zip(guiding, guiding, plan.on_device, strict=True)
    bases = {path: adapted.base for path, adapted in plan.adapters.items()}
    rewards = (path for role, path in checkpoints.items() if role.startswith("reward-model"))
    judges = [load_reward_config(bases.get(path, path)) for path in rewards]
    dtype = dtype or quickest_dtype()
    return SearchShapes(
        policy=plan.configs["policy"],
        guides=tuple(
            GuideShapes(plan.configs[tuned], plan.configs[untuned], on_tokens=here)
            for tuned, untuned, here in pairs
        ),
        config=config,
        prompt_tokens=prompt_tokens,
        slots=slots,
        slots_flag=slots_flag,
        dtype=stored_dtype(locate(checkpoints["policy"])) if dtype == STORED else dtype,
        policy_rules=places.policy,
        guide_rules=places.others,
        quantize=plan.sources.quantize,
        # Encoders stay whole on every device.
        judges=tuple(judge for judge in judges if isinstance(judge, ModelConfig)),
    )


def mesh_before(directory: Path) -> str | None:
    """The mesh that a training run's folder had last, in words; None where it does not say."""
    try:
        return (directory / MESH).read_text(errors="replace").strip()
    except OSError:
        return None


def stored_dtype(checkpoint: Path) -> str:
    """The dtype that a checkpoint's config.json, or its base's, says its weights have."""
    from w2s_jax.models.huggingface import CONFIG, is_adapter, read_json
    from w2s_jax.models.lora_huggingface import base_folder

    if is_adapter(checkpoint):
        return stored_dtype(base_folder(checkpoint))
    config = read_json(checkpoint / CONFIG)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


AUTO = "auto"
"""The mesh that a command chooses itself."""
OVER_HOSTS = "data=-1"
"""The mesh of several hosts where none is asked for."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts that run a command together."""

    hosts: Annotated[str, arg(metavar="HOST:PORT,N,I|auto|off|jax")] = "auto"
    """Hosts that run this together: the first one's address, how many, which this is from 0. auto
    finds those of SLURM, Open MPI and TPU slices, jax whatever jax finds."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
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

    def places(self, shapes: "Callable[[Places], Shapes] | None" = None) -> "Places":
        """The mesh and the rules; InputError where they are wrong.

        `shapes`: what is to run by the rules that it is given, for a mesh that is to be chosen.
        """
        from w2s_jax.search.models import read_places

        rules = read_places(None, self.policy_rules, self.guide_rules, self.scan_layers)
        chosen = None if shapes is None else lambda: shapes(rules)
        return replace(rules, mesh=mesh_of(self.mesh, chosen))

    def sources(self, *, guided: bool = True) -> "Sources":
        """The checkpoints that the flags name, without guides where they are not used.

        Raises InputError for guides that are not pairs, a wrong file of names and quantisation.
        """
        from w2s_jax.models.quantize import read_quantize
        from w2s_jax.search.checkpoints import Sources, guide_sources, read_folders

        if self.policy is None and (self.quantise_policy or self.policy_cache != "auto"):
            flag = "--quantise-policy" if self.quantise_policy else "--policy-cache"
            raise InputError(f"{flag} is for a --policy in this process")
        try:
            quantize = read_quantize(self.quantise_policy) if self.quantise_policy else None
        except InputError as error:
            raise InputError(f"--quantise-policy: {error}") from None
        guides = guide_sources(
            self.tuned,
            self.untuned,
            self.guide_weight,
            tuned_template=self.guide_template,
            untuned_template=self.untuned_template or self.guide_template,
        )
        args = self.given_template_args
        return Sources(
            policy=self.policy,
            guides=guides if guided else (),
            policy_template=self.policy_template,
            score_on=self.score_on,
            folders=read_folders(self.models_map) if self.models_map else {},
            quantize=quantize,
            template_args=args,
        )

    @property
    def given_template_args(self) -> dict[str, Any]:
        """What --template-args gives; InputError where it is no JSON object."""
        from w2s_jax.text.chat import read_template_args

        return (
            read_template_args(self.template_args, "--template-args") if self.template_args else {}
        )

    @property
    def weights_dtype(self) -> str | None:
        """What loading takes: None leaves the choice to it."""
        return None if self.dtype == "auto" else self.dtype


@dataclass(frozen=True, kw_only=True)
class Judges:
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
        """The reward models; InputError where their weights are of another number."""
        from w2s_jax.search.checkpoints import RewardSource

        weights = _weights("--reward", "-model", self.reward_weight, self.reward_model)
        return tuple(
            RewardSource(path, weight, self.reward_template, self.reward_label)
            for path, weight in zip(self.reward_model, weights, strict=True)
        )

    def functions(self) -> "list[TextScorer]":
        """The Python functions as scorers; InputError for one that is not there."""
        from w2s_jax.search.texts import FunctionScorer

        weights = _weights("--scorer", "", self.scorer_weight, self.scorer)
        pairs = zip(self.scorer, weights, strict=True)
        return [FunctionScorer(import_function(name), weight) for name, weight in pairs]


def _weights(
    flag: str, kind: str, given: tuple[float, ...], of: tuple[str, ...]
) -> tuple[float, ...]:
    if given and len(given) != len(of):
        raise InputError(
            f"{len(given)} {flag}-weight for {len(of)} {flag}{kind}; give one each or none"
        )
    return given or (1.0,) * len(of)


@dataclass(frozen=True, kw_only=True)
class Method:
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
        """The search these flags describe; InputError for a value out of range."""
        from w2s_jax.ops.sampling import Sampling
        from w2s_jax.search.config import preset
        from w2s_jax.search.selectors import Maximin

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


def mesh_of(
    spec: str | None,
    shapes: "Callable[[], Shapes] | None" = None,
    *,
    before: Callable[[], str | None] = lambda: None,
) -> "Mesh | None":
    """The mesh of --mesh; without the flag none on one host, and data=-1 on several.

    What is used without the flag is told, where it is not all there is, and so is what is chosen
    for "auto", by what `shapes` says is to run; `before` says what the run had when it was stopped.

    Raises InputError as `make_mesh` and `choose_mesh` do, for "auto" without shapes, and where
    hosts were given different ones.
    """
    import jax

    from w2s_jax.exchange import agree
    from w2s_jax.ops.sharding import make_mesh

    agree("command", {"--mesh": spec})
    if spec == AUTO and shapes is not None:
        from w2s_jax.plan.meshes import choose_mesh

        chosen = choose_mesh(shapes())
        had = before()
        other = "" if had in (None, chosen.name) else f"; the run before had {had}"
        print(f"{chosen.told}{other}", file=sys.stderr)
        return chosen.mesh
    if spec is not None:
        return named_mesh(spec)
    if not started():
        if jax.device_count() > 1:
            told = f"one of the {jax.device_count()} devices here is used"
            print(f"{told}; --mesh {OVER_HOSTS}, say, uses all", file=sys.stderr)
        return None
    mesh = make_mesh(OVER_HOSTS)
    told = f"{own_number()[1]} hosts with {mesh.size} devices: --mesh {OVER_HOSTS}"
    print(f"{told}, as none is given", file=sys.stderr)
    return mesh


def named_mesh(spec: str) -> "Mesh":
    """The mesh of --mesh where it is not chosen.

    Raises InputError as `make_mesh` and `check_named` do, and for "auto".
    """
    from w2s_jax.ops.sharding import make_mesh

    check_named(spec)
    if spec == AUTO:
        raise InputError(f"--mesh {AUTO} is of search, serve, sft and dpo; name it, as data=-1")
    return make_mesh(spec)


def check_named(spec: str) -> None:
    """Raise InputError for a --mesh without a word in it."""
    if not spec.strip(", "):
        raise InputError("--mesh is empty; give sizes such as data=2,tensor=4, or leave it out")


def import_function(name: str) -> Callable[..., Any]:
    """The function that "package.module:function" names; the working directory is looked in too.

    Raises InputError where there is none.
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
