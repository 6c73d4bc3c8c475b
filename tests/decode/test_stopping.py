"""Where a row's tokens and its text end, and what of the text may be shown before."""

import pytest

from retort.decode.params import SamplingParams
from retort.decode.request import Request
from retort.decode.stopping import TextBuffer, grow


def _request(name, prompt, new=10, **options):
    params = SamplingParams(max_new_tokens=new, **options)
    return Request(name, 0, list(prompt), params, frozenset({2}))


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes, so that characters are split across tokens."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def _stream(text, stops):
    buffer, shown = TextBuffer(Bytes(), stops), []
    for byte in text.encode():
        stopped = buffer.push(byte)
        if not stopped:
            shown.append(buffer.take())
        else:
            break
    shown.append(buffer.take(last=True))
    return shown


@pytest.mark.parametrize("text", ["héllo wörld", "a🙂b", "plain"])
def test_streamed_text_is_the_text_and_never_half_a_character(text):
    shown = _stream(text, ())
    assert "".join(shown) == text
    assert not any("\ufffd" in s for s in shown)


def test_stop_strings_are_never_shown_even_in_parts():
    shown = _stream("one two STOP three", ("STOP",))
    assert "".join(shown) == "one two "
    assert "".join(_stream("one STO two", ("STOP",))) == "one STO two"


def _grown(request, tokens):
    """What a row takes of ``tokens`` until it ends."""
    for token in tokens:
        if request.finish_reason is None:
            grow(request, token)
    return request.output


def test_a_row_ends_at_eos_limit_and_stop_string():
    request = _request("a", [5], new=3)
    assert _grown(request, [7, 8, 9, 10]) == [7, 8, 9] and request.finish_reason == "length"
    request = _request("a", [5], new=9)
    assert _grown(request, [7, 2, 9]) == [7, 2] and request.finish_reason == "stop"
    request = _request("a", [5], new=9, ignore_eos=True)
    assert _grown(request, [7, 2, 9]) == [7, 2, 9] and request.finish_reason is None
    request = _request("a", [5], new=9, stop_strings=["b"])
    request.text = TextBuffer(Bytes(), request.params.stops)
    assert _grown(request, list(b"abc")) == list(b"ab") and request.finish_reason == "stop"
    assert request.text.full(request.output) == "a"


class Pairs:
    """A tokenizer whose tokens are two bytes of UTF-8 text."""

    def __init__(self, text):
        data = text.encode()
        self.pairs = [data[i : i + 2] for i in range(0, len(data), 2)]

    def decode(self, ids, skip_special_tokens=True):
        return b"".join(self.pairs[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize("new", [2, 9])
def test_a_stop_string_before_half_a_character_ends_the_row_at_once(new):
    pairs = Pairs("abcé fg")  # "ab", "c" with half of "é", its other half
    request = _request("a", [5], new=new, stop_strings=["bc"])
    request.text = TextBuffer(pairs, request.params.stops)
    assert _grown(request, [0, 1, 2]) == [0, 1] and request.finish_reason == "stop"
    assert request.text.full(request.output) == "a" == request.text.take(last=True)


def test_a_stop_string_is_found_behind_half_a_character():
    pairs = Pairs("abcé fg")
    request = _request("a", [5], new=9, stop_strings=["cé f"], ignore_eos=True)
    request.text = TextBuffer(pairs, request.params.stops)
    assert _grown(request, [0, 1, 2, 3]) == [0, 1, 2, 3] and request.finish_reason == "stop"
    assert request.text.full(request.output) == "ab"
