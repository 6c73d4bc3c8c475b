"""Distillation losses: per-token terms over a dense or a top-k teacher signal, in token chunks."""

from retort.distill.losses.chunked import SftTerm, chunked_loss
from retort.distill.losses.dac import BandNetwork, DacSettings, DacState, DacTerm
from retort.distill.losses.divergence import (
    DIVERGENCES,
    AcceptanceMetric,
    DivergenceTerm,
    divergence,
)
from retort.distill.losses.rows import IGNORED, Term, TermSum, TokenRows
from retort.distill.losses.span import SPAN_DISTANCES, SpanTerm

__all__ = [
    "DIVERGENCES",
    "IGNORED",
    "SPAN_DISTANCES",
    "AcceptanceMetric",
    "BandNetwork",
    "DacSettings",
    "DacState",
    "DacTerm",
    "DivergenceTerm",
    "SftTerm",
    "SpanTerm",
    "Term",
    "TermSum",
    "TokenRows",
    "chunked_loss",
    "divergence",
]
