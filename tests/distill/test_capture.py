"""Captures hold the live signal's top-k, cost few bytes, and refuse other inputs."""

import json
import shutil

import pytest
import torch

from retort.cli import run as command
from retort.distill import capture as capturing
from retort.distill.batch import TrainingSequence, build_batch, stream_mask
from retort.distill.capture import capture, stored
from retort.distill.capture_facts import CaptureSettings, digest, fingerprint
from retort.distill.captured import Capture, CapturedTeacher
from retort.distill.losses import DivergenceTerm, chunked_loss
from retort.distill.losses.divergence import forward_kl
from retort.distill.signals import DenseSignal
from retort.distill.teachers import Teacher
from retort.errors import ConfigurationError, RetortError
from tests.distill.captures import SMALL, rows, shards
from tests.distill.tokenizers import byte_level
from tests.distill.toys import llama, tokenizer


def test_a_capture_holds_the_live_top_k_of_every_row_alone(small):
    """Each row's signal against one unbatched forward of the model itself."""
    found, model = Capture(small), llama().eval()
    for row in rows():
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
        p, signal = logits.log_softmax(-1), found.signal([digest(**by_position(row))])
        kept = p.topk(5)
        assert torch.equal(signal.indices, kept.indices)
        assert torch.allclose(signal.log_probs_kept.float(), kept.values, atol=5e-3)
        rest = p.scatter(1, kept.indices, float("-inf")).logsumexp(-1)
        assert torch.allclose(signal.log_tail, rest, atol=1e-5)
        assert signal.vocab_size == 258


def by_position(row):
    return {"prompt_ids": row["prompt_ids"], "completion_ids": row["completion_ids"]}


def batch(chosen):
    sequences = [
        TrainingSequence(r["prompt_ids"], r["completion_ids"], False, True) for r in chosen
    ]
    made = build_batch(sequences, 0)
    return made, stream_mask(made, "distilled")


def loss(signal, hidden, head, targets):
    terms = [DivergenceTerm(forward_kl, "kd")]
    total = chunked_loss(hidden, head, targets, terms, signal=signal, chunk_size=4)["kd"].total
    return total, torch.autograd.grad(total, hidden)[0]


def test_the_loss_from_a_capture_is_that_of_the_live_signal_cut_and_rounded(small):
    """Bit-equal where the live forward has the capture's batches; the rounding itself is small."""
    teacher, student = Teacher(llama()), llama(2)
    shard = [rows()[i] for i in next(capturing._shards(rows(), SMALL.shard_tokens))]
    pair = sorted(shard, key=lambda r: -len(r["prompt_ids"] + r["completion_ids"]))[:2]
    inputs, mask = batch(pair)
    live = teacher.signal(inputs, mask).rows(0, int(mask.sum()))
    cut = live.top_k(5)
    captured = CapturedTeacher(Capture(small)).signal(inputs, mask)
    hidden = student.model(inputs["input_ids"]).last_hidden_state[mask].detach().requires_grad_()
    targets = inputs["targets"][mask]
    values = [loss(s, hidden, student.lm_head, targets) for s in (captured, stored(cut), cut)]
    for ours, same in zip(values[0], values[1], strict=True):
        assert torch.equal(ours, same)
    for ours, exact in zip(values[0], values[2], strict=True):
        assert not torch.equal(ours, exact)
        torch.testing.assert_close(ours, exact, rtol=2e-3, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_sees_every_value(dtype):
    model = llama(1).to(dtype)
    before = fingerprint(model)
    value = list(model.parameters())[2].view(-1)[-1:]
    kept = value.clone()
    value += 1
    assert fingerprint(model) != before
    value.copy_(kept)
    assert fingerprint(model) == before


def test_rows_that_count_nowhere_have_no_signal(small):
    inputs, mask = batch(rows()[:2])
    signal = CapturedTeacher(Capture(small)).signal(inputs, mask & False)
    assert len(signal) == 0 and signal.vocab_size == 258


def test_a_token_takes_less_than_300_bytes_at_k_64(tmp_path):
    folder = capture(llama(), tokenizer(), rows(40), tmp_path / "c", CaptureSettings())
    tokens = sum(len(r["completion_ids"]) for r in rows(40))
    assert sum(map(len, shards(folder).values())) / tokens < 300


def test_large_vocabularies_keep_their_ids():
    logits = torch.zeros(2, 70_000)
    logits[:, 69_999] = 9
    signal = stored(DenseSignal(logits).top_k(2))
    assert signal.indices[0, 0] == 69_999
    assert stored(DenseSignal(logits[:, :65_536]).top_k(2)).indices.dtype == torch.uint16


@pytest.fixture
def refused_capture(tmp_path, monkeypatch, capsys):
    """What `retort capture` says of a text and an output folder, with no weight read."""
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("retort.models.zoo.load_model", lambda *_, **__: pytest.fail("loaded"))

    def said(completion, *flags):
        data = tmp_path / "rows.jsonl"
        data.write_text(json.dumps({"prompt": "a", "completion": completion}) + "\n")
        places = [str(tmp_path / name) for name in ("model", "rows.jsonl", "out")]
        assert command(["capture", *places, *flags]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return said


def test_the_command_looks_at_rows_and_folder_before_it_reads_weights(
    refused_capture, tmp_path, small
):
    out = tmp_path / "out"
    assert "row 1: column 'completion' is empty" in refused_capture("")
    assert "--dtype" in refused_capture("b", "--model-init-kwargs", '{"dtype": "float16"}')
    assert not out.exists()
    out.mkdir()
    (out / "diary.txt").write_text("dear diary")
    assert "holds no capture" in refused_capture("b")
    shutil.rmtree(out)
    shutil.copytree(small, out)
    assert "holds a capture with teacher=''" in refused_capture("b")


def test_a_folder_of_other_inputs_is_refused(small, tmp_path):
    for inputs in [
        (llama(7), tokenizer(), rows(), SMALL),
        (llama(), byte_level(), rows(), SMALL),
        (llama(), tokenizer(), rows(5), SMALL),
        (llama(), tokenizer(), rows(), CaptureSettings(4, 2, 12)),
    ]:
        with pytest.raises(ConfigurationError, match="another folder"):
            capture(*inputs[:3], small, inputs[3])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="not empty"):
        capture(llama(), tokenizer(), rows(), tmp_path, SMALL)
    with pytest.raises(ConfigurationError, match="no rows"):
        capture(llama(), tokenizer(), [], tmp_path / "x", SMALL)
    with pytest.raises(ConfigurationError, match="top_k=0"):
        CaptureSettings(0)


def test_a_teacher_that_is_not_finite_is_refused(tmp_path):
    broken = llama()
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(RetortError, match="not finite"):
        capture(broken, tokenizer(), rows(), tmp_path / "c", SMALL)


def test_nothing_is_left_in_a_folder_of_something_else(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(ConfigurationError, match="holds no capture"):
        capture(llama(), tokenizer(), rows(), tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
