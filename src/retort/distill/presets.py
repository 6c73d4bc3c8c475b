"""Methods as data: which sequences a student learns from, and by which losses.

Every method is a mix of two streams. The *supervised* stream is the dataset's completion with
cross-entropy. The *distilled* stream compares student and teacher by a divergence (and the span
loss); a share `lmbda` of its sequences is written by the student itself, the rest comes from the
dataset. With `scrg`, what the student wrote is revised before it is learned from.

A preset only gives defaults: each of its values is a key of `DistillConfig` of the same name.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from retort.errors import ConfigurationError


@dataclass(frozen=True)
class Preset:
    """One method.

    Attributes:
        source: the paper, and what differs from it.
        sft_weight: weight of cross-entropy on the dataset's completions.
        divergence: "dac" or a name of `retort.distill.losses.DIVERGENCES`.
        divergence_weight, span_weight: weights on the distilled stream.
        lmbda: share of the distilled stream that the student writes.
        scrg: revise what the student wrote by the teacher.
    """

    source: str
    sft_weight: float = 0.0
    divergence: str = "forward_kl"
    divergence_weight: float = 0.0
    span_weight: float = 0.0
    lmbda: float = 0.0
    scrg: bool = False

    @property
    def distils(self) -> bool:
        """Whether there is a distilled stream, for which a teacher is needed."""
        return self.divergence_weight > 0 or self.span_weight > 0

    @property
    def reads_dataset(self) -> bool:
        """Whether rows need a completion."""
        return self.sft_weight > 0 or (self.distils and self.lmbda < 1)

    @property
    def writes(self) -> bool:
        """Whether the student writes sequences while it is trained."""
        return self.distils and self.lmbda > 0


_DAC = "dac"

# fmt: off
PRESETS: dict[str, Preset] = {
    "sft": Preset("cross-entropy on the dataset", sft_weight=1.0),
    "kd": Preset("word-level KD (arXiv 1503.02531)", divergence_weight=1.0),
    "rkl": Preset("reverse KL on student text (arXiv 2306.08543, without its reward terms)", divergence="reverse_kl", divergence_weight=1.0, lmbda=1.0),  # noqa: E501
    "mgsr": Preset("MGSR (arXiv 2407.10068), DAC under a coverage constraint", 1.0, _DAC, 1.0, 1.0, lmbda=1.0, scrg=True),  # noqa: E501
}
# fmt: on

KEYS = tuple(f.name for f in fields(Preset) if f.name != "source")
"""The keys of a preset that a configuration may override."""


def preset(name: str) -> Preset:
    """The named preset. Raises ConfigurationError for an unknown name."""
    if name not in PRESETS:
        raise ConfigurationError(f"method {name!r}: use one of {sorted(PRESETS)}")
    return PRESETS[name]
