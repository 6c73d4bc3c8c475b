"""HTML and SVG elements from Python values; every string is escaped unless it is `Markup`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

_UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
NOT_MEASURED = "not measured"


class Markup(str):
    """Text that is markup already. Only this module's functions make it out of other strings."""

    __slots__ = ()


Child = Any
"""A string (escaped), `Markup` (kept), None (nothing), or a list of children."""


def escape(text: str) -> Markup:
    """Escape for element content and quoted attributes; characters that HTML lacks become U+FFFD.

    Carriage returns are written as a reference, or a parser would turn them into line ends.
    """
    shown = html.escape(_UNSHOWABLE.sub("\ufffd", text), quote=True)
    return Markup(shown.replace("\r", "&#13;"))


def join(children: Iterable[Child]) -> Markup:
    """Escape and concatenate children."""
    parts = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escape(child))
        elif child is not None:
            parts.append(join(child))
    return Markup("".join(parts))


def element(tag: str, *children: Child, **attributes: Any) -> Markup:
    """``<tag attributes>children</tag>``.

    An attribute's underscores become hyphens and one trailing underscore is dropped (``class_``);
    None and False leave the attribute out, True writes its name alone.
    """
    written = "".join(
        f" {_attribute(name)}" + ("" if value is True else f'="{escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Child]],
    caption: str,
    numeric: tuple[int, int] = (1, 99),
) -> Markup:
    """A table in a box that scrolls sideways on narrow screens.

    Columns of the range ``numeric`` are aligned as numbers; the first cell heads its row.
    """

    def line(cells: Sequence[Child]) -> Markup:
        made = [element("th", cells[0], scope="row")]
        for i, cell in enumerate(cells[1:], start=1):
            made.append(element("td", cell, class_="n" if i in range(*numeric) else None))
        return element("tr", made)

    heads = [
        element("th", name, scope="col", class_="n" if i in range(*numeric) else None)
        for i, name in enumerate(head)
    ]
    content = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", heads)),
        element("tbody", [line(row) for row in rows]),
    )
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


def details(summary: str, *children: Child) -> Markup:
    """A part that opens on demand."""
    return element("details", element("summary", summary), *children)


def section(key: str, title: str, *children: Child) -> Markup:
    """A top-level part of the page that the navigation links to."""
    return element("section", element("h2", title), *children, id=key, aria_label=title)


def missing(what: str) -> Markup:
    """A sentence for a part without records."""
    return element("p", f"{what}: {NOT_MEASURED}.", class_="missing")


def _attribute(name: str) -> str:
    return name if name == "viewBox" else name.removesuffix("_").replace("_", "-")
