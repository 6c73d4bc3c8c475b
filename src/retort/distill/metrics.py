"""Sums of a training run between two log records, and the numbers that are logged of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch

from retort.distill.losses import TermSum
from retort.distill.sequences.scrg import Counts

Sums = dict[str, float]


class Meter:
    """Adds up named numbers; everything is a plain sum, so that processes can be added too."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float)

    def add(self, values: Mapping[str, float]) -> None:
        """Add to each name."""
        for name, value in values.items():
            self.sums[name] += value

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the seconds inside to ``time/<phase>``."""
        started = perf_counter()
        yield
        self.sums[f"time/{phase}"] += perf_counter() - started

    def take(self) -> Sums:
        """The sums; the meter starts again at 0."""
        taken, self.sums = dict(self.sums), defaultdict(float)
        return taken

    def state_dict(self) -> Sums:
        """Plain numbers for a JSON checkpoint."""
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what `state_dict` gave."""
        self.sums = defaultdict(float, state)


def term_sums(sums: Mapping[str, TermSum]) -> Sums:
    """Terms as plain numbers, "<term>.total", "<term>.count" and "<term>.<statistic>"."""
    found: dict[str, Any] = {}
    for name, term in sums.items():
        found |= {f"{name}.total": term.total, f"{name}.count": term.count}
        found |= {f"{name}.{stat}": value for stat, value in term.stats.items()}
    if not found:
        return {}
    values = torch.stack([v.detach().double() for v in found.values()]).tolist()  # one transfer
    return dict(zip(found, values, strict=True))


def term_means(sums: Mapping[str, float]) -> Sums:
    """Logged names of `term_sums`, means a token or pair; a term without any is left out."""
    names = [key.removesuffix(".total") for key in sums if key.endswith(".total")]
    means = {n: sums[f"{n}.total"] / c for n in names if (c := sums.get(f"{n}.count", 0))}
    if sums.get("dac.count"):
        means |= _dac(sums)
    if "span.count" in sums:
        means["span/pairs"] = sums["span.count"]
    return means


def scrg_sums(counts: Counts) -> Sums:
    """Counts of revisions as sums."""
    return {f"scrg.{name}": float(value) for name, value in asdict(counts).items()}


def scrg_numbers(sums: Mapping[str, float]) -> Sums:
    """Logged names of `scrg_sums`; counts are counts since the record before."""
    if not sums.get("scrg.texts"):
        return {}
    found = {
        "scrg/corrected": sums["scrg.corrected"],
        "scrg/per_1000_tokens": 1000 * sums["scrg.corrected"] / max(sums["scrg.tokens_before"], 1),
        "scrg/regenerated_tokens": sums["scrg.regenerated_tokens"],
        "scrg/share_without_error": sums["scrg.without_error"] / sums["scrg.texts"],
        "scrg/nll_before": sums["scrg.nll_before"] / max(sums["scrg.tokens_before"], 1),
        "scrg/nll_after": sums["scrg.nll_after"] / max(sums["scrg.tokens_after"], 1),
    }
    forwarded = [key for key in sums if key.startswith(("scrg.student_", "scrg.teacher_"))]
    return found | _nll_change(sums) | {key.replace(".", "/"): sums[key] for key in forwarded}


def _nll_change(sums: Mapping[str, float]) -> Sums:
    """Mean change of a text's NLL by revision with its 95 % interval, paired over texts."""
    count, total = sums["scrg.texts"], sums.get("scrg.nll_change")
    if total is None:  # a meter of a checkpoint from before it was kept
        return {}
    mean = total / count
    spread = max(sums["scrg.nll_change_squared"] - count * mean**2, 0.0)
    margin = 1.96 * math.sqrt(spread / max(count - 1, 1) / count)
    ends = {"scrg/nll_change_low": mean - margin, "scrg/nll_change_high": mean + margin}
    return {"scrg/nll_change": mean, **(ends if count > 1 else {})}


def numbers(sums: Mapping[str, float]) -> Sums:
    """A log record of a meter's sums; seconds are summed over processes too."""
    sources = {k: v for k, v in sums.items() if k.startswith("source/")}
    total = sum(sources.values())
    rest = {k: v for k, v in sums.items() if k.startswith(("time/", "rollout/"))}
    shares = {k: v / total for k, v in sources.items()}
    if judged := sums.get("skd.judged", 0):
        shares["skd/replaced"] = sums["skd.replaced"] / judged
    return term_means(sums) | scrg_numbers(sums) | shares | rest


def _dac(sums: Mapping[str, float]) -> Sums:
    count, full = sums["dac.count"], sums["dac.full_kl"]
    spread = _spread("coverage", 0.0, 1.0, sums) | _spread("width", 0.0, math.inf, sums)
    return spread | {
        "dac/lower": sums["dac.lower"] / count,
        "dac/upper": sums["dac.upper"] / count,
        "dac/coverage": sums["dac.coverage"] / count,
        "dac/width": sums["dac.width"] / count,
        "dac/widened": sums["dac.widened"] / count,
        "dac/full_kl": full / count,
        "dac/hidden_share": sums["dac.hidden_kl"] / full if full else 0.0,
    }


def _spread(name: str, least: float, most: float, sums: Mapping[str, float]) -> Sums:
    """Mean ∓ one standard deviation over tokens, which the report draws as a band."""
    count, squared = sums["dac.count"], sums.get(f"dac.{name}_squared")
    if squared is None:  # a meter of a checkpoint from before it was kept
        return {}
    mean = sums[f"dac.{name}"] / count
    deviation = math.sqrt(max(squared / count - mean**2, 0.0))
    ends = {"low": max(mean - deviation, least), "high": min(mean + deviation, most)}
    return {f"dac/{name}_{end}": value for end, value in ends.items()}
