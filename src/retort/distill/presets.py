"""Methods as data: which sequences a student learns from, and by which losses.

Every method is a mix of three streams. The *supervised* stream is the offline completion with
cross-entropy. The *distilled* stream compares student and teacher by a divergence (and the span
loss); a share `lmbda` of its sequences is written by the student itself, the rest is offline text.
The *contrasted* stream, where there is one, takes the student's texts out of the distilled stream
and compares them by a divergence of their own. Offline text is the dataset's completion or the
teacher's. With `scrg`, what the student wrote is revised before it is learned from.

A preset only gives defaults: each of its values is a key of `DistillConfig` of the same name.
docs/papers/distillation.md says of each what its paper does and what differs here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from retort.errors import ConfigurationError

ADAPTIVE = "adaptive"
"""The value of ``lmbda`` that leaves the student's share to DistiLLM's scheduler."""


@dataclass(frozen=True)
class Preset:
    """One method.

    Attributes:
        source: the paper, and what differs from it.
        sft_weight: weight of cross-entropy on offline completions.
        divergence: "dac" or a name of `retort.distill.losses.DIVERGENCES`.
        divergence_weight, span_weight: weights on the distilled stream.
        lmbda: share of the distilled stream that the student writes, or "adaptive".
        scrg: revise what the student wrote by the teacher.
        completions: "dataset" or "teacher": who wrote the offline text.
        contrast: divergence of the student's texts, where it is another one; every prompt then
            gives its offline text as well. Weighted by ``divergence_weight`` too.
        do_sample: the student draws its texts instead of taking the likeliest tokens.
        interleave_top_k: K of speculative KD: the teacher replaces tokens of the student's text
            that are not among its K likeliest; 0 is off.
        replay_buffer_size: student texts that are kept for reuse; 0 keeps none.
    """

    source: str
    sft_weight: float = 0.0
    divergence: str = "forward_kl"
    divergence_weight: float = 0.0
    span_weight: float = 0.0
    lmbda: float | str = 0.0
    scrg: bool = False
    completions: str = "dataset"
    contrast: str = ""
    do_sample: bool = False
    interleave_top_k: int = 0
    replay_buffer_size: int = 0

    @property
    def distils(self) -> bool:
        """Whether student and teacher are compared."""
        return self.divergence_weight > 0 or self.span_weight > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is needed, to be compared with or to write."""
        return self.distils or self.completions == "teacher"

    @property
    def adaptive(self) -> bool:
        """Whether DistiLLM's scheduler chooses the sequences."""
        return self.lmbda == ADAPTIVE

    @property
    def writes(self) -> bool:
        """Whether the student writes sequences while it is trained."""
        return self.distils and self.lmbda != 0

    @property
    def reads_offline(self) -> bool:
        """Whether there are sequences that the student did not write."""
        return self.sft_weight > 0 or (self.distils and (self.lmbda != 1 or bool(self.contrast)))

    @property
    def reads_dataset(self) -> bool:
        """Whether rows need a completion."""
        return self.reads_offline and self.completions == "dataset"


# fmt: off
PRESETS: dict[str, Preset] = {
    "sft": Preset("cross-entropy on the dataset", sft_weight=1.0),
    "seqkd": Preset("SeqKD (arXiv 1606.07947), greedy for beam search", sft_weight=1.0, completions="teacher"),  # noqa: E501
    "kd": Preset("word-level KD (arXiv 1503.02531)", divergence_weight=1.0),
    "rkl": Preset("reverse KL on student text (arXiv 2306.08543, without its reward terms)", divergence="reverse_kl", divergence_weight=1.0, lmbda=1.0, do_sample=True),  # noqa: E501
    "jsd": Preset("JSD(0.5) on the dataset (arXiv 2307.15190; supervised GKD of 2306.13649)", divergence="jsd", divergence_weight=1.0),  # noqa: E501
    "imitkd": Preset("ImitKD (arXiv 2009.07253), full distributions, a constant share", divergence_weight=1.0, lmbda=0.5, do_sample=True),  # noqa: E501
    "gkd": Preset("GKD (arXiv 2306.13649), JSD(0.5), drawn a sequence at a time", divergence="jsd", divergence_weight=1.0, lmbda=0.5, do_sample=True),  # noqa: E501
    "distillm": Preset("DistiLLM (arXiv 2402.03898), forward skew 0.1, without its pre-training loss", divergence="skew_forward_kl", divergence_weight=1.0, lmbda=ADAPTIVE, do_sample=True, replay_buffer_size=1000),  # noqa: E501
    "distillm2": Preset("DistiLLM-2 (arXiv 2503.07067), constant skews and weights, fresh texts", divergence="skew_forward_kl", divergence_weight=0.5, lmbda=1.0, completions="teacher", contrast="skew_reverse_kl", do_sample=True),  # noqa: E501
    "abkd": Preset("ABKD (arXiv 2505.04560), α = 0.2, β = 0.7 on the dataset", divergence="alpha_beta", divergence_weight=1.0),  # noqa: E501
    "skd": Preset("speculative KD (arXiv 2410.11325), K = 25, forward KL", divergence_weight=1.0, lmbda=1.0, do_sample=True, interleave_top_k=25),  # noqa: E501
    "mgsr": Preset("MGSR (arXiv 2407.10068), DAC under a coverage constraint", 1.0, "dac", 1.0, 1.0, lmbda=1.0, scrg=True),  # noqa: E501
}
# fmt: on

KEYS = tuple(f.name for f in fields(Preset) if f.name != "source")
"""The keys of a preset that a configuration may override."""


def preset(name: str) -> Preset:
    """The named preset. Raises ConfigurationError for an unknown name."""
    if name not in PRESETS:
        raise ConfigurationError(f"method {name!r}: use one of {sorted(PRESETS)}")
    return PRESETS[name]


def contradiction(recipe: Preset) -> str | None:
    """What cannot be together in a method, in one line; None where all is well."""
    writes = "and with lmbda=0 (or nothing compared) it writes nothing: raise lmbda or leave it out"
    rules = [
        (recipe.distils or recipe.sft_weight, "every loss weight is 0"),
        (not recipe.scrg or recipe.writes, f"scrg revises what the student writes, {writes}"),
        (
            not recipe.interleave_top_k or recipe.writes,
            f"interleave_top_k corrects what the student writes, {writes}",
        ),
        (not recipe.contrast or recipe.writes, f"contrast reads student text, {writes}"),
        (
            not (recipe.scrg and recipe.interleave_top_k),
            "scrg and interleave_top_k both correct the student's text: choose one",
        ),
        (
            recipe.completions == "dataset" or recipe.reads_offline,
            "completions='teacher' is never read with lmbda=1: lower lmbda, or set contrast",
        ),
        (
            not (recipe.contrast and recipe.adaptive),
            "contrast needs student text in every step, lmbda='adaptive' gives it in some",
        ),
    ]
    return next((text for fine, text in rules if not fine), None)
