"""A real HTTP server that speaks /v1/completions, well or badly, as a script says.

Its good answers depend on the prompt, the seed and the choice alone, so that runs can be compared.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

WORDS = (" sun", " rain", " crab", " owl", "ice", "\n", " Ω", ".")


@dataclass(frozen=True)
class Reply:
    """What goes out: raw bytes with a status; after `delay` seconds; closed without one if drop.

    A body that is cut is not all that its header says there is.
    """

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False
    cut: bool = False


def error(status: int, message: str = "no", delay: float = 0.0, code: str = "", **headers: str):
    body = json.dumps({"error": {"message": message, "type": "fake", "code": code or None}})
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(body.encode(), status, named, delay)


def words(text: str, seed: int, choice: int, count: int) -> tuple[str, str]:
    """(text, finish_reason) of a choice: each word ends the text with a chance of one in eight."""
    said = ""
    for step in range(count):
        spelled = repr((text + said, seed, choice, step)).encode()
        number = hashlib.blake2b(spelled, digest_size=2).digest()
        if number[0] % 8 == 0:
            return said, "stop"
        said += WORDS[number[1] % len(WORDS)]
    return said, "length"


def completion(body: dict[str, Any]) -> dict[str, Any]:
    """A good answer, as a value that a script may spoil."""
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    choices = []
    for asked in prompts:
        # A token is a letter here.
        prompt = asked if isinstance(asked, str) else "".join(map(chr, asked))
        for lane in range(body.get("n", 1)):
            text, finish = words(prompt, body.get("seed", 0), lane, body["max_tokens"])
            index = len(choices)
            choices.append({"index": index, "text": text, "finish_reason": finish})
            if body.get("return_token_ids"):
                ids = {
                    "prompt_token_ids": list(map(ord, prompt)),
                    "token_ids": list(map(ord, text)),
                }
                choices[-1].update(ids)
    usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 3 * len(choices)}
    usage["total_tokens"] = sum(usage.values())
    head = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": body["model"]}
    return {**head, "choices": choices, "usage": usage}


def good(body: dict[str, Any], delay: float = 0.0) -> Reply:
    return Reply(json.dumps(completion(body)).encode(), delay=delay)


Script = Callable[[int, dict[str, Any]], Reply | None]


class FakeAPI:
    """`with FakeAPI(script) as api:` serves at api.url; script(number, body) gives a Reply or None.

    None is a good answer. bodies and headers hold what was received, in order; most is the highest
    number of requests at the same time; times is when each came.
    """

    def __init__(self, script: Script = lambda number, body: None):
        self.script, self.lock = script, threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.now = self.most = 0
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or every body waits until its head is acknowledged

            def do_POST(self) -> None:
                api.answer(self)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        reply = self.script(number, body)
        reply = good(body) if reply is None else reply
        if handler.path != "/v1/completions":
            reply = error(404, f"no such path {handler.path}")
        time.sleep(reply.delay)
        with self.lock:
            self.now -= 1
        if reply.drop:
            handler.close_connection = True
            return
        try:
            handler.send_response(reply.status)
            headers = {"content-type": "application/json", **reply.headers}
            length = len(reply.body) + reply.cut
            for name, value in {**headers, "content-length": str(length)}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(reply.body)
            handler.close_connection |= reply.cut
        except OSError:
            handler.close_connection = True  # the client has given up

    def __enter__(self) -> "FakeAPI":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
