"""What a run leaves behind to be read: small typed records, written as JSON by `store`.

``None`` always means *not measured*; the page says so and computes nothing in its place.

The training log is a list of plain dictionaries, one a logging step, each with an integer
``step`` and any metric names (`retort.report.metrics` lists those that are plotted). Counts such
as ``scrg/corrected`` are counts since the previous record, so that their sum is the total.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from retort.errors import ConfigurationError
from retort.provenance import Provenance

TrainingRecord = dict[str, Any]
"""``{"step": int, "<metric>": float, ...}``"""

NEGLIGIBLE_DRAFT_LENGTH = 0.05
"""Below this many drafts a row and step the draft budget counts as 0."""


@dataclass(frozen=True)
class DecodingRow:
    """One way to decode a batch, as measured.

    ``arm`` is "plain", "padded", "unpadded (prompt lookup)", "unpadded (student)" or another name;
    ``tokens_per_step`` is what one row gained in one step on average, ``mean_draft_length`` the
    drafts that one row was given in one step, ``padding_share`` the share of positions computed
    for padding, in [0, 1]; ``outputs_equal`` says whether the tokens were those of plain decoding.
    """

    arm: str
    batch_size: int
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    tokens_per_step: float | None = None
    padding_share: float | None = None
    outputs_equal: bool | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    mean_draft_length: float | None = None
    note: str = ""

    @property
    def speculates(self) -> bool:
        """Whether drafts belong to this arm: one without a draft count, or plain, has none."""
        measured = self.mean_draft_length is not None or self.draft_tokens is not None
        return measured and not self.arm.startswith("plain")

    @property
    def gave_up_drafting(self) -> bool:
        """Whether the draft budget fell to 0, so that the arm decoded as plain decoding does."""
        length = self.mean_draft_length
        if length is None:
            length = None if self.draft_tokens is None else float(self.draft_tokens)
        return self.speculates and length is not None and length < NEGLIGIBLE_DRAFT_LENGTH


@dataclass(frozen=True)
class EvaluationRow:
    """A metric of the student before and after training.

    Known metrics are "rouge_l" (against the teacher's texts, 0 to 100), "acceptance" (α, 0 to 1)
    and "perplexity"; others are shown under their own names. ``reference`` is the teacher's own
    score; ``low`` and ``high`` bound the 95 % interval of after − before (`paired_bootstrap`).
    """

    metric: str
    before: float | None = None
    after: float | None = None
    reference: float | None = None
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One prompt with the teacher's completion and the student's before and after training.

    ``marked`` are the first character, and the one behind the last, of the token in ``after`` that
    SCRG would make ``replacement``.
    """

    prompt: str
    teacher: str | None = None
    before: str | None = None
    after: str | None = None
    note: str = ""
    marked: list[int] | None = None
    replacement: str = ""

    def __post_init__(self) -> None:
        places = [0, *(self.marked or [0, 0]), len(self.after or "")]
        if len(places) != 4 or places != sorted(places):
            raise ConfigurationError(f"sample: marked={self.marked} is no part of its text after")


@dataclass(frozen=True)
class Correction:
    """One SCRG revision: ``tokens[position]`` (``original``) became ``replacement``.

    ``tokens`` are the texts of the student's own completion tokens, ``regenerated`` is the text
    that the student wrote after the replacement, ``divergence`` KL(teacher‖student) there.
    """

    prompt: str
    tokens: list[str]
    position: int
    replacement: str
    regenerated: str = ""
    step: int | None = None
    divergence: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.position < len(self.tokens):
            raise ConfigurationError(
                f"correction: position {self.position} lies outside its {len(self.tokens)} tokens"
            )

    @property
    def original(self) -> str:
        """The student's own token at the corrected position."""
        return self.tokens[self.position]


@dataclass(frozen=True)
class Heading:
    """What the run is called and a sentence on it, at the top of the page."""

    title: str = "Retort run"
    description: str = ""


@dataclass(frozen=True)
class RunRecords:
    """Everything that the page can show; empty parts are shown as not measured."""

    training: list[TrainingRecord] = field(default_factory=list)
    decoding: list[DecodingRow] = field(default_factory=list)
    evaluation: list[EvaluationRow] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    provenance: Provenance | None = None
    heading: Heading = field(default_factory=Heading)
