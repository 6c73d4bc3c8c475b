"""Texts become blocks in which each token is predicted exactly once."""

import json

import numpy as np
import pytest
import torch

from retort.errors import ConfigurationError
from retort.pretrain.corpus import (
    IGNORED,
    Blocks,
    Corpus,
    collate,
    load_texts,
    pack,
    train_tokenizer,
)
from tests.distill.tokenizers import byte_level

TEXTS = ["the cat sat", "ä dog, 猫!", "\ttabs and\nlines ", "x"]


@pytest.mark.parametrize("block", [2, 3, 7, 64])
@pytest.mark.parametrize("length", [2, 3, 7, 8, 13, 65])
def test_each_token_but_the_first_is_predicted_exactly_once(block, length):
    stream = np.arange(length, dtype=np.int32)
    blocks = Blocks(stream, block, whole=False)
    predicted = [int(i) for b in blocks_of(blocks) for i in b["input_ids"][1:]]
    assert predicted == list(range(1, length))
    assert blocks.predicted_tokens == length - 1
    whole = Blocks(stream, block, whole=True)
    assert all(len(b["input_ids"]) == block for b in blocks_of(whole))
    assert whole.predicted_tokens == len(whole) * (block - 1) <= length - 1


def blocks_of(blocks):
    return [blocks[i] for i in range(len(blocks))]


def test_texts_are_ended_and_come_back():
    tokenizer = byte_level()
    blocks = pack(Corpus(TEXTS, "texts"), tokenizer, 1000, whole=False)
    ids = blocks[0]["input_ids"].tolist()
    assert ids[0] == tokenizer.eos_token_id == ids[-1]
    parts = tokenizer.decode(ids).split("<eos>")
    assert parts[1:-1] == TEXTS


def test_a_short_block_is_filled_without_loss():
    rows = [{"input_ids": np.array(r, dtype=np.int32)} for r in ([1, 2, 3], [4, 5])]
    rows.append({**rows[0], "labels": np.array([IGNORED, 2, IGNORED], dtype=np.int32)})
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0], [1, 2, 3]]
    want = [[1, 2, 3], [4, 5, IGNORED], [IGNORED, 2, IGNORED]]
    assert batch["labels"].tolist() == want
    assert batch["labels"].dtype == torch.long


def test_the_trained_tokenizer_knows_every_byte_and_is_the_same_each_time():
    made, again = (train_tokenizer([*TEXTS, "the the then"] * 3, 270) for _ in range(2))
    assert made.get_vocab() == again.get_vocab()
    assert 257 < len(made) <= 270
    odd = "\x00 �🦀 never seen"
    assert made.decode(made(odd)["input_ids"]) == odd
    assert made.eos_token_id == made.pad_token_id == 0


def test_files_of_every_kind_give_the_same_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (tmp_path / "b.txt").write_text(TEXTS[1])
    from datasets import Dataset

    Dataset.from_list([{"body": t} for t in [*TEXTS, " "]]).to_parquet(str(tmp_path / "c.parquet"))
    assert load_texts(str(tmp_path / "a.jsonl")).texts == TEXTS
    assert load_texts(str(tmp_path / "a.jsonl"), limit=2).texts == TEXTS[:2]
    assert load_texts(str(tmp_path / "b.txt")).texts == TEXTS[1:2]
    assert load_texts(str(tmp_path / "c.parquet"), column="body").texts == TEXTS
    corpus = load_texts(str(tmp_path / "b.txt"))
    assert corpus.size == (len(TEXTS[1].encode()), 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "there is no file"),
        ("none.jsonl", None, "there is no file"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', "row 2: column 'text' must be text"),
        ("a.jsonl", '{"text": "x"}\n{"other": "y"}\n', "row 2: column 'text' must be text"),
        ("a.jsonl", '{"body": "x"}\n', "no 'text': set dataset_text_field"),
        ("a.jsonl", "{\n", "row 1: not valid JSON"),
        ("a.jsonl", '{"text": " "}\n', "holds no text"),
        ("a.txt", "\n", "holds no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError, match=message):
        load_texts(str(path))


def test_too_little_text_is_refused():
    with pytest.raises(ConfigurationError, match="less than block_size=64"):
        pack(Corpus(["x"], "texts"), byte_level(), 64, whole=True)


def test_half_a_surrogate_pair_is_named(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    with pytest.raises(ConfigurationError, match=r"row 2: a lone surrogate"):
        load_texts(str(path))
