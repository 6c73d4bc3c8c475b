"""Which logged metrics belong in which plot. Metrics that no plot claims go into a table."""

from __future__ import annotations

from dataclasses import dataclass

_PREFIXES = ("train/", "loss/", "mgsr/", "distill/")


@dataclass(frozen=True)
class Panel:
    """A plot: ``lines`` are (metric, name in the legend); ``prefix`` adds a line a metric under it.

    ``bands`` are (lower metric, upper metric, name): the area between two metrics. A metric
    ``x`` that comes with ``x_low`` and ``x_high`` is drawn with that band as well.
    """

    key: str
    title: str
    hint: str
    lines: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    bands: tuple[tuple[str, str, str], ...] = ()
    references: tuple[tuple[float, str], ...] = ()
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Group:
    """Plots under one heading."""

    title: str
    panels: tuple[Panel, ...]


def _one(key: str, metric: str, title: str, hint: str, **more: object) -> Panel:
    return Panel(key, title, hint, ((metric, title),), **more)  # type: ignore[arg-type]


GROUPS: tuple[Group, ...] = (
    Group(
        "Loss terms and acceptance",
        (
            Panel(
                "loss",
                "Total loss",
                "The weighted sum that is minimised.",
                (("loss", "training"), ("eval_loss", "held out")),
            ),
            _one("sft", "sft", "SFT", "Cross-entropy on the dataset's completions, nats a token."),
            _one("dac", "dac", "DAC-KL", "Clipped KL to the teacher on revised student text."),
            _one("span", "span", "Span loss", "Distance of neighbours' joint predictions."),
            Panel(
                "divergence",
                "Divergence",
                "Divergence between teacher and student, nats a token.",
                (
                    ("divergence", "divergence"),
                    ("kl", "KL"),
                    ("forward_kl", "forward KL"),
                    ("reverse_kl", "reverse KL"),
                    ("jsd", "JSD"),
                    ("skew_forward_kl", "forward skew KL"),
                    ("skew_reverse_kl", "reverse skew KL"),
                    ("alpha_beta", "α-β"),
                    ("total_variation", "total variation"),
                    ("contrast", "on student text (contrast)"),
                ),
            ),
            Panel(
                "acceptance",
                "Acceptance α",
                "Expected share of the student's drafts that the teacher accepts: Σ min(p, q).",
                (("acceptance", "training"), ("eval_acceptance", "held out")),
            ),
            Panel(
                "rouge",
                "ROUGE-L",
                "Held-out texts against their references, 0 to 100.",
                (("rouge_l", "ROUGE-L"), ("eval_rouge_l", "held out")),
            ),
            Panel(
                "distinct",
                "Distinct n-grams",
                "Share of different words and word pairs in held-out texts.",
                (("eval_distinct_1", "words"), ("eval_distinct_2", "pairs")),
            ),
        ),
    ),
    Group(
        "Sequence correction (SCRG)",
        (
            _one(
                "scrg-corrected",
                "scrg/corrected",
                "Corrections",
                "Completions corrected since the record before.",
            ),
            _one(
                "scrg-tokens",
                "scrg/regenerated_tokens",
                "Regenerated tokens",
                "Tokens written anew after a correction, since the record before.",
            ),
            _one(
                "scrg-clean",
                "scrg/share_without_error",
                "Share without error",
                "Completions in which the student never disagreed with its teacher.",
            ),
            _one(
                "scrg-rate",
                "scrg/per_1000_tokens",
                "Corrections per 1,000 tokens",
                "Of the tokens that the student wrote.",
            ),
            _one(
                "scrg-change",
                "scrg/nll_change",
                "Change by revision",
                "Of a text's mean −log p under the teacher, with its 95 % interval; below 0 helps.",
                references=((0.0, "no change"),),
            ),
            Panel(
                "scrg-nll",
                "Revision, judged by the teacher",
                "Teacher's −log p of the student's text, nats a token; lower is better.",
                (("scrg/nll_before", "before revision"), ("scrg/nll_after", "after revision")),
            ),
        ),
    ),
    Group(
        "Adaptive clipping (DAC)",
        (
            Panel(
                "dac-bounds",
                "Bounds of the kept band",
                "Quantiles of the teacher's distribution between which classes are kept.",
                bands=(("dac/lower", "dac/upper", "band"),),
            ),
            _one(
                "dac-coverage",
                "dac/coverage",
                "Coverage",
                "Share of the teacher's top-K mass that the band keeps.",
                references=((0.95, "constraint 0.95"),),
            ),
            _one("dac-width", "dac/width", "Width", "Upper bound minus lower bound."),
            _one(
                "dac-hidden",
                "dac/hidden_share",
                "Hidden share of the KL",
                "Share of the divergence that the band hides; above 0.10 it is widened.",
                references=((0.10, "limit 0.10"),),
            ),
            _one("dac-dual", "dac/dual", "Dual variable", "Weight of the coverage constraint."),
        ),
    ),
    Group(
        "Time, sources and optimiser",
        (
            Panel(
                "time",
                "Time of each phase",
                "Seconds since the record before.",
                (
                    ("time/rollout", "rollouts"),
                    ("time/teacher", "teacher"),
                    ("time/train", "training"),
                ),
                prefix="time/",
            ),
            Panel(
                "sources",
                "Sources of sequences",
                "Share of each source in the batches.",
                prefix="source/",
                y_range=(0.0, 1.0),
            ),
            _one(
                "skd",
                "skd/replaced",
                "Replaced tokens",
                "Share of the student's tokens that speculative KD's teacher replaced.",
                y_range=(0.0, 1.0),
            ),
            _one("phi", "phi", "φ", "Probability of student text in the adaptive scheduler."),
            _one("span-pairs", "span/pairs", "Span pairs", "Neighbouring tokens inside a span."),
            _one("lr", "learning_rate", "Learning rate", "Step size of the schedule."),
            _one("grad", "grad_norm", "Gradient norm", "Before clipping."),
        ),
    ),
)


def canonical(name: str) -> str:
    """A metric's name in this module: ``loss/sft``, ``sft_loss`` and ``sft`` are one."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name if name in ("loss", "eval_loss") else name.removesuffix("_loss")
