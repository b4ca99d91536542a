"""The server's numbers for Prometheus, in a registry of their own."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """Counters and histograms of one server; every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = (partial(kind, registry=self.registry) for kind in (Counter, Gauge))
        seconds = partial(Histogram, buckets=_SECONDS, registry=self.registry)
        self.requests = counter(
            "w2s_requests", "Requests by endpoint and HTTP status", ("endpoint", "status")
        )
        self.seconds = seconds(
            "w2s_request_seconds", "Seconds from request to the end of its answer", ("endpoint",)
        )
        self.first_seconds = seconds(
            "w2s_first_chunk_seconds", "Seconds from a prompt's arrival to its first chunk"
        )
        self.waiting_seconds = seconds(
            "w2s_queue_seconds", "Seconds that a prompt waited for a slot"
        )
        self.chunk_seconds = seconds(
            "w2s_chunk_seconds", "Seconds of one chunk for all slots of a program", ("method",)
        )
        self.queue = gauge("w2s_queue_depth", "Prompts that wait for a slot")
        self.slots = gauge("w2s_slots_in_use", "Prompts in slots")
        self.programs = gauge("w2s_programs", "Compiled searches with memory on the device")
        self.prompt_tokens = counter("w2s_prompt_tokens", "Prompt tokens read")
        self.tokens = counter("w2s_tokens_generated", "Tokens of the responses that were returned")
        self.cancelled = counter(
            "w2s_cancelled", "Prompts whose client went away, or that shutting down cut off"
        )
