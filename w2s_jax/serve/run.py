"""From settings to a server: what answers is loaded, and put behind the endpoints."""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from jax.sharding import Mesh

from w2s_jax.errors import InputError
from w2s_jax.models.reward import Classifier
from w2s_jax.search import checkpoints
from w2s_jax.search.config import SearchConfig, preset
from w2s_jax.search.file import ChooseMesh
from w2s_jax.search.model_scorers import RewardScorer, TextLogRatio
from w2s_jax.serve import process
from w2s_jax.serve.answers import TokenTexts
from w2s_jax.serve.app import Service, create_app
from w2s_jax.serve.config import ServeConfig
from w2s_jax.serve.engine import Engine
from w2s_jax.serve.jobs import Job, Reader, Served
from w2s_jax.serve.schema import ApiError, Completion
from w2s_jax.text.chat import Template


def run(
    config: ServeConfig, on_ready: Callable[[str], None], choose_mesh: ChooseMesh | None
) -> bool:
    """Serve, as `w2s_jax.serve.serve` says."""
    config.check()
    key = config.key()
    with process.listen(config.host, config.port) as bound:
        served, mesh, notes = load(config, choose_mesh)
        reader = Reader(served, config)
        warm_up = warm_up_jobs(reader)
        is_private = process.is_loopback(bound)
        if key is None and not is_private:
            notes.append(
                f"warning: {config.host} lets other machines in and no key is asked for; set "
                f"{config.api_key_env}"
            )
        for line in notes:
            sys.stderr.write(f"{line}\n")
        engine = Engine(served, config, mesh=mesh, warm_up=warm_up)
        service = Service(
            config.name,
            engine,
            reader,
            TokenTexts(served.tokenizer),
            key,
            created=int(time.time()),
            hosts=config.allowed_host if config.allowed_host or is_private else None,
        )
        app, url = create_app(service), process.url_of(bound)
        return process.serve(app, engine, bound, grace=config.grace, announce=lambda: on_ready(url))


def load(
    config: ServeConfig, choose_mesh: ChooseMesh | None = None
) -> tuple[Served, Mesh | None, list[str]]:
    """Everything that answers, its mesh, and a line for each guide on where it scores.

    Raises InputError for wrong checkpoints, templates and meshes.
    """
    sources = replace(config.sources(), rewards=config.rewards())
    needs = f"--method {config.method}" if config.method in ("eft", "ivg") else ""
    plan = checkpoints.plan(sources, needs_tokens=needs)
    functions = config.functions()
    choose = None
    if choose_mesh is not None:
        usual, longest = _usual_search(config), max(1, config.warm_up)
        choose = lambda places: choose_mesh(plan, usual, places, longest)  # noqa: E731
    places = config.places(choose)
    steering = checkpoints.load(plan, dtype=config.weights_dtype, places=places)
    assert steering.models is not None
    # Requests are encoded while scorers of texts encode, which one tokenizer cannot do at once.
    policy, *others = (copy.deepcopy(model.template) for model in plan.members)
    served = Served(
        steering.models,
        policy.tokenizer,
        policy,
        tuple(None if one.jinja in (None, policy.jinja) else one for one in others),
        (*steering.scorers, *functions),
        config.policy_cache,
    )
    notes = [*plan.notes(), *places.notes(plan.configs), *chat_notes(served, others)]
    return served, places.mesh, notes


def _usual_search(config: ServeConfig) -> SearchConfig:
    """What requests run that leave out all they may."""
    return preset(
        config.usual_method,
        w=config.beam_width,
        k=config.successors,
        l=config.chunk_length,
        n=config.successors,
        max_new_tokens=config.max_new_tokens,
        policy_cache=config.policy_cache,
    )


def chat_notes(served: Served, guides: Sequence[Template] = ()) -> list[str]:
    """A line for each chat template that is missing where chats need it.

    guides: those of the guides that read the policy's tokens.
    """
    templates: Sequence[Template] = [served.template]
    for scorer in served.scorers:
        if isinstance(scorer, TextLogRatio):
            templates = [*templates, scorer.tuned.template, scorer.untuned.template]
        elif isinstance(scorer, RewardScorer) and not isinstance(scorer.model, Classifier):
            templates = [*templates, scorer.template]
    ends = {"chats will be refused": templates}
    if served.template.jinja is not None:
        ends["the policy's is used"] = guides
    notes = [
        f"{template.where}: no chat template there, so {end}"
        for end, own in ends.items()
        for template in own
        if template.jinja is None
    ]
    return list(dict.fromkeys(notes))


def warm_up_jobs(reader: Reader) -> list[Job]:
    """A job of the usual method for a prompt of the length to be warmed up for."""
    config = reader.config
    if not config.warm_up:
        return []
    body = Completion(model=config.name, prompt=[[0] * config.warm_up], seed=0)
    try:
        jobs = reader.completion(body)
    except ApiError as error:
        raise InputError(f"warming up: {error.message}; see also --warm-up") from None
    # One chunk compiles all that a longer response needs.
    return [replace(job, request=replace(job.request, limit=1)) for job in jobs]
