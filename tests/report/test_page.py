"""The page as a whole: self-contained, deterministic, complete or absent."""

import re
from dataclasses import replace

import pytest

from retort.errors import ConfigurationError
from retort.provenance import Provenance
from retort.report import DecodingRow, Heading, RunRecords, Sample, build, save
from retort.report.page import render
from tests.report import sample_run
from tests.report.test_html import HOSTILE, parse

ADDRESS_ATTRIBUTES = ("src", "href", "action", "data", "poster", "srcset", "xlink:href")


def test_a_folder_and_its_records_give_the_same_bytes_twice(tmp_path):
    save(tmp_path, sample_run.records())
    first = build(tmp_path).read_bytes()
    assert build(tmp_path).read_bytes() == first
    assert build(sample_run.records(), tmp_path / "other.html").read_bytes() == first


def test_nothing_is_fetched():
    parsed = parse(render(sample_run.records()))
    found = [a[key] for _, a in parsed.tags for key in ADDRESS_ATTRIBUTES if key in a]
    assert found and all(address.startswith("#") for address in found)
    assert not {tag for tag, _ in parsed.tags} & {"link", "iframe", "object", "img", "base"}
    page = render(sample_run.records())
    assert not re.search(r"url\(|@import|https?://", page)


def test_links_and_labels_lead_somewhere_and_ids_are_unique():
    parsed = parse(render(sample_run.records()))
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in parsed.tags if tag == "a"} <= set(ids)


def test_hostile_text_in_every_part_of_a_run_stays_text():
    named = {HOSTILE: HOSTILE}
    provenance = Provenance(named, named, named, HOSTILE, named, HOSTILE, [HOSTILE])
    records = RunRecords(
        training=[{"step": 1, HOSTILE: 1.0, f"source/{HOSTILE}": 0.5}],
        decoding=[DecodingRow(HOSTILE, 8, note=HOSTILE)],
        evaluation=[replace(sample_run.EVALUATION[0], metric=HOSTILE, note=HOSTILE)],
        samples=[Sample("{{title}} {{body}} {{script-hash}}")],
        provenance=provenance,
        heading=Heading(HOSTILE, HOSTILE),
    )
    page = render(records)
    parsed = parse(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert not any(tag == "img" or name.startswith("on") for tag, a in parsed.tags for name in a)
    assert "{{title}} {{body}} {{script-hash}}" in parsed.text


def test_an_empty_run_says_not_measured_everywhere_and_invents_nothing():
    text = parse(render(RunRecords())).text
    assert text.count("not measured") >= 9


def test_the_first_screen_holds_the_results():
    text = parse(render(sample_run.records())).text
    for result in ("1.73 × plain", "0.0210 → 0.142", "4.10 → 13.6", "tokens regenerated"):
        assert result in text


def test_secrets_in_arguments_are_hidden():
    page = render(sample_run.records())
    assert "hf_x" not in page and "(hidden)" in page


def test_the_command_can_be_copied_into_a_shell():
    assert "retort demo --output 'a run'" in parse(render(sample_run.records())).text


def test_bad_sources_leave_no_file(tmp_path):
    with pytest.raises(ConfigurationError, match="no records"):
        build(tmp_path, tmp_path / "out.html")
    with pytest.raises(ConfigurationError, match="out_path"):
        build(RunRecords())
    assert list(tmp_path.iterdir()) == []
