"""The loss of a batch: which terms read which rows, and how sums become one number.

Each term's sum is divided by its token (or pair) count over the whole optimiser step, all
processes and accumulated batches included, so that 8 × 1 and 1 × 8 give the same gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retort.distill.bands import Bands
from retort.distill.batch import Batch, Tagger, stream_mask, stream_pairs
from retort.distill.config import DistillConfig
from retort.distill.hidden import HeadlessModel
from retort.distill.losses import (
    AcceptanceMetric,
    DivergenceTerm,
    SftTerm,
    SpanTerm,
    Term,
    TermSum,
    chunked_loss,
)
from retort.distill.spans import SpanTagger
from retort.distill.teachers import Teacher

STREAMS = ("supervised", "distilled", "contrasted")


@dataclass(frozen=True)
class Stream:
    """Terms that read the rows of one stream, with their weights (0: measured only)."""

    name: str
    terms: tuple[Term, ...]
    weights: Mapping[str, float]
    pairs: bool = False


_EMPTY = Stream("", (), {})


class Objective:
    """The weighted sum of the recipe's terms.

    Attributes:
        streams: what is computed; a stream without terms is left out.
        measured: what an evaluation with a teacher computes: acceptance for every method.
        bands: DAC-KL's state, None without it.
        tagger: gives span ids, None without a span loss.
    """

    def __init__(
        self, config: DistillConfig, tokenizer: Any, device: torch.device | str = "cpu"
    ) -> None:
        self.config, recipe = config, config.recipe
        self.bands: Bands | None = None
        if recipe.distils and recipe.divergence == "dac":
            settings, rate = config.dac_settings(), config.dac_learning_rate
            self.bands = Bands(settings, rate, config.seed, device)
        self.tagger: Tagger | None = None
        if recipe.span_weight:
            self.tagger = SpanTagger(tokenizer, config.span_chunker, config.seed)
        streams = (self._supervised(), self._distilled(), self._contrasted())
        self.streams = tuple(stream for stream in streams if stream.terms)
        alpha = Stream("distilled", (AcceptanceMetric(),), {})
        self.measured = self.streams if recipe.distils else (*self.streams, alpha)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term of the loss."""
        return {name: w for s in self.streams for name, w in s.weights.items()}

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many tokens (pairs, for span) each term reads in ``batch``."""
        found: dict[str, int] = {}
        for stream in self.streams:
            mask = stream_mask(batch, stream.name)
            tokens = int(mask.sum())
            found |= {term.name: tokens for term in stream.terms}
            if stream.pairs:
                found["span"] = int(stream_pairs(batch, mask)[:-1].sum())
        return found

    def sums(
        self,
        student: HeadlessModel,
        teacher: Teacher | None,
        batch: Batch,
        through: Any = None,
        streams: tuple[Stream, ...] | None = None,
    ) -> dict[str, TermSum]:
        """Every term's sum over ``batch``; one forward of the student for all of them.

        ``through`` is the student as accelerate wrapped it; ``streams`` are the training's by
        default.
        """
        places = batch.get("position_ids")
        hidden = student.hidden(batch["input_ids"], batch["attention_mask"], through, places)
        found: dict[str, TermSum] = {}
        for stream in self.streams if streams is None else streams:
            mask = stream_mask(batch, stream.name)
            signal = (
                teacher.signal(batch, mask) if teacher and stream.name != "supervised" else None
            )
            found |= chunked_loss(
                hidden[mask],
                student.head,
                batch["targets"][mask],
                stream.terms,
                signal=signal,
                pairs=stream_pairs(batch, mask) if stream.pairs else None,
                temperature=self.config.temperature,
                chunk_size=self.config.loss_chunk_size or None,
            )
        return found

    def combine(self, sums: Mapping[str, TermSum], counts: Mapping[str, float]) -> Tensor:
        """Σ weight · sum / count; a term of which the step holds nothing adds 0."""
        parts = [
            sums[name].total * (weight / max(counts[name], 1))
            for name, weight in self.weights.items()
        ]
        return torch.stack(parts).sum()

    def _supervised(self) -> Stream:
        weight = self.config.recipe.sft_weight
        return Stream(
            "supervised", (SftTerm(),) if weight else (), {"sft": weight} if weight else {}
        )

    def _distilled(self) -> Stream:
        recipe = self.config.recipe
        if not recipe.distils:
            return _EMPTY
        terms: list[Term] = [self._divergence(), AcceptanceMetric()]
        weights = {terms[0].name: recipe.divergence_weight}
        if recipe.span_weight:
            terms.append(SpanTerm(self.config.span_distance))
            weights["span"] = recipe.span_weight
        return Stream("distilled", tuple(terms), weights, pairs=bool(recipe.span_weight))

    def _contrasted(self) -> Stream:
        recipe = self.config.recipe
        if not (recipe.distils and recipe.contrast):
            return _EMPTY
        term = DivergenceTerm(self.config.divergence_function(recipe.contrast), "contrast")
        return Stream("contrasted", (term,), {term.name: recipe.divergence_weight})

    def _divergence(self) -> Term:
        if self.bands is not None:
            return self.bands.term
        name = self.config.recipe.divergence
        return DivergenceTerm(self.config.divergence_function(name), name)
