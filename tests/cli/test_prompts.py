"""Prompt files: what is read, and what is named when it is wrong."""

import json

import pytest

from retort.batch.rows import Reader
from retort.bench.load import read_prompts as read_load
from retort.cli.prompts import read_prompts
from retort.cli.serve import _keys
from retort.decode.params import SamplingParams
from retort.errors import ConfigurationError


def test_text_is_one_prompt_a_line(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\n  two\n", encoding="utf-8")
    assert read_prompts(file) == ["one", "  two"]


def test_json_lines_of_each_kind(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": "one"}, {"messages": messages}, {"text": "three"}, {"prompt": messages}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert read_prompts(file) == ["one", messages, "three", messages]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path, name):
    file = tmp_path / name
    line = "one" if name == "a.txt" else '{"prompt": "one"}'
    file.write_text(line + "\n", encoding="utf-8-sig")
    assert read_prompts(file) == ["one"]
    with file.open("rb") as lines:
        reader = Reader(SamplingParams(), text=name == "a.txt")
        assert [item.parts[0].prompt for item in reader.items(lines)] == ["one"]


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("secret\n", encoding="utf-8-sig")
    assert _keys(file) == ["secret"]


@pytest.mark.parametrize("read", [read_prompts, read_load])
def test_a_row_may_hold_a_line_separator(tmp_path, read):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert read(file) == ["a\u2028b\u0085c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.jsonl", b"", "holds no prompts"),
        ("a.txt", b"ok\n\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt"', "line 2 is not JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"question": "x"}', "line 3 has none of prompt"),
        ("a.jsonl", b'["prompt"]', "line 1 has none of prompt"),
        ("a.jsonl", b'{"prompt": ""}', "line 1 has a wrong prompt"),
        ("a.jsonl", b'{"prompt": 3}', "line 1 has a wrong prompt"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1 has a wrong prompt"),
        ("a.jsonl", b'{"messages": []}', "line 1 has a wrong prompt"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_prompts(file)
    assert str(file) in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        read_prompts(tmp_path / "none.txt")
