"""Prometheus metrics, with vLLM's names under ``retort:`` so that dashboards port by a rename."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from retort.serve.messages import Gauges

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)


class Metrics:
    """The metrics of one server; a registry of its own, so that two servers fit in one process.

    Args:
        model: the served model's name, the label of every sample.
        capacity: tokens that the cache may hold.
    """

    def __init__(self, model: str, capacity: int = 0) -> None:
        self.capacity = capacity
        self._registry = CollectorRegistry()
        self._model = model
        self._define_gauges()
        self._define_counters()
        self._define_times()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def step(self, before: Gauges, now: Gauges) -> None:
        """The engine's state moved on."""
        self._running.set(now.running)
        self._waiting.set(now.waiting)
        self._cache.set(now.cached_tokens / self.capacity if self.capacity else 0.0)
        self._steps.inc(now.steps - before.steps)
        self._preemptions.inc(now.preemptions - before.preemptions)
        self._packed.inc(now.packed_tokens - before.packed_tokens)
        self._drafts.inc(now.drafts - before.drafts)
        self._draft_tokens.inc(now.draft_tokens - before.draft_tokens)
        self._accepted.inc(now.accepted_tokens - before.accepted_tokens)
        self._prefix_queries.inc(now.prefix_queries - before.prefix_queries)
        self._prefix_hits.inc(now.prefix_hits - before.prefix_hits)
        old = [*before.accepted_per_position, *[0] * len(now.accepted_per_position)]
        for position, (was, count) in enumerate(zip(old, now.accepted_per_position, strict=False)):
            self._per_position.labels(self._model, str(position)).inc(count - was)

    def prompt(self, tokens: int) -> None:
        """A request's prompt was let in."""
        self._prompt_tokens.inc(tokens)

    def finished(self, reason: str, count: int = 1) -> None:
        """Requests ended."""
        self._success.labels(self._model, reason).inc(count)

    def queued(self, seconds: float) -> None:
        """A request waited this long for a row."""
        self._queue.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """A request's first token came."""
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float) -> None:
        """A later step gave a row tokens, ``seconds`` after the one before."""
        self._itl.observe(seconds)

    def generated(self, tokens: int) -> None:
        """Tokens for a client."""
        self._generated.inc(tokens)

    def request(self, seconds: float) -> None:
        """A request ended."""
        self._e2e.observe(seconds)

    def _define_gauges(self) -> None:
        self._running = self._gauge("num_requests_running", "Rows that decode or read a prompt.")
        self._waiting = self._gauge("num_requests_waiting", "Rows that wait.")
        self._cache = self._gauge("kv_cache_usage_perc", "Share of the cache in use, 0 to 1.")

    def _define_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.")
        self._generated = self._counter("generation_tokens", "Generated tokens.")
        self._preemptions = self._counter("num_preemptions", "Rows that had to make room.")
        self._steps = self._counter("engine_steps", "Passes of the model.")
        self._packed = self._counter("packed_tokens", "Tokens through the linear layers.")
        self._drafts = self._counter("spec_decode_num_drafts", "Drafts verified.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Draft tokens.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Accepted tokens.")
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up among kept prefixes."
        )
        self._prefix_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens found there and not read again."
        )
        self._per_position = self._labelled(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted by place in the draft.", "position"
        )
        self._success = self._labelled("request_success", "Ended requests.", "finished_reason")

    def _define_times(self) -> None:
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.")
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Between the steps that gave a row tokens.", _FAST
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.")
        self._queue = self._histogram("request_queue_time_seconds", "Wait for a row.")

    def _gauge(self, name: str, text: str) -> Gauge:
        made = Gauge(f"retort:{name}", text, ["model_name"], registry=self._registry)
        return made.labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        made = Counter(f"retort:{name}", text, ["model_name"], registry=self._registry)
        return made.labels(self._model)

    def _labelled(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"retort:{name}", text, ["model_name", label], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _SLOW) -> Histogram:
        made = Histogram(
            f"retort:{name}", text, ["model_name"], registry=self._registry, buckets=buckets
        )
        return made.labels(self._model)
