"""Samples as numbers: throughput, percentiles of latency, acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from retort.bench.load import Sample


@dataclass(frozen=True)
class Quantiles:
    """Mean, median and 99th percentile, in milliseconds; None where nothing was measured."""

    mean: float | None
    p50: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quantiles:
        """From seconds; percentiles are interpolated."""
        if not seconds:
            return cls(None, None, None)
        mean, p50, p99 = np.mean(seconds), *np.percentile(seconds, [50, 99])
        return cls(*(round(float(x) * 1000, 3) for x in (mean, p50, p99)))


@dataclass(frozen=True)
class Summary:
    """What a load's clients saw together.

    Attributes:
        requests, failed: sent, and those of them that got an error.
        seconds: from the first request to the last end.
        output_throughput: generated tokens a second.
        total_throughput: with the prompts' tokens.
        ttft: request to first text.
        itl: between the pieces of a stream (inter-token latency, per step).
        tpot: time after the first text by its number of tokens: what a token took.
        e2e: request to end.
        acceptance: accepted by drafted tokens, None without drafts.
        acceptance_length: 1 + accepted by drafts.
    """

    requests: int
    failed: int
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    request_throughput: float
    output_throughput: float
    total_throughput: float
    ttft: Quantiles
    itl: Quantiles
    tpot: Quantiles
    e2e: Quantiles
    draft_tokens: int
    accepted_tokens: int
    acceptance: float | None
    acceptance_length: float | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def summarize(samples: Sequence[Sample], seconds: float | None = None) -> Summary:
    """The summary of one run; ``seconds`` replaces its length, for several runs together."""
    good = [s for s in samples if s.error is None]
    if seconds is None:
        seconds = duration(samples)
    tokens, prompts = sum(s.tokens for s in good), sum(s.prompt_tokens for s in good)
    drafted, accepted = sum(s.draft_tokens for s in good), sum(s.accepted_tokens for s in good)
    drafts = sum(s.drafts for s in good)
    return Summary(
        requests=len(samples),
        failed=len(samples) - len(good),
        seconds=seconds,
        prompt_tokens=prompts,
        cached_tokens=sum(s.cached_tokens for s in good),
        tokens=tokens,
        request_throughput=_per(len(good), seconds),
        output_throughput=_per(tokens, seconds),
        total_throughput=_per(tokens + prompts, seconds),
        ttft=Quantiles.of([s.first for s in good if s.first is not None]),
        itl=Quantiles.of([gap for s in good for gap in s.gaps]),
        tpot=Quantiles.of([token_time(s) for s in good if s.first is not None and s.tokens > 1]),
        e2e=Quantiles.of([s.last for s in good]),
        draft_tokens=drafted,
        accepted_tokens=accepted,
        acceptance=accepted / drafted if drafted else None,
        acceptance_length=1 + accepted / drafts if drafts else None,
    )


def duration(samples: Sequence[Sample]) -> float:
    """Seconds from the first request to the last end."""
    if not samples:
        return 0.0
    return max(s.sent + s.last for s in samples) - min(s.sent for s in samples)


def rows(summary: Summary) -> list[tuple[str, str]]:
    """The lines of a table: what, and how much."""
    s = summary
    return [
        ("requests (failed)", f"{s.requests} ({s.failed})"),
        ("duration, s", f"{s.seconds:.1f}"),
        ("prompt tokens (from kept prefixes)", f"{s.prompt_tokens} ({s.cached_tokens})"),
        ("generated tokens", f"{s.tokens}"),
        ("requests/s", f"{s.request_throughput:.2f}"),
        ("generated tokens/s", f"{s.output_throughput:.1f}"),
        ("all tokens/s", f"{s.total_throughput:.1f}"),
        *((f"{name}, ms: mean / p50 / p99", _line(q)) for name, q in _latencies(s)),
        ("accepted / drafted tokens", _accepted(s)),
    ]


def _latencies(s: Summary) -> list[tuple[str, Quantiles]]:
    return [
        ("time to first token", s.ttft),
        ("inter-token latency (a step)", s.itl),
        ("time per output token", s.tpot),
        ("whole request", s.e2e),
    ]


def _line(q: Quantiles) -> str:
    if q.mean is None or q.p50 is None or q.p99 is None:
        return "not measured"
    return f"{q.mean:.1f} / {q.p50:.1f} / {q.p99:.1f}"


def _accepted(s: Summary) -> str:
    if s.acceptance is None:
        return "no drafts"
    return f"{s.accepted_tokens} / {s.draft_tokens} ({s.acceptance:.0%})"


def token_time(s: Sample) -> float:
    """Seconds of a token after the first, in the mean of one answer of at least two."""
    return (s.last - (s.first or 0.0)) / (s.tokens - 1)


def _per(count: int, seconds: float) -> float:
    return count / seconds if seconds else 0.0
