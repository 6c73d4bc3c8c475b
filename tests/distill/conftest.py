"""What several test files of this folder start from."""

import json

import pytest

from tests.distill import captures
from tests.distill.toys import ROWS, llama, tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a small capture; copy it before changing it."""
    return captures.make(tmp_path_factory.mktemp("c") / "one")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A saved teacher, a larger student-to-be and data."""
    folder = tmp_path_factory.mktemp("parts")
    for name, seed in (("teacher", 1), ("student", 2)):
        llama(seed, layers=3).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder
