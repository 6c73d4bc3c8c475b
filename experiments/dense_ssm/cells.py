"""What is run: a cell is one training run, named by what makes it different from the others.

Sizes are for one slow core. A model is described by a family and a variant; the variants without
dense connection are widened until they have as many parameters as the m = 2 model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import retort

FAMILIES = ("retnet", "mamba")
GRID = {"retnet": (3e-3, 1e-2, 3e-2, 1e-1), "mamba": (3e-3, 1e-2, 3e-2)}
CORPORA = ("wikitext2", "tinyshakespeare")
VOCABULARY, BLOCK, BATCH = 2048, 256, 8
STEPS = {"wikitext2": 400, "tinyshakespeare": 200, "mqar": 1000}
GRID_STEPS = {"wikitext2": 130, "tinyshakespeare": 100, "mqar": 300}

# Changes of the configuration. DenseMamba's dense layers bring no norms: it has no control of them.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "retnet": {
        "m0": {"dense_block_layers": 0},
        "m0-norms": {"dense_block_layers": 0, "dense_norms": True},
        "m1": {"dense_block_layers": 1},
        "m2": {"dense_block_layers": 2},
        "m4": {"dense_block_layers": 4},
        "m2-no-gate": {"dense_block_layers": 2, "dense_gate": False},
    },
    "mamba": {
        **{f"m{m}": {"dense_block_layers": m} for m in (0, 1, 2, 4)},
        "m2-no-gate": {"dense_block_layers": 2, "dense_gate": False},
    },
}
MAIN = {"retnet": ("m0", "m2", "m0-norms"), "mamba": ("m0", "m2")}

_TEXT = {
    "retnet": {
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "query_key_dim": 64,
        "intermediate_k_select_scale": 8,
        "intermediate_v_select_scale": 8,
        "initializer_range": 0.09,  # width ** -0.5: the default 0.02 is for ten times the width
        "tie_word_embeddings": True,
    },
    "mamba": {
        "num_hidden_layers": 4,
        "state_size": 8,
        "time_step_rank": 8,
        "intermediate_select_scale": 8,
        "tie_word_embeddings": True,
    },
}
_RECALL = {
    "retnet": _TEXT["retnet"] | {"query_key_dim": 32, "initializer_range": 0.125},
    "mamba": _TEXT["mamba"] | {"time_step_rank": 4},
}


@dataclass(frozen=True)
class Cell:
    """One run: corpus × family × variant × learning rate × seed; a grid's cell is shorter."""

    corpus: str
    family: str
    variant: str
    learning_rate: float
    seed: int
    grid: bool = False

    @property
    def name(self) -> str:
        """Name of the cell's files."""
        kind = "grid-" if self.grid else ""
        rate = f"{self.learning_rate:g}"
        return f"{kind}{self.corpus}-{self.family}-{self.variant}-lr{rate}-s{self.seed}"

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return (GRID_STEPS if self.grid else STEPS)[self.corpus]

    def to_dict(self) -> dict[str, Any]:
        """The fields, as a result holds them."""
        return asdict(self)


def width(corpus: str) -> int:
    """Hidden size of the m = 2 model."""
    return 64 if corpus == "mqar" else 128


def model_config(corpus: str, family: str, variant: str, vocabulary: int) -> dict[str, Any]:
    """Configuration values of a cell's model, widened so that all variants have equal size."""
    sizes = (_RECALL if corpus == "mqar" else _TEXT)[family]
    base = {**sizes, **VARIANTS[family][variant], "vocab_size": vocabulary}
    dense = {**sizes, **VARIANTS[family]["m2"], "vocab_size": vocabulary}
    start = width(corpus)
    wanted = parameters(family, **dense, hidden_size=start)
    candidates = range(start, start + 17, 2)
    best = min(candidates, key=lambda h: abs(parameters(family, **base, hidden_size=h) - wanted))
    return {**base, "hidden_size": best}


def parameters(family: str, **values: Any) -> int:
    """Number of parameters, tied ones once; no memory is taken."""
    return _parameters(family, tuple(sorted(values.items())))


@cache
def _parameters(family: str, values: tuple[tuple[str, Any], ...]) -> int:
    retort.registry.install_hooks()
    config = AutoConfig.for_model(f"dense_{family}", **dict(values))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


Rate = Any  # (corpus, family, variant) → learning rate


def plan(
    best: Rate, seeds: Sequence[int] = (1, 2, 3), families: Sequence[str] = FAMILIES
) -> Iterator[Cell]:
    """Every cell, the most informative first; ``best`` is asked only once a grid is done."""
    for seed in seeds:
        for family in families:
            if seed == seeds[0]:
                yield from grid("wikitext2", family)
            yield from main("wikitext2", family, seed, best)
    for seed in seeds[:2]:
        for family in families:
            if seed == seeds[0]:
                yield from grid("tinyshakespeare", family)
            yield from main("tinyshakespeare", family, seed, best)
    for family in families:
        yield from grid("mqar", family)
        yield from main("mqar", family, seeds[0], best)
    for family in families:
        for variant in ("m1", "m4", "m2-no-gate"):
            rate = best("wikitext2", family, "m2")
            yield Cell("wikitext2", family, variant, rate, seeds[0])
    for seed in seeds[1:]:
        for family in families:
            yield from main("mqar", family, seed, best)


def grid(corpus: str, family: str) -> Iterator[Cell]:
    """The same learning rates for every variant, one seed, shorter."""
    for rate in GRID[family]:
        for variant in MAIN[family]:
            yield Cell(corpus, family, variant, rate, 0, grid=True)


def main(corpus: str, family: str, seed: int, best: Rate) -> Iterator[Cell]:
    """One seed of the variants that are compared, each at its own best learning rate."""
    for variant in MAIN[family]:
        yield Cell(corpus, family, variant, best(corpus, family, variant), seed)
