"""Compare ways of decoding the same prompts: interleaved repeats, ratios pair by pair.

Machines drift; so every repeat runs all arms one after the other, every second one in reverse
order, and what is quoted is the median over repeats of an arm's speed divided by the baseline's of
the same repeat.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

Tokens = list[list[int]]


@dataclass(frozen=True)
class Measurement:
    """One arm, once: what it decoded and how fast.

    ``tokens`` and ``seconds`` count decoding only (passes without prompt slices); ``total_seconds``
    is the whole call; ``drafted_rows`` is how many rows had a draft verified.
    """

    token_ids: Tokens
    tokens: int
    seconds: float
    total_seconds: float
    tokens_per_step: float = 1.0
    padding_share: float = 0.0
    row_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    drafted_rows: int = 0


Arm = Callable[[Sequence[Sequence[int]], int, int], Measurement]
"""Of prompts, most new tokens, and rows that decode at once."""


@dataclass
class ArmResult:
    """An arm over all repeats."""

    arm: str
    batch_size: int
    prompts: int
    equal_to_plain: bool
    tokens: int
    row_steps: int
    tokens_per_second: float
    tokens_per_step: float
    padding_share: float
    draft_tokens: int
    accepted_tokens: int
    drafted_rows: int
    prefill_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    speeds: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compare(
    arms: dict[str, Arm],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    repeats: int,
    warmup: int = 1,
    batch_size: int | None = None,
) -> Iterator[ArmResult]:
    """Run ``arms`` interleaved; the first is the baseline that ratios and equality refer to.

    Args:
        arms: name → function of (prompts, max_new_tokens, batch_size).
        prompts: token ids.
        repeats: counted rounds.
        warmup: rounds that are not counted.
        batch_size: rows that decode at once, others wait for a place; default all.
    """
    size = len(prompts) if batch_size is None else batch_size
    orders = (list(arms), list(reversed(arms)))
    rounds = [
        {name: arms[name](prompts, max_new_tokens, size) for name in orders[i % 2]}
        for i in range(warmup + repeats)
    ][warmup:]
    base = next(iter(arms))
    for name in arms:
        yield _summary(name, size, [r[name] for r in rounds], [r[base] for r in rounds])


def engine_arm(engine: Any, **sampling: Any) -> Arm:
    """An arm that decodes on an engine, which keeps what it learnt between repeats.

    ``sampling`` goes to every request, such as ``ignore_eos=True`` for texts of one length.
    """
    import time

    from retort.decode.stats import EngineStats

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int, size: int) -> Measurement:
        engine.stats, engine.scheduler.max_batch_size = EngineStats(), size
        passes = engine.target.forward_tokens, engine.target.padding_tokens
        started = time.perf_counter()
        limit = {"max_new_tokens": max_new_tokens, **sampling}
        outputs = engine.generate([list(p) for p in prompts], **limit)
        total, stats = time.perf_counter() - started, engine.stats
        computed = engine.target.forward_tokens - passes[0]
        padding = engine.target.padding_tokens - passes[1]
        return Measurement(
            token_ids=[o.token_ids for o in outputs],
            tokens=stats.decode_tokens,
            seconds=stats.decode_seconds,
            total_seconds=total,
            tokens_per_step=stats.tokens_per_step,
            padding_share=padding / computed,
            row_steps=stats.row_steps,
            draft_tokens=stats.draft_tokens,
            accepted_tokens=stats.accepted_tokens,
            drafted_rows=sum(o.stats.draft_tokens > 0 for o in outputs),
        )

    return run


def grouped_arm(arm: Callable[[Sequence[Sequence[int]], int], Measurement]) -> Arm:
    """An arm that decodes fixed batches, one after the other."""

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int, size: int) -> Measurement:
        groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        parts = [arm(group, max_new_tokens) for group in groups]
        return Measurement(
            token_ids=[row for part in parts for row in part.token_ids],
            tokens=sum(part.tokens for part in parts),
            seconds=sum(part.seconds for part in parts),
            total_seconds=sum(part.total_seconds for part in parts),
        )

    return run


def _summary(name: str, size: int, mine: list[Measurement], base: list[Measurement]) -> ArmResult:
    speeds = [m.tokens / m.seconds for m in mine]
    ratios = [s / (b.tokens / b.seconds) for s, b in zip(speeds, base, strict=True)]
    low, high = _interval(ratios)
    return ArmResult(
        arm=name,
        batch_size=size,
        prompts=len(mine[0].token_ids),
        equal_to_plain=all(m.token_ids == base[0].token_ids for m in mine),
        tokens=int(median(m.tokens for m in mine)),
        row_steps=int(median(m.row_steps for m in mine)),
        tokens_per_second=median(speeds),
        tokens_per_step=median(m.tokens_per_step for m in mine),
        padding_share=median(m.padding_share for m in mine),
        draft_tokens=int(median(m.draft_tokens for m in mine)),
        accepted_tokens=int(median(m.accepted_tokens for m in mine)),
        drafted_rows=int(median(m.drafted_rows for m in mine)),
        prefill_seconds=median(m.total_seconds - m.seconds for m in mine),
        ratio=median(ratios),
        ratio_low=low,
        ratio_high=high,
        speeds=speeds,
    )


def _interval(ratios: Sequence[float], samples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median ratio."""
    rng = random.Random(0)
    medians = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(samples))
    return medians[int(0.025 * samples)], medians[int(0.975 * samples)]
