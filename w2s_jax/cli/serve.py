"""`w2s serve`: an OpenAI-compatible server over a policy and its guide. The server is in serve/."""

import copy
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import UseAppendAction, arg

from w2s_jax.errors import InputError
from w2s_jax.search.settings import GuidanceConfig, TextScorersConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from w2s_jax.plan.meshes import Chosen
    from w2s_jax.search.checkpoints import SteeringPlan
    from w2s_jax.search.models import Places
    from w2s_jax.serve.jobs import Job, Reader, Served
    from w2s_jax.serve.schema import Defaults, Limits
    from w2s_jax.text.chat import Template

API_KEY = "W2S_API_KEY"
_LARGEST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class Serve(TextScorersConfig, GuidanceConfig):
    """Answer OpenAI's completions and chat requests with a policy, steered or not.

    Requests may hold more than OpenAI's fields: method, w, k, l, beta, top_k, seed, row_id,
    position, lane, return_token_ids. Flags give what they leave out. SIGTERM ends the server in
    good order.
    """

    host: str = "127.0.0.1"
    """Address to listen at; others than loopback let other machines in."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    served_name: str | None = None
    """The model's name in requests; by default that of the policy's folder."""
    api_key_env: Annotated[str, arg(metavar="NAME")] = API_KEY
    """Environment variable with a key that clients must send; unset, none is asked for."""
    allowed_host: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="NAME")]] = ()
    """A name by which clients may call the server, beside localhost; again for another. On loopback
    other names are refused, on other addresses any is taken unless some are given here."""
    method: Literal["cbs", "bon", "eft", "ivg", "sample"] | None = None
    """Method where a request names none: cbs where anything scores, else sample."""
    beam_width: Annotated[int, arg(aliases=["--w"])] = 4
    """W, hypotheses kept (cbs, ivg)."""
    successors: Annotated[int, arg(aliases=["--k"])] = 4
    """K, successors of each hypothesis (cbs, ivg); N (bon)."""
    chunk_length: Annotated[int, arg(aliases=["--l"])] = 5
    """L, tokens in a chunk (cbs, ivg)."""
    beta: float = 1.0
    """Weight of tuned − untuned logits (eft, ivg)."""
    max_new_tokens: int = 50
    """Tokens in a response, where a request has no max_tokens."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""
    top_k: int = 50
    """Sample from the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Sample from the likeliest tokens of this mass; 1 is off."""
    slots: int = 8
    """Prompts searched side by side."""
    queue: int = 256
    """Prompts that wait at most; further requests get 429."""
    most_rows: int = 64
    """The largest W·K, N or n that a request may ask for."""
    most_tokens: int = 2048
    """The largest max_tokens that a request may ask for."""
    most_prompts: int = 128
    """Prompts in one request at most."""
    grace: float = 20.0
    """Seconds that requests under way are given after SIGTERM."""
    warm_up: int = 64
    """Compile for prompts of so many tokens before /health says ready; 0 compiles nothing ahead."""
    config: Annotated[str | None, arg(metavar="FILE|NAME")] = None
    """YAML values of these flags, by file or by the name of a built-in one; flags override them."""

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C.

        Raises InputError, before any weight is read, for what is wrong.
        """
        _check_installed()
        from w2s_jax.serve.app import Service, create_app
        from w2s_jax.serve.engine import Engine
        from w2s_jax.serve.events import TokenTexts
        from w2s_jax.serve.jobs import Reader
        from w2s_jax.serve.metrics import Metrics
        from w2s_jax.serve.process import is_loopback, listen, serve, url_of

        defaults, limits, key = self.defaults(), self.limits(), self.key()
        self._check()
        with listen(self.host, self.port) as bound:
            served, mesh, notes = self.load()
            reader, metrics = Reader(served, defaults, limits), Metrics()
            warm_up = self.warm_up_jobs(reader)
            for line in notes:
                print(line, file=sys.stderr)
            if key is None and not is_loopback(bound):
                print(
                    f"warning: {self.host} lets other machines in and no key is asked for; set "
                    f"{self.api_key_env}",
                    file=sys.stderr,
                )
            engine = Engine(served, limits, metrics, mesh=mesh, warm_up=warm_up)
            tokens = TokenTexts(served.tokenizer)
            hosts = self.allowed_host if self.allowed_host or is_loopback(bound) else None
            now = int(time.time())
            service = Service(self.name, engine, reader, tokens, metrics, key, now, hosts)
            # Read by those who started the server, possibly through a pipe.
            announce = lambda: print(f"w2s serve: listening on {url_of(bound)}", flush=True)  # noqa: E731
            if not serve(create_app(service), engine, bound, grace=self.grace, announce=announce):
                print("error: the engine has failed, as told above", file=sys.stderr)
                raise SystemExit(1)

    @property
    def name(self) -> str:
        """The model's name in requests."""
        return self.served_name or Path(self.policy or "").expanduser().resolve().name

    @property
    def is_guided(self) -> bool:
        """Whether anything scores responses."""
        return bool(self.tuned or self.reward_model or self.scorer)

    def defaults(self) -> "Defaults":
        """What requests leave out; InputError for a value out of range."""
        from w2s_jax.serve.schema import Defaults

        return Defaults(
            method=self.method or ("cbs" if self.is_guided else "sample"),
            w=self.beam_width,
            k=self.successors,
            l=self.chunk_length,
            beta=self.beta,
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            policy_cache=self.policy_cache,
        )

    def limits(self) -> "Limits":
        """The most that requests may ask for; InputError for a number below 1."""
        from w2s_jax.serve.schema import Limits

        return Limits(
            slots=self.slots,
            queue=self.queue,
            rows=self.most_rows,
            tokens=max(self.most_tokens, self.max_new_tokens),
            prompts=min(self.most_prompts, self.queue),
        )

    def key(self) -> str | None:
        """The key that clients must send; InputError for one that no header can carry."""
        key = os.environ.get(self.api_key_env)
        if key is None:
            if self.api_key_env != API_KEY:
                raise InputError(f"--api-key-env {self.api_key_env}: no such environment variable")
            return None
        if not key.strip() or not key.isascii() or not key.isprintable() or key != key.strip():
            raise InputError(
                f"the key in {self.api_key_env} must be printable ASCII without spaces around it"
            )
        return key

    def _check(self) -> None:
        if self.policy is None:
            raise InputError("name what writes: --policy DIR")
        mixes = self.method in ("eft", "ivg")
        if self.method not in (None, "sample") and not (self.tuned if mixes else self.is_guided):
            raise InputError(f"--method {self.method} needs --tuned and --untuned")
        if not 0 <= self.port <= _LARGEST_PORT:
            raise InputError(f"--port is {self.port}; it must lie in 0 .. {_LARGEST_PORT}")
        for flag, value in (("--grace", self.grace), ("--warm-up", self.warm_up)):
            if not value >= 0:
                raise InputError(f"{flag} is {value}; it must be 0 or above")

    def load(self) -> tuple["Served", "Mesh | None", list[str]]:
        """Everything that answers, its mesh, and a line for each guide on where it scores.

        Raises InputError for wrong checkpoints, templates and meshes.
        """
        from w2s_jax.search import checkpoints
        from w2s_jax.serve.jobs import Served

        sources = replace(self.sources(), rewards=self.rewards())
        needs = f"--method {self.method}" if self.method in ("eft", "ivg") else ""
        plan = checkpoints.plan(sources, needs_tokens=needs)
        functions = self.functions()
        places = self.places(lambda places: self.choose_mesh(plan, places))
        steering = checkpoints.load(plan, dtype=self.weights_dtype, places=places)
        assert steering.models is not None
        # Requests are encoded while scorers of texts encode, which one tokenizer cannot do at once.
        policy, *others = (copy.deepcopy(plan.templates[role]) for role in plan.members)
        own = tuple(None if one.jinja in (None, policy.jinja) else one for one in others)
        scorers = (*steering.scorers, *functions)
        served = Served(steering.models, policy.tokenizer, policy, own, scorers)
        notes = [*plan.notes(), *places.notes(plan.configs), *chat_notes(served, others)]
        return served, places.mesh, notes

    def choose_mesh(self, plan: "SteeringPlan", places: "Places") -> "Chosen":
        """The mesh for what requests run that leave out all they may."""
        from w2s_jax.plan.meshes import choose_mesh, search_shapes
        from w2s_jax.search.config import preset

        own = self.defaults()
        config = preset(
            own.method,
            w=own.w,
            k=own.k,
            l=own.l,
            n=own.k,
            max_new_tokens=own.max_tokens,
            policy_cache=own.policy_cache,
        )
        shapes = search_shapes(
            plan,
            config,
            places,
            prompt_tokens=max(1, self.warm_up),
            slots=self.slots,
            dtype=self.weights_dtype,
            slots_flag="--slots",
        )
        return choose_mesh(shapes)

    def warm_up_jobs(self, reader: "Reader") -> "list[Job]":
        """A job of the default method for a prompt of the length to be warmed up for."""
        from w2s_jax.serve.schema import ApiError, Completion

        if not self.warm_up:
            return []
        body = Completion(model=self.name, prompt=[[0] * self.warm_up], seed=0)
        try:
            jobs = reader.completion(body)
        except ApiError as error:
            raise InputError(f"warming up: {error.message}; see also --warm-up") from None
        # One chunk compiles all that a longer response needs.
        return [replace(job, request=replace(job.request, limit=1)) for job in jobs]


def chat_notes(served: "Served", guides: "Sequence[Template]" = ()) -> list[str]:
    """A line for each chat template that is missing where chats need it.

    guides: those of the guides that read the policy's tokens.
    """
    from w2s_jax.models.encoder import Classifier
    from w2s_jax.search.model_scorers import RewardScorer, TextLogRatio

    templates = [served.template]
    for scorer in served.scorers:
        if isinstance(scorer, TextLogRatio):
            templates += [scorer.tuned.template, scorer.untuned.template]
        elif isinstance(scorer, RewardScorer) and not isinstance(scorer.model, Classifier):
            templates.append(scorer.template)
    missing = dict.fromkeys(template.where for template in templates if template.jinja is None)
    notes = [f"{where}: no chat template there, so chats will be refused" for where in missing]
    if served.template.jinja is not None:
        missing = dict.fromkeys(template.where for template in guides if template.jinja is None)
        notes += [f"{where}: no chat template there, so the policy's is used" for where in missing]
    return notes


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [
        name for name in ("starlette", "uvicorn", "pydantic", "prometheus_client")
        if find_spec(name) is None
    ]  # fmt: skip
    if missing:
        raise InputError(
            f'w2s serve needs {", ".join(missing)}; install them with pip install "w2s-jax[serve]"'
        )
