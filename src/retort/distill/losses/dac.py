"""DAC-KL, the distribution-adaptive clipping KL of MGSR (arXiv 2407.10068, section 3.2).

Symbols: K slots of the teacher's likeliest ids, sorted, with probabilities p_t and p_s; a further
slot for the target where it lies outside of them; mid = cumsum(p_t) − p_t / 2, a slot's place on
the teacher's cumulative scale; (l, u) the band; m the share of a slot that the band keeps:

    m = σ((u − mid) / τ) σ((mid − l) / τ),  m_target = 1
    P = m p_t,  Q = m p_s,  each with a tail bucket for all that is not kept
    DAC-KL = KL(P ‖ Q)

The tail bucket is [ours]: without it P and Q are no distributions and the loss turns negative.
So is the constraint of `learned`: clipping is a coarsening, which never raises a KL, so a band
trained by the loss alone closes to one class (the mode `literal`).
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retort.distill.losses.rows import TermSum, TokenRows
from retort.distill.signals import split
from retort.errors import ConfigurationError

MODES = ("learned", "fixed", "literal")


@dataclass(frozen=True)
class DacSettings:
    """Constants of DAC-KL. Raises ConfigurationError for values that cannot work."""

    mode: str = "learned"
    top_k: int = 64
    tau: float = 0.02
    lower: float | None = None
    """The `fixed` band's ends; None is the full band, −4τ and 1 + 4τ."""
    upper: float | None = None
    coverage: float = 0.95
    """`learned`: least mean share of the top-K's mass that the band keeps."""
    min_coverage: float = 0.8
    """`learned`: a token whose band keeps less falls back to the full band ..."""
    max_hidden: float = 0.1
    """... and so does one whose band hides more than this share of its KL."""
    dual_rate: float = 2.0
    dual_max: float = 20.0
    dual_min: float = 1.0
    """Keeps the constraint priced while it is slack. From 0, where it winds down to while the band
    is still full, λ lags tens of steps behind a band that begins to narrow (seen on real data)."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigurationError(f"dac mode {self.mode!r}: use one of {list(MODES)}.")
        if self.top_k < 1 or self.tau <= 0:
            raise ConfigurationError(f"top_k = {self.top_k}, tau = {self.tau}: need ≥ 1 and > 0.")
        lower, upper = self.fixed_band
        if lower > upper:
            raise ConfigurationError(
                f"dac_lower={lower:g} lies above dac_upper={upper:g}: such a band keeps nothing"
            )

    @property
    def full_band(self) -> tuple[float, float]:
        """(l, u) that keeps everything: the soft edges, 4τ wide, lie outside [0, 1]."""
        return -4 * self.tau, 1 + 4 * self.tau

    @property
    def fixed_band(self) -> tuple[float, float]:
        """(l, u) of mode `fixed`."""
        low, high = self.full_band
        lower = low if self.lower is None else self.lower
        return lower, high if self.upper is None else self.upper


class BandNetwork(nn.Module):
    """The sub-network: top-32 log-probabilities of both models [N, 64] → 64 → (l, u).

    l and u lie within [−4τ, 1 + 4τ] with u ≥ l by construction. The last layer starts at zero
    weights and biases that open the band, so that training begins with nothing clipped.
    """

    def __init__(self, features: int = 32, hidden: int = 64, tau: float = 0.02) -> None:
        super().__init__()
        self.features = features
        self.ends = (-4 * tau, 1 + 4 * tau)
        self.inner = nn.Linear(2 * features, hidden)
        self.outer = nn.Linear(hidden, 2)
        nn.init.zeros_(self.outer.weight)
        with torch.no_grad():
            self.outer.bias.copy_(torch.tensor([-6.0, 6.0]))

    def forward(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """(l, u), each [N], from sorted log-probabilities [N, K]; no gradient to the models."""
        pair = [self._features(log_probs) for log_probs in (teacher, student)]
        raw = self.outer(F.silu(self.inner(torch.cat(pair, 1)))).sigmoid()
        low, high = self.ends
        lower = low + (high - low) * raw[:, 0]
        return lower, lower + (high - lower) * raw[:, 1]

    def _features(self, log_probs: Tensor) -> Tensor:
        kept = log_probs.detach()[:, : self.features].clamp_min(-30)
        padded = F.pad(kept, (0, self.features - kept.shape[1]), value=-30.0)
        return padded.to(self.inner.weight.dtype) / 10


@dataclass
class DacState:
    """What DAC-KL carries between optimiser steps: the constraint's dual variable λ."""

    dual: float = 1.0
    updates: int = 0

    def update(self, coverage: float, settings: DacSettings) -> None:
        """Dual ascent, once an optimiser step: λ ← λ + rate (target − mean coverage), clipped.

        coverage: the global mean of the step (statistic `coverage` over count, all ranks).
        """
        moved = self.dual + settings.dual_rate * (settings.coverage - coverage)
        self.dual = min(max(moved, settings.dual_min), settings.dual_max)
        self.updates += 1

    def state_dict(self) -> dict[str, float]:
        """Plain numbers for a JSON checkpoint (Python's JSON keeps every bit of a float)."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores what `state_dict` gave."""
        self.dual, self.updates = float(state["dual"]), int(state["updates"])


class Slots(NamedTuple):
    """Teacher and student on the K + 1 slots; log-probabilities, FLOOR in an unused slot K + 1."""

    teacher: Tensor  # [N, K + 1], the first K sorted
    student: Tensor  # [N, K + 1]
    teacher_rest: Tensor  # [N] log-mass outside all slots
    student_rest: Tensor  # [N]
    is_target: Tensor  # bool [N, K + 1]


class DacTerm:
    """DAC-KL as a term.

    Statistics (sums over counted tokens): `coverage`, `lower`, `upper` and `width` (u − l) of the
    network's or the fixed band; `full_kl`, the KL with nothing clipped, and `hidden_kl`, what that
    band hides of it (their ratio is the hidden share); squares of
    coverage and width; `widened`, the tokens that fell back to the full band. In mode
    `learned` the total has the *value* of the KL sum and the *gradient* of the Lagrangian
    Σ KL + λ (0.95 − coverage).
    """

    name = "dac"

    def __init__(
        self,
        settings: DacSettings | None = None,
        network: BandNetwork | None = None,
        state: DacState | None = None,
    ) -> None:
        self.settings = settings or DacSettings()
        self.network = network
        self.state = state or DacState()
        _check_network(self.settings, network)

    def __call__(self, rows: TokenRows) -> TermSum:
        """Sums DAC-KL over counted rows."""
        slots = target_slots(rows, self.settings.top_k)
        lower, upper = self._band(slots)
        keep = band_share(slots, lower, upper, self.settings.tau)
        full = clipped_kl(slots, band_share(slots, *self.settings.full_band, self.settings.tau))
        losses, covered = clipped_kl(slots, keep), coverage(slots, keep)
        stats = {"coverage": covered, "width": upper - lower, "lower": lower, "upper": upper}
        stats |= {
            f"{name}_squared": stats[name].double().square() for name in ("coverage", "width")
        }
        stats |= {"full_kl": full, "hidden_kl": full - losses}
        losses, stats["widened"] = self._widen(losses, full, covered)
        return _sum(rows.counted, self._constrain(losses, covered), stats)

    def _band(self, slots: Slots) -> tuple[Tensor, Tensor]:
        if self.settings.mode == "fixed" or self.network is None:
            lower, upper = self.settings.fixed_band
            rest = slots.teacher_rest
            return torch.full_like(rest, lower), torch.full_like(rest, upper)
        k = slots.teacher.shape[1] - 1
        return self.network(slots.teacher[:, :k], slots.student[:, :k])

    def _widen(self, losses: Tensor, full: Tensor, covered: Tensor) -> tuple[Tensor, Tensor]:
        """Replaces the loss of tokens whose learned band keeps too little (never a chunk's)."""
        if self.settings.mode != "learned":
            return losses, torch.zeros_like(losses)
        with torch.no_grad():
            # 1e-6 nats: two equal predictions hide nothing, whatever rounding says.
            hides = losses + 1e-6 < (1 - self.settings.max_hidden) * (full + 1e-6)
            widen = hides | (covered < self.settings.min_coverage)
        return torch.where(widen, full, losses), widen.to(losses.dtype)

    def _constrain(self, losses: Tensor, covered: Tensor) -> Tensor:
        if self.settings.mode != "learned":
            return losses
        penalty = self.state.dual * (self.settings.coverage - covered)
        return losses + (penalty - penalty.detach())


def target_slots(rows: TokenRows, top_k: int) -> Slots:
    """The teacher's top K ids with both models' log-probabilities, and the target's slot.

    A target inside the top K marks its slot; outside, it takes slot K + 1 (once). A row that does
    not count, or a target beyond the shared vocabulary, marks nothing.
    """
    ids = _likeliest(rows, top_k)
    inside = (rows.targets >= 0) & (rows.targets < rows.width)
    target = rows.targets.where(inside, -1)[:, None]
    found = (ids == target) & (ids >= 0)
    extra = target.masked_fill(found.any(1, keepdim=True), -1)
    ids = torch.cat([ids, extra], 1)
    teacher, teacher_rest = split(rows.teacher, ids)
    student, student_rest = split(rows.student, ids)
    return Slots(teacher, student, teacher_rest, student_rest, torch.cat([found, extra >= 0], 1))


def _likeliest(rows: TokenRows, top_k: int) -> Tensor:
    """The teacher's sorted likeliest ids [N, K]; −1 where a top-k signal knows fewer."""
    if rows.support is None:
        return rows.teacher.topk(min(top_k, rows.width), dim=-1).indices
    known, _ = split(rows.teacher, rows.support)
    order = known.topk(min(top_k, known.shape[1]), dim=-1).indices
    return rows.support.gather(1, order)


def band_share(slots: Slots, lower: Tensor | float, upper: Tensor | float, tau: float) -> Tensor:
    """m [N, K + 1]: each slot's share kept by the band (l, u), floats or [N]; 1 at the target."""
    p = slots.teacher.exp()
    mid = p.cumsum(1) - p / 2
    low, high = (torch.as_tensor(end, dtype=p.dtype, device=p.device) for end in (lower, upper))
    soft = ((high[..., None] - mid) / tau).sigmoid() * ((mid - low[..., None]) / tau).sigmoid()
    return soft.masked_fill(slots.is_target, 1.0)


def clipped_kl(slots: Slots, keep: Tensor) -> Tensor:
    """KL(P ‖ Q) [N] of the clipped distributions with their tail buckets; never negative.

    keep: m [N, K + 1]. log P − log Q of a slot is log p_t − log p_s, whatever m.
    """
    p, q = slots.teacher.exp(), slots.student.exp()
    tiny = torch.finfo(p.dtype).tiny
    p_tail = (slots.teacher_rest.exp() + ((1 - keep) * p).sum(1)).clamp_min(tiny)
    q_tail = (slots.student_rest.exp() + ((1 - keep) * q).sum(1)).clamp_min(tiny)
    kept = (keep * p * (slots.teacher - slots.student)).sum(1)
    return (kept + p_tail * (p_tail.log() - q_tail.log())).clamp_min(0)


def coverage(slots: Slots, keep: Tensor) -> Tensor:
    """Share [N] of the top-K's mass (the target's extra slot left out) that m keeps; 1 of none."""
    p = slots.teacher[:, :-1].exp()
    hidden = ((1 - keep[:, :-1]) * p).sum(1)
    return 1 - hidden / p.sum(1).clamp_min(torch.finfo(p.dtype).tiny)


def _check_network(settings: DacSettings, network: BandNetwork | None) -> None:
    if settings.mode != "fixed" and network is None:
        raise ConfigurationError(f"dac mode {settings.mode!r} needs a BandNetwork.")
    if settings.mode == "literal":
        warnings.warn(
            "dac mode 'literal' trains the band by the loss alone and closes it to one class; "
            "it is meant for ablations.",
            stacklevel=3,
        )


def _sum(counted: Tensor, losses: Tensor, stats: dict[str, Tensor]) -> TermSum:
    # In double: a spread is the difference of two sums that are nearly equal
    sums = {name: (value.detach().double() * counted).sum() for name, value in stats.items()}
    return TermSum((losses * counted).sum(), counted.sum(), sums)
