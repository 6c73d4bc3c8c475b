"""Which losses compare student and teacher, and their constants."""

# ruff: noqa: RUF009  # `say` returns a dataclass field

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retort.distill.losses import DIVERGENCES, SPAN_DISTANCES, DacSettings
from retort.train.arguments import say


@dataclass
class LossOptions:
    """Terms, weights and the constants of DAC-KL and of the span loss."""

    sft_weight: float | None = say(None, "Weight of cross-entropy on the dataset.")
    divergence: str | None = say(
        None, f"Distance to the teacher: dac, {', '.join(DIVERGENCES)}; by default the method's."
    )
    divergence_weight: float | None = say(None, "Weight of the distance to the teacher.")
    contrast: str | None = say(
        None, "Another divergence for student text; every prompt then gives offline text as well."
    )
    divergence_parameters: dict[str, Any] | str | None = say(
        None, "Parameters of the divergence, as JSON, e.g. '{\"alpha\": 0.1}'."
    )
    beta: float | None = say(None, "β of jsd: 0 is forward KL, 1 reverse KL.")
    span_weight: float | None = say(None, "Weight of the span loss.")
    temperature: float = say(1.0, "Divides both models' logits in all terms but sft.")
    loss_chunk_size: int = say(
        64, "Tokens whose logits exist at once; 0: all (faster, but holds tokens × vocabulary)."
    )
    dac_mode: str = say(
        DacSettings.mode, "Band of DAC-KL: learned (under the constraint) or fixed."
    )
    dac_top_k: int = say(
        DacSettings.top_k, "K: the teacher's likeliest tokens that DAC-KL looks at."
    )
    dac_temperature: float = say(DacSettings.tau, "τ: softness of the band's edges.")
    dac_coverage: float = say(
        DacSettings.coverage, "Least mean share of the top-K's mass that a band keeps."
    )
    dac_min_coverage: float = say(
        DacSettings.min_coverage, "A token below this share falls back to the full band."
    )
    dac_max_hidden: float = say(
        DacSettings.max_hidden, "So does one whose band hides more of its KL than this."
    )
    dac_lower: float | None = say(None, "Lower end of a fixed band; by default all is kept.")
    dac_upper: float | None = say(None, "Upper end of a fixed band.")
    dac_dual_rate: float = say(DacSettings.dual_rate, "Step of the constraint's dual variable.")
    dac_dual_max: float = say(DacSettings.dual_max, "Largest value of the dual variable.")
    dac_learning_rate: float = say(1e-3, "Learning rate of the sub-network that sets the band.")
    span_distance: str = say("l2", f"Distance of correlations: {', '.join(SPAN_DISTANCES)}.")
    span_chunker: str = say("punctuation", "Finds spans: punctuation, spacy, random.")
