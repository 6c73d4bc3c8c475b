"""Texts and bytes of single tokens, for tokenizers of two kinds."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from retort.models.zoo import load_tokenizer
from retort.serve.answers import Choice
from retort.serve.pieces import Pieces
from tests.serve import tiny

WORDS = "naïve 🙂, don't they"


def spelled(pieces, ids):
    return b"".join(pieces.data(token) for token in ids)


def test_bytes_of_byte_level_tokens_make_the_text(folder):
    tokenizer = load_tokenizer(folder)
    pieces, ids = Pieces(tokenizer), tokenizer(WORDS).input_ids
    assert spelled(pieces, ids).decode() == WORDS
    for token in ids:
        if pieces.text(token).startswith("bytes:"):
            with pytest.raises(UnicodeDecodeError):
                pieces.data(token).decode()
        else:
            assert pieces.text(token).encode() == pieces.data(token)
    assert len({pieces.text(token) for token in range(len(tokenizer))}) == len(tokenizer)


@pytest.fixture
def sentences():
    """A SentencePiece-like tokenizer: spaces as ``▁``, bytes as entries of their own."""
    entries = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "\ufffd"]
    tokenizer = Tokenizer(
        models.BPE(
            {entry: i for i, entry in enumerate(entries)},
            [("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_first_space_is_a_tokens_own(sentences):
    pieces = Pieces(sentences)
    entry = sentences.convert_tokens_to_ids
    assert pieces.text(entry("▁a")) == " a" and pieces.text(entry("a")) == "a"


def test_byte_entries_are_their_bytes(sentences):
    pieces, emoji = Pieces(sentences), "🙂".encode()
    ids = [sentences.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in emoji]
    assert spelled(pieces, ids) == emoji
    assert pieces.text(ids[0]) == "bytes:\\xf0"
    replacement = sentences.convert_tokens_to_ids("\ufffd")
    assert pieces.text(replacement) == "\ufffd" and pieces.data(replacement).decode() == "\ufffd"


def test_log_probabilities_spell_the_text(served):
    """Half characters do not collide in ``top_logprobs``, and offsets count characters."""
    bias = {str(token): 6 for token in range(3, 259)}  # single bytes
    for seed in range(4):
        fields = {"max_tokens": 40, "seed": seed, "temperature": 1, "logit_bias": bias}
        text = {"prompt": "naïve 🙂", "logprobs": 5, **fields}
        choice = served.complete(**text)["choices"][0]
        logprobs, spelt = choice["logprobs"], b""
        assert all(len(top) >= 5 for top in logprobs["top_logprobs"])
        assert any(token.startswith("bytes:") for token in logprobs["tokens"])
        said = {"messages": [{"role": "user", "content": "🙂"}], "logprobs": True, **fields}
        answer = served.post("/v1/chat/completions", **said).json()["choices"][0]
        for item in answer["logprobs"]["content"]:
            spelt += bytes(item["bytes"])
        assert spelt.decode("utf-8", "replace") == answer["message"]["content"]
        parts = served.post("/v1/completions", **text, stream=True)
        offsets = []
        for event in tiny.events(parts.text):
            offsets += event["choices"][0]["logprobs"]["text_offset"]
        assert offsets == logprobs["text_offset"] == sorted(offsets)
        assert offsets[-1] <= len(choice["text"])


@pytest.mark.parametrize("stream", [False, True])
def test_control_tokens_move_no_offset_of_the_text_that_leaves_them_out(served, stream):
    bias = {str(token): 9 for token in (1, 2)}  # <|im_start|>, <|im_end|>
    fields = {"max_tokens": 40, "seed": 1, "temperature": 2, "logit_bias": bias, "stream": stream}
    prompt = "<|im_start|>the cat"  # echoed as it was given
    answer = served.post("/v1/completions", prompt=prompt, echo=True, logprobs=0, **fields)
    choices = [e["choices"][0] for e in (tiny.events(answer.text) if stream else [answer.json()])]
    text = "".join(choice["text"] for choice in choices)
    tokens = [t for choice in choices for t in choice["logprobs"]["tokens"]]
    offsets = [o for choice in choices for o in choice["logprobs"]["text_offset"]]
    assert tokens[0] == "<|im_start|>" and offsets[1] == len("<|im_start|>")
    assert len({t for t in tokens[2:] if t.startswith("<|")}) > 1
    seen = [
        (t, o) for t, o in zip(tokens, offsets, strict=True) if not t.startswith(("<|", "byte"))
    ]
    assert len(seen) > 9 and all(text[at:].startswith(token) for token, at in seen)


@pytest.mark.parametrize(
    ("tokens", "offsets"),
    [
        ([b"a", b"\xf0\x9f", b"\x99\x82", b"b"], [0, 1, 1, 2]),
        ([b"\xc3", b"T", b"h"], [0, 1, 2]),
        ([b"\xf0", b"\x9f", b"T", b"\x80", b"h"], [0, 0, 1, 2, 3]),
        ([b"\xc3", b"\xc3", b"\xa9"], [0, 1, 1]),
        ([b"\xef", b"\xbf\xbd", b"x"], [0, 0, 1]),
        ([b"\xe4\xb8", b"\xadx", b"\xe4", b"\xb8T", b"y"], [0, 0, 2, 2, 4]),
        ([b"\xc3", b"", b"T"], [0, 0, 1]),
    ],
)
def test_offsets_of_tokens_that_are_parts_of_characters(tokens, offsets):
    """Also where a character stays half: then the text has ``U+FFFD`` in its place."""
    choice = Choice(0)
    assert [choice.spell(data) for data in tokens] == offsets
    text = b"".join(tokens).decode("utf-8", "replace")
    for data, at in zip(tokens, offsets, strict=True):
        if data.isascii():
            assert text[at:].startswith(data.decode())
