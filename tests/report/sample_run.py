"""Records of an imaginary run, as a trainer and the demo would leave them, for the tests."""

import math
import random

from retort.provenance import Provenance
from retort.report import (
    Correction,
    DecodingRow,
    EvaluationRow,
    Heading,
    RunRecords,
    Sample,
)


def training(steps: int = 120) -> list[dict]:
    """A log whose numbers have the shape of a real one."""
    draw = random.Random(0)

    def noisy(value: float, share: float = 0.06) -> float:
        return value * (1 + draw.gauss(0, share))

    records = []
    for step in range(1, steps + 1):
        fall = math.exp(-step / 40)
        sft, dac, span = noisy(3 + 2.5 * fall), noisy(0.8 + 2.2 * fall), noisy(0.02 + 0.05 * fall)
        coverage = min(1.0, noisy(0.957 + 0.04 * fall, 0.004))
        upper, lower = noisy(0.9 + 0.15 * fall, 0.01), noisy(0.03 + 0.02 * fall, 0.2)
        nll = noisy(3.4 + fall)
        records.append(
            {
                "step": step,
                "loss": sft + dac + span,
                "sft": sft,
                "dac": dac,
                "span": span,
                "acceptance": noisy(0.34 - 0.29 * fall, 0.03),
                "scrg/corrected": float(draw.randint(5, 8)),
                "scrg/regenerated_tokens": float(draw.randint(80, 190)),
                "scrg/share_without_error": min(1.0, max(0.0, draw.gauss(0.12 * (1 - fall), 0.03))),
                "scrg/per_1000_tokens": 14.0 - 4.0 * fall,
                "scrg/nll_change": -0.4 + 0.3 * fall,
                "scrg/nll_change_low": -0.6 + 0.3 * fall,
                "scrg/nll_change_high": -0.2 + 0.3 * fall,
                "scrg/nll_before": nll,
                "scrg/nll_after": nll - noisy(0.4, 0.2),
                "dac/coverage": coverage,
                "dac/coverage_low": coverage - 0.02,
                "dac/coverage_high": min(1.0, coverage + 0.012),
                "dac/lower": lower,
                "dac/upper": upper,
                "dac/width": upper - lower,
                "dac/hidden_share": noisy(0.05, 0.2),
                "span/pairs": float(draw.randint(300, 420)),
                "time/rollout": noisy(1.9),
                "time/teacher": noisy(0.8),
                "time/train": noisy(1.4),
                "source/dataset": 0.5,
                "source/student": 0.5,
                "learning_rate": 6e-4 * (1 - step / steps),
                "grad_norm": noisy(1.2, 0.3),
                "epoch": step / steps,
            }
        )
        if step % 30 == 0:
            records[-1]["eval_loss"] = 3.9 + 2.4 * fall
    return records


DECODING = [
    DecodingRow("plain", 8, 256, 3.02, 84.8, 1.0, 0.0, True, 0, 0, 0.0),
    DecodingRow("padded", 8, 256, 2.9, 88.3, 1.48, 0.41, True, 1204, 83, 7.0),
    DecodingRow("unpadded (prompt lookup)", 8, 256, 1.74, 147.1, 1.48, 0.0, True, 402, 83, 2.3),
    DecodingRow("unpadded (student)", 8, 256, 3.01, 85.0, 1.0, 0.0, True, 6, 0, 0.02),
]

EVALUATION = [
    EvaluationRow("rouge_l", 4.1, 13.6, low=7.9, high=11.2),
    EvaluationRow("acceptance", 0.021, 0.142, note="32 completions, 1,024 tokens"),
    EvaluationRow("perplexity", 48211.0, 212.4, 17.9, higher_is_better=False),
]

SAMPLES = [
    Sample(
        "Write one sentence about the sea.",
        "The sea is a vast expanse of water that covers most of the planet and shelters "
        "millions of species.",
        "the the of of sea , , and and the the of of",
        "The sea is a large body of water that is the most of the world.",
    ),
    Sample("List three fruits.", "1. Apples\n2. Bananas\n3. Oranges", None, "1. Apple\n2. The"),
]

CORRECTIONS = [
    Correction(
        "What makes bread rise?",
        ["Bread", " rises", " because", " of", " the", " sun", ",", " and", " the", " sun"],
        5,
        " yeast",
        ", which makes gas out of sugar",
        step=84,
        divergence=6.31,
    ),
    Correction("Name a colour.", ["Blue", "\n", "\n", "\n"], 1, "<|im_end|>", step=90),
]

HEADING = Heading(
    "SmolLM2-135M-Instruct → DenseRetNet",
    "A student of 3 layers over the teacher's embedding and head, taught by multi-granularity "
    "semantic revision.",
)

PROVENANCE = Provenance(
    arguments={"method": "mgsr", "learning_rate": 6e-4, "max_steps": 120, "hub_token": "hf_x"},
    seeds={"seed": 0, "data": 1},
    versions={"retort-lm": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    commit="0123456789abcdef0123456789abcdef01234567",
    platform={"system": "Linux", "processor": "a CPU", "python": "3.11.2", "cores": 2},
    time="2026-01-02T03:04:05+00:00",
    command=["retort", "demo", "--output", "a run"],
)


def records() -> RunRecords:
    """All parts of the imaginary run."""
    return RunRecords(training(), DECODING, EVALUATION, SAMPLES, CORRECTIONS, PROVENANCE, HEADING)
