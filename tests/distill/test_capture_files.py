"""A capture is checked before a run reads it: files, keys, rows and tokenizer."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from retort.distill import capture_folder
from retort.distill.captured import Capture
from retort.errors import ConfigurationError
from retort.manifest import MANIFEST, write_manifest
from retort.train.checkpoint import LOCK
from tests.distill.captures import flip, rows
from tests.distill.tokenizers import byte_level
from tests.distill.toys import tokenizer


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: flip(f / "shard-00000.safetensors"), r"shard-00000.safetensors does not"),
        (lambda f: (f / "shard-00001.safetensors").unlink(), "shard-00001.safetensors is missing"),
        (lambda f: cut(f / "shard-00000.safetensors"), "shard-00000.safetensors"),
        (lambda f: (f / MANIFEST).unlink(), "holds no capture"),
        (lambda f: rename(f, "../shard-00000.safetensors"), "no shard of its own"),
        (lambda f: link(f / "shard-00000.safetensors"), "no shard of its own"),
    ],
)
def test_a_damaged_capture_is_refused_naming_the_file(small, tmp_path, fault, message):
    folder = tmp_path / "c"
    shutil.copytree(small, folder)
    fault(folder)
    with pytest.raises(ConfigurationError, match=message) as caught:
        Capture(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def tensors(change):
    """A fault in the first shard's tensors."""

    def spoil(folder, _):
        path = folder / "shard-00000.safetensors"
        parts = load_file(path)
        change(parts)
        save_file(parts, path)

    return spoil


def beyond(parts):
    parts["ids"][1, 2] = 258


def other_rows(parts):
    parts["digests"][0, 0] ^= 1


def shards_swapped(folder, facts):
    first, second = (folder / f"shard-0000{n}.safetensors" for n in (0, 1))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def no_shards(folder, _):
    for path in folder.glob("shard-*"):
        path.unlink()


# By what is wrong: how a capture whose hashes fit gets so, and the file and key that are named.
MALFORMED = {
    "no vocabulary": (lambda _, f: f.pop("vocab_size"), f"{MANIFEST} has vocab_size=None"),
    "a vocabulary as text": (lambda _, f: f.update(vocab_size="258"), "vocab_size='258'"),
    "no top_k": (lambda _, f: f.pop("top_k"), f"{MANIFEST} has top_k=None"),
    "no tokenizer": (lambda _, f: f.pop("tokenizer"), f"{MANIFEST} has tokenizer=None"),
    "a row too many": (lambda _, f: f.update(rows=10), "rows=10, its shards hold 9"),
    "no shards": (no_shards, "rows=9, its shards hold 0"),
    "a shard less": (lambda d, _: (d / "shard-00001.safetensors").unlink(), "has rows=9"),
    "shards in another order": (shards_swapped, "are not those of 'data'"),
    "no offsets": (tensors(lambda t: t.pop("offsets")), "shard-00000.safetensors lacks 'offsets'"),
    "offsets that go back": (
        tensors(lambda t: t.update(offsets=t["offsets"].flip(0))),
        "shard-00000.safetensors has 'offsets' that do not divide",
    ),
    "ids beyond the vocabulary": (tensors(beyond), "shard-00000.safetensors has 'ids' beyond the"),
    "ids of another type": (
        tensors(lambda t: t.update(ids=t["ids"].long())),
        "shard-00000.safetensors has 'ids' as (torch.int64",
    ),
    "ids without shape": (
        tensors(lambda t: t.update(ids=t["ids"][0, 0].clone())),
        "shard-00000.safetensors has 'ids' as (torch.uint16, ())",
    ),
    "a tail too short": (
        tensors(lambda t: t.update(log_tail=t["log_tail"][1:].clone())),
        "shard-00000.safetensors has 'log_tail' as",
    ),
    "other rows": (tensors(other_rows), "are not those of 'data'"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_capture_that_was_written_wrong_is_refused_naming_file_and_key(small, tmp_path, fault):
    spoil, message = MALFORMED[fault]
    folder = tmp_path / "c"
    shutil.copytree(small, folder)
    facts = json.loads((folder / MANIFEST).read_text())
    spoil(folder, facts)
    write_manifest(folder, facts, skip=(capture_folder.PROVENANCE, LOCK))
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        Capture(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_opening_a_capture_copies_no_tensor(small):
    """Its tensors are pages of the files: nothing of their size is allocated."""
    found = Capture(small)
    parts = found._files[0].get_tensor("ids"), found._files[0].get_tensor("ids")
    assert parts[0].data_ptr() == parts[1].data_ptr()


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def rename(folder, name):
    facts = json.loads((folder / MANIFEST).read_text())
    facts["files"] = {name: next(iter(facts["files"].values()))}
    (folder / MANIFEST).write_text(json.dumps(facts))


def test_other_data_and_another_tokenizer_are_refused(small):
    found, other = Capture(small), [*rows()[:3], {"prompt_ids": [1], "completion_ids": [2, 3]}]
    found.check(tokenizer(), rows(), "train.jsonl")
    found.check(tokenizer(), rows()[2:5], "train.jsonl")  # a part of the data will do
    with pytest.raises(ConfigurationError, match=r"row 4 of train.jsonl"):
        found.check(tokenizer(), other, "train.jsonl")
    with pytest.raises(ConfigurationError, match="another tokenizer"):
        found.check(byte_level(), rows(), "train.jsonl")


def test_a_row_is_named_by_its_place_in_the_data_where_rows_were_left_out(small):
    kept = [{"index": 2 * place, **row} for place, row in enumerate(rows()[:3])]
    other = {"index": 17, "prompt_ids": [1], "completion_ids": [2, 3]}
    with pytest.raises(ConfigurationError, match=r"row 18 of train.jsonl"):
        Capture(small).check(tokenizer(), [*kept, other], "train.jsonl")
