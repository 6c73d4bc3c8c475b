"""What cannot be trained on is one line that names it, from the command, before any step."""

import json
import shutil

import pytest
import yaml

from retort.cli import run as command
from retort.distill.capture import capture
from retort.distill.capture_facts import CaptureSettings
from retort.distill.trainer import DistillTrainer
from retort.errors import ConfigurationError
from retort.manifest import MANIFEST, write_manifest
from retort.models import zoo
from retort.train.arguments import resolved
from tests.distill.tokenizers import byte_level
from tests.distill.toys import ROWS, config, llama, tokenizer, trainer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Teacher, students with the same and another tokenizer, rows, and captures of these rows."""
    folder = tmp_path_factory.mktemp("parts")
    for name, seed, tokens in (
        ("teacher", 1, tokenizer()),
        ("student", 2, tokenizer()),
        ("stranger", 2, byte_level()),
    ):
        llama(seed).save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)
    write(folder / "rows.jsonl", *ROWS)
    encoded = trainer(folder / "t", method="kd").train_dataset
    for name, tokens in ("capture", tokenizer()), ("foreign", byte_level()):
        capture(llama(1), tokens, encoded, folder / name, CaptureSettings(5))
    return folder


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def refusal(parts, tmp_path, monkeypatch, capsys):
    """What `retort distill` says of flags (by name) over a configuration that would train."""
    monkeypatch.setattr(DistillTrainer, "training_step", lambda *_: pytest.fail("a step was made"))

    def said(**flags):
        made = config(
            tmp_path / "run",
            method="kd",
            model_name_or_path=str(parts / "student"),
            teacher_model_name_or_path=str(parts / "teacher"),
            dataset_name=str(parts / "rows.jsonl"),
        )
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(resolved(made)))
        given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        code = command(["distill", "--config", str(tmp_path / "run.yaml"), *given])
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("retort: ")]
        assert code == 2 and len(lines) == 1
        assert not (tmp_path / "run" / "training.jsonl").exists()
        return lines[0]

    return said


def test_tokenizers_that_differ(refusal, parts):
    assert "tokenizers differ at id" in refusal(model_name_or_path=parts / "stranger")


def refused_in_python(teacher, student=None, words=None, **changes):
    """What `DistillTrainer` says of a teacher (a name or a model), before weights are read."""
    with pytest.raises(ConfigurationError) as caught:
        DistillTrainer(
            student or llama(2),
            config("unused", method="kd", **changes),
            teacher,
            ROWS,
            processing_class=words or tokenizer(),
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokenizers_that_differ_in_python(parts, monkeypatch):
    stranger = zoo.load_model(str(parts / "stranger"))
    monkeypatch.setattr(zoo, "load_model", lambda *_, **__: pytest.fail("loaded"))
    by_name = str(parts / "stranger")
    for teacher in (by_name, stranger):
        line = refused_in_python(teacher, str(parts / "student"))
        assert "Teacher and student tokenizers differ at id" in line
    line = refused_in_python(by_name, str(parts / "student"), byte_level())
    assert "processing_class's and the student's tokenizers differ" in line


@pytest.mark.parametrize("size", [97, 5000])
def test_a_head_that_no_padding_explains_in_python(size):
    line = refused_in_python(llama(1, vocab_size=size))
    assert f"The teacher predicts {size} tokens, the student 258" in line


def test_keywords_that_fit_nothing(refusal):
    line = refusal(model_init_kwargs='{"foo": 1}')
    assert "with the keywords {'foo': 1}" in line and "a fault of Retort" not in line


def test_a_capture_made_for_other_data(refusal, parts, tmp_path):
    rows = write(tmp_path / "more.jsonl", *ROWS, {"prompt": "new", "completion": "row"})
    line = refusal(teacher_signal=parts / "capture", dataset_name=rows)
    assert "was captured for other data: row 9 of more.jsonl" in line


def test_a_capture_made_for_another_tokenizer(refusal, parts):
    line = refusal(teacher_signal=parts / "foreign")
    assert "foreign was captured with another tokenizer" in line


def test_a_truncated_shard(refusal, parts, tmp_path):
    shutil.copytree(parts / "capture", tmp_path / "cut")
    shard = tmp_path / "cut" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-20])
    assert "shard-00000.safetensors" in refusal(teacher_signal=tmp_path / "cut")


def test_a_capture_without_rows_is_not_replaced_by_the_live_teacher(refusal, parts, tmp_path):
    folder = shutil.copytree(parts / "capture", tmp_path / "bare")
    facts = json.loads((folder / MANIFEST).read_text())
    for shard in folder.glob("shard-*"):
        shard.unlink()
    write_manifest(folder, facts, skip=("provenance.json", ".lock"))
    assert "rows=8, its shards hold 0" in refusal(teacher_signal=folder)


def test_a_capture_of_ids_beyond_its_vocabulary(refusal, parts, tmp_path):
    folder = shutil.copytree(parts / "capture", tmp_path / "beyond")
    facts = json.loads((folder / MANIFEST).read_text())
    write_manifest(folder, {**facts, "vocab_size": 20}, skip=("provenance.json", ".lock"))
    line = refusal(teacher_signal=folder)
    assert "shard-00000.safetensors has 'ids' beyond the vocabulary of 20" in line


@pytest.mark.parametrize("method", ["kd", "mgsr"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "rows.jsonl, row 9: column 'completion' is empty"),
        ({"prompt": " ", "completion": "b"}, "rows.jsonl, row 9: column 'prompt' is empty"),
        ({"prompt": "a"}, "rows.jsonl, row 9: column 'completion' is empty"),
        ({"prompt": "x" * 64, "completion": "y"}, "row 9: the prompt has 64 tokens and max_length"),
        ({"prompt": "x" * 10**6, "completion": "y"}, "row 9: the prompt has 1000000 tokens"),
    ],
    ids=["empty completion", "empty prompt", "no completion", "long prompt", "million tokens"],
)
def test_rows_that_cannot_be_learned(refusal, tmp_path, method, row, message):
    rows = write(tmp_path / "rows.jsonl", *ROWS, row)
    assert message in refusal(method=method, dataset_name=rows)


def test_an_empty_file_and_missing_columns(refusal, tmp_path):
    assert "empty.jsonl is empty" in refusal(dataset_name=write(tmp_path / "empty.jsonl"))
    odd = write(tmp_path / "odd.jsonl", {"question": "a", "answer": "b"})
    assert "odd.jsonl has the columns ['answer', 'question']" in refusal(dataset_name=odd)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"lmbda": 1.5}, "lmbda=1.5 is wrong: it must lie in [0, 1]"),
        ({"method": "gkd", "lmbda": -0.1}, "lmbda=-0.1 is wrong: it must lie in [0, 1]"),
        ({"method": "gkd", "lmbda": "nan"}, "lmbda=nan is wrong"),
        ({"scrg": True}, "scrg revises what the student writes"),
        ({"method": "sft", "beta": 0.5}, "beta=0.5 contradicts method='sft'"),
        ({"method": "mgsr", "packing": True}, "packing=True contradicts method='mgsr'"),
        ({"method": "gkd", "teacher_signal": "x"}, "teacher_signal='x' knows the dataset's"),
    ],
)
def test_values_out_of_range_and_flags_that_contradict_the_preset(refusal, flags, named):
    assert named in refusal(**flags)
