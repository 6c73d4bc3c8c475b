"""Texts side by side, and SCRG's corrections with the corrected token marked."""

from __future__ import annotations

from collections.abc import Sequence

from retort.report.html import NOT_MEASURED, Child, Markup, element, missing, section
from retort.report.records import Correction, Sample
from retort.report.scale import number

MAX_SHOWN = 24
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "␣", "\r": "␍"})


def samples_section(samples: Sequence[Sample]) -> Markup:
    """The teacher's text beside the student's before and after training."""
    if not samples:
        return section("samples", "Samples", missing("Samples"))
    shown = [_sample(sample) for sample in samples[:MAX_SHOWN]]
    return section("samples", "Samples", _count(len(samples)), shown)


def corrections_section(corrections: Sequence[Correction]) -> Markup:
    """What the student wrote beside what SCRG made of it."""
    title = "Corrections"
    if not corrections:
        return section("corrections", title, missing("Examples of SCRG corrections"))
    legend = element(
        "p",
        "SCRG finds the token at which teacher and student differ most, replaces it by the "
        "teacher's choice and lets the student write on from there: ",
        element("del", "the student's token"),
        " ",
        element("ins", "the teacher's token"),
        " ",
        element("span", "written anew", class_="new"),
        ".",
    )
    shown = [_correction(correction) for correction in corrections[:MAX_SHOWN]]
    return section("corrections", title, legend, _count(len(corrections)), shown)


def visible(token: str) -> str:
    """A token's text with its white space shown, since a corrected token may be nothing else."""
    return token.translate(_VISIBLE) or "∅"


def _sample(sample: Sample) -> Markup:
    columns = [
        _text("teacher", sample.teacher),
        _text("student before", sample.before),
        _text("student after", _marked(sample)),
    ]
    note = element("p", sample.note, class_="hint") if sample.note else None
    return element(
        "article",
        _prompt(sample.prompt),
        element("div", columns, class_="columns three"),
        note,
        class_="card",
    )


def _marked(sample: Sample) -> Child:
    """The text after training, and in it the token that SCRG would correct."""
    if sample.after is None or sample.marked is None:
        return sample.after
    start, end = sample.marked
    old, new = sample.after[start:end], sample.replacement
    marks = [element("del", visible(old)), element("ins", visible(new))]
    return [sample.after[:start], marks, sample.after[end:]]


def _correction(correction: Correction) -> Markup:
    kept, dropped = _around(correction)
    own = [kept, element("del", visible(correction.original)), _span("dropped", dropped)]
    revised = [
        kept,
        element("ins", visible(correction.replacement)),
        _span("new", correction.regenerated),
    ]
    facts = [f"token {correction.position + 1} of {len(correction.tokens)}"]
    if correction.step is not None:
        facts.append(f"step {correction.step:,}")
    if correction.divergence is not None:
        facts.append(f"KL {number(correction.divergence)} nats there")
    return element(
        "article",
        _prompt(correction.prompt),
        element(
            "div",
            _text("student's own", own),
            _text("revised", revised),
            class_="columns two",
        ),
        element("p", ", ".join(facts), class_="hint"),
        class_="card",
    )


def _around(correction: Correction) -> tuple[str, str]:
    """The text before the corrected token and the text that was dropped after it."""
    tokens, at = correction.tokens, correction.position
    return "".join(tokens[:at]), "".join(tokens[at + 1 :])


def _prompt(text: str) -> Markup:
    return element("p", element("b", "Prompt"), element("bdi", text), class_="prompt")


def _text(label: str, content: Child) -> Markup:
    if content is None:
        content = element("span", NOT_MEASURED, class_="missing")
    elif content == "":
        content = element("span", "(empty)", class_="missing")
    return element("div", element("h4", label), element("p", content, class_="text", dir="auto"))


def _span(kind: str, text: str) -> Markup | None:
    return element("span", text, class_=kind) if text else None


def _count(number_of: int) -> Markup | None:
    if number_of <= MAX_SHOWN:
        return None
    return element("p", f"The first {MAX_SHOWN} of {number_of:,} are shown.", class_="hint")
