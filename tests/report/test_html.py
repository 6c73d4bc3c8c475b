"""Escaping is the default; only markup made here stays markup."""

from html.parser import HTMLParser

import pytest

from retort.report.html import Markup, element, escape, join, table

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\">&amp;"


class Collector(HTMLParser):
    """Tags and text of a document."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def parse(markup):
    parser = Collector()
    parser.feed(markup)
    return parser


def test_hostile_text_comes_back_as_the_text_it_was():
    parsed = parse(element("p", HOSTILE, title=HOSTILE))
    assert parsed.tags == [("p", {"title": HOSTILE})]
    assert parsed.text == HOSTILE


def test_markup_is_kept_and_its_neighbours_are_escaped():
    assert join([element("b", "1 < 2"), " & ", None, ["<"]]) == "<b>1 &lt; 2</b> &amp; &lt;"


def test_adding_strings_to_markup_gives_a_string_that_is_escaped_again():
    assert join([Markup("<b>") + "<i>"]) == "&lt;b&gt;&lt;i&gt;"


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\x7f", "\x9f", "\ud83d", "\uffff"])
def test_characters_that_html_lacks_are_replaced(character):
    assert escape(f"a{character}b") == "a\ufffdb"
    escape(f"a{character}b").encode()


def test_white_space_survives():
    assert escape("a\tb\nc\rd") == "a\tb\nc&#13;d"


def test_attributes():
    made = element("svg", viewBox="0 0 1 1", class_="a", aria_label="b", hidden=True, x=None)
    assert made == '<svg viewBox="0 0 1 1" class="a" aria-label="b" hidden></svg>'
    assert element("i", y=0, z=False) == '<i y="0"></i>'


def test_a_table_heads_rows_and_columns():
    parsed = parse(table(["name", "n", "note"], [["a", "1", "x"]], "Caption", (1, 2)))
    assert [a.get("scope") for tag, a in parsed.tags if tag == "th"] == ["col", "col", "col", "row"]
    assert [a.get("class") for tag, a in parsed.tags if tag == "td"] == ["n", None]
    assert "Caption" in parsed.text
