"""The cells of the experiment as data: what is trained, from what, and in which order.

A cell is one training run and its evaluation. Its name is its file: ``results/<name>.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

METHODS = ("sft", "kd", "mgsr", "gkd", "distillm")
MAIN_SEEDS = (1, 2)
ABLATION_SEEDS = (1, 2, 3)
START_SEED = 0  # of the teacher and of the students that all methods start from
TUNING_SEED = MAIN_SEEDS[0]
LEARNING_RATES = (7e-5, 2e-4)
"""The same grid for every method, judged on the validation file alone, by runs of the method's
whole budget: in shorter ones the smallest rate wins, because it does least. The best of them is the
first seed's run and is not trained again."""

OTHERS = ("rkl", "jsd", "imitkd", "distillm2", "abkd", "skd")

# From nothing to MGSR, one part at a time; the last of them is mgsr itself.
_PLAIN: dict[str, Any] = {"scrg": False, "divergence": "forward_kl", "span_weight": 0.0}
ABLATION: dict[str, dict[str, Any]] = {
    "none": _PLAIN,
    "scrg": {**_PLAIN, "scrg": True},
    "scrg+dac": {"span_weight": 0.0},
    "scrg+dac+span": {},
}
# The band of equal coverage is set by hand: the share of top-K mass that learned bands keep.
VARIANTS: dict[str, dict[str, Any]] = {
    "dac-top-k": {"dac_mode": "fixed"},
    "dac-fixed-band": {"dac_mode": "fixed", "dac_lower": 0.0, "dac_upper": 0.95},
    "span-spacy": {"span_chunker": "spacy"},
    "span-random": {"span_chunker": "random"},
}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        stage: teacher, base, tune, main, ablation, variant, other; prefixed by ``retnet-`` for
            the DenseRetNet student; ``joint`` trains nothing.
        label: the method, or the ablation's step.
        method: a preset of `retort.distill.presets`.
        overrides: further arguments of `DistillConfig`.
        learning_rate: None takes the best of the method's tuning cells.
    """

    stage: str
    label: str
    method: str
    seed: int
    learning_rate: float | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique, and a file's name."""
        rate = f"-{self.learning_rate:g}" if self.stage == "tune" else ""
        return f"{self.stage}-{self.label}{rate}-seed{self.seed}"

    @property
    def retnet(self) -> bool:
        """Whether the student is a DenseRetNet."""
        return self.stage.startswith("retnet-")

    @property
    def keeps_model(self) -> bool:
        """Whether its trained student stays in the working folder."""
        return self.stage not in ("tune", "joint")


TEACHER = Cell("teacher", "sft", "sft", START_SEED, learning_rate=5e-5)
_HEALING = {"method": "kd", "seed": START_SEED, "learning_rate": 1e-3}
BASE = Cell("base", "sft+kd", **_HEALING, overrides={"sft_weight": 1.0})
RETNET_BASE = Cell("retnet-base", "sft+kd", **_HEALING, overrides={"sft_weight": 1.0})
RETNET_METHODS = ("sft", "kd", "mgsr")
JOINT = Cell("joint", "drafters", "sft", 1)


def plan() -> list[Cell]:
    """Every cell, the most informative first: each claim by one seed, then further seeds."""
    return [
        TEACHER,
        BASE,
        *(cell for method in METHODS for cell in (*tuning(method), _main(method, MAIN_SEEDS[0]))),
        *(_ablation(step, ABLATION_SEEDS[0]) for step in list(ABLATION)[:-1]),
        *_once("seqkd"),
        RETNET_BASE,
        *(Cell("retnet-main", method, method, 1) for method in RETNET_METHODS),
        JOINT,
        *(_main(method, seed) for seed in MAIN_SEEDS[1:] for method in METHODS),
        *(_ablation(step, seed) for seed in ABLATION_SEEDS[1:] for step in list(ABLATION)[:-1]),
        *(_main("mgsr", seed) for seed in ABLATION_SEEDS if seed not in MAIN_SEEDS),
        *(Cell("variant", label, "mgsr", 1, None, VARIANTS[label]) for label in VARIANTS),
        *(cell for method in OTHERS for cell in _once(method)),
    ]


def needs(cell: Cell) -> set[str]:
    """Names of the cells whose models or results the cell reads."""
    if cell == TEACHER:
        return set()
    if cell in (BASE, RETNET_BASE):
        return {TEACHER.name}
    if cell == JOINT:
        return {RETNET_BASE.name, *(f"retnet-main-{method}-seed1" for method in RETNET_METHODS)}
    start = (RETNET_BASE if cell.retnet else BASE).name
    rates = [] if cell.stage == "tune" else [c.name for c in tuning(cell.method)]
    return {TEACHER.name, start, *rates}


def tuning(method: str) -> Iterator[Cell]:
    """The method's learning rates."""
    return (Cell("tune", method, method, TUNING_SEED, rate) for rate in LEARNING_RATES)


def _main(method: str, seed: int) -> Cell:
    return Cell("main", method, method, seed)


def _once(method: str) -> list[Cell]:
    return [*tuning(method), Cell("other", method, method, MAIN_SEEDS[0])]


def _ablation(step: str, seed: int) -> Cell:
    return Cell("ablation", step, "mgsr", seed, None, ABLATION[step])
