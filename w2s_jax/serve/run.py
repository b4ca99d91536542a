"""A server from its settings to its end: what answers is loaded, and served on a socket.

A signal starts the end; requests in progress then get some more time.
"""

import asyncio
import copy
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType

import uvicorn
from jax.sharding import Mesh
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from w2s_jax.errors import InputError
from w2s_jax.models.reward import Classifier
from w2s_jax.search import checkpoints
from w2s_jax.search.config import SearchConfig, preset
from w2s_jax.search.file import ChooseMesh
from w2s_jax.search.scorers import RewardScorer, TextLogRatio
from w2s_jax.serve.answers import TokenTexts
from w2s_jax.serve.app import Service, create_app
from w2s_jax.serve.config import ServeConfig
from w2s_jax.serve.engine import Engine
from w2s_jax.serve.jobs import Job, Reader, Served
from w2s_jax.serve.schema import ApiError, Completion
from w2s_jax.text.chat import Template

_TICK = 0.05
_LAST_WORDS = 5
_LAST_CHUNK = 1.0
_BACKLOG = 1024
_HEADER_SECONDS = 10.0


def run(
    config: ServeConfig, on_ready: Callable[[str], None], choose_mesh: ChooseMesh | None
) -> bool:
    """Serve as described in `w2s_jax.serve.serve`."""
    config.check()
    key = config.key()
    with listen(config.host, config.port) as bound:
        served, mesh, notes = load(config, choose_mesh)
        reader = Reader(served, config)
        warm_up = warm_up_jobs(reader)
        is_private = is_loopback(bound)
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
        app, url = create_app(service), url_of(bound)
        return serve_app(app, engine, bound, grace=config.grace, announce=lambda: on_ready(url))


def load(
    config: ServeConfig, choose_mesh: ChooseMesh | None = None
) -> tuple[Served, Mesh | None, list[str]]:
    """Load everything that answers.

    Returns:
        What answers, its mesh, and notes, such as where each guide scores.

    Raises:
        InputError: For wrong checkpoints, templates and meshes.
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
    # Requests and scorers of texts encode concurrently, which a single tokenizer cannot do.
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
    """The search of requests that leave out everything optional."""
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
    """A line for each missing chat template that chats need.

    `guides` are the templates of the guides that read the policy's tokens.
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
    """A job of the usual method, with a prompt of `config.warm_up` tokens."""
    config = reader.config
    if not config.warm_up:
        return []
    body = Completion(model=config.name, prompt=[[0] * config.warm_up], seed=0)
    try:
        jobs = reader.completion(body)
    except ApiError as error:
        raise InputError(f"warming up: {error.message}; see also --warm-up") from None
    # One chunk compiles everything that a longer response needs.
    return [replace(job, request=replace(job.request, limit=1)) for job in jobs]


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one.

    Raises:
        InputError: If it cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"--host {host} --port {port}: {reason}; choose others (port 0: any)"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach a bound socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


class Connection(H11Protocol):
    """HTTP/1.1 that closes a connection without a request's headers within `_HEADER_SECONDS`.

    The time runs from the connection's start, and from the answer to the previous request.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As in asyncio's protocols."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """As in asyncio's protocols."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """As in uvicorn's protocol."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """As in asyncio's protocols."""
        self._rest()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Set a deadline, unless a request has all its headers and is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

    def _rest(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """uvicorn whose first signal starts an orderly end, and whose second one speeds it up.

    The third one drops open requests without an answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        settings = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_LAST_WORDS,
            backlog=_BACKLOG,
        )
        super().__init__(settings)
        self.signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count a signal; it is not raised again at the end, so that the exit status is 0."""
        self.signals += 1
        if self.signals > 2:
            self.should_exit = self.force_exit = True


def serve_app(
    app: ASGIApp,
    engine: Engine,
    bound: socket.socket,
    *,
    grace: float,
    announce: Callable[[], None],
) -> bool:
    """Serve until SIGTERM or SIGINT; then refuse jobs, wait up to `grace` seconds, and answer 503.

    Args:
        app: The application.
        engine: Its engine.
        bound: The socket.
        grace: Seconds for the jobs in progress.
        announce: Called once the engine is ready.

    Returns:
        False if the engine failed.
    """
    engine.start()
    is_sound = asyncio.run(run_server(Server(app), engine, bound, grace, announce))
    if is_sound and engine.is_running:
        _end_at_once()
    return is_sound


def _end_at_once() -> None:
    """End the process with status 0, though a thread is compiling, which cannot be interrupted.

    A normal exit would destroy objects that the compiler is using, and abort.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


async def run_server(
    server: Server, engine: Engine, bound: socket.socket, grace: float, announce: Callable[[], None]
) -> bool:
    """Run a server and its engine, which has started, as in `serve_app`."""
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    is_announced = False
    while not (serving.done() or server.signals or engine.state == "failed"):
        if not is_announced and server.started and engine.state == "ready":
            is_announced = True
            announce()
        await asyncio.sleep(_TICK)
    engine.drain()
    clock = asyncio.get_running_loop().time
    deadline = clock() + grace
    while not engine.is_idle and clock() < deadline and server.signals < 2:
        await asyncio.sleep(_TICK)
    # All open requests are answered at once; the thread may still end a chunk or a compilation.
    await asyncio.to_thread(engine.stop, _LAST_CHUNK)
    server.should_exit = True
    await serving
    if cut_off := set(server.server_state.tasks):
        await asyncio.wait(cut_off, timeout=_LAST_WORDS)
    return engine.state != "failed"
