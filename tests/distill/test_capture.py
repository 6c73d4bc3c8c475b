"""Captures: written once, resumed bit for bit, checked, and equal to the live signal's top-k."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from retort.cli import run as command
from retort.distill import capture as capturing
from retort.distill.batch import TrainingSequence, build_batch, stream_mask
from retort.distill.capture import CaptureSettings, capture, digest, stored
from retort.distill.captured import Capture, CapturedTeacher
from retort.distill.config import DistillConfig
from retort.distill.losses import DivergenceTerm, chunked_loss
from retort.distill.losses.divergence import forward_kl
from retort.distill.signals import DenseSignal
from retort.distill.teachers import Teacher
from retort.errors import ConfigurationError, RetortError
from retort.manifest import MANIFEST, write_manifest
from retort.train.checkpoint import LOCK
from tests.distill.tokenizers import byte_level
from tests.distill.toys import ROWS, config, llama, tokenizer, trainer

SMALL = CaptureSettings(top_k=5, batch_size=2, shard_tokens=12)


def rows(count=9):
    """Tokenised rows of lengths 1 … 7; ids of the 258."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(0, 258, (n,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(1 + i % 4), "completion_ids": ids(1 + (5 * i) % 7)} for i in range(count)
    ]


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if "shard" in path.name}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return capture(llama(), tokenizer(), rows(), tmp_path_factory.mktemp("c") / "one", SMALL)


def test_a_capture_holds_the_live_top_k_of_every_row_alone(made):
    """Each row's signal against one unbatched forward of the model itself."""
    found, model = Capture(made), llama().eval()
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


def test_the_loss_from_a_capture_is_that_of_the_live_signal_cut_and_rounded(made):
    """Bit-equal where the live forward has the capture's batches; the rounding itself is small."""
    teacher, student = Teacher(llama()), llama(2)
    shard = [rows()[i] for i in next(capturing._shards(rows(), SMALL.shard_tokens))]
    pair = sorted(shard, key=lambda r: -len(r["prompt_ids"] + r["completion_ids"]))[:2]
    inputs, mask = batch(pair)
    live = teacher.signal(inputs, mask).rows(0, int(mask.sum()))
    cut = live.top_k(5)
    captured = CapturedTeacher(Capture(made)).signal(inputs, mask)
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
    before = capturing.fingerprint(model)
    value = list(model.parameters())[2].view(-1)[-1:]
    kept = value.clone()
    value += 1
    assert capturing.fingerprint(model) != before
    value.copy_(kept)
    assert capturing.fingerprint(model) == before


def test_rows_that_count_nowhere_have_no_signal(made):
    inputs, mask = batch(rows()[:2])
    signal = CapturedTeacher(Capture(made)).signal(inputs, mask & False)
    assert len(signal) == 0 and signal.vocab_size == 258


class Killed(BaseException):
    """Not an Exception, as a signal is none."""


def test_a_capture_that_was_killed_three_times_is_the_unbroken_one(made, tmp_path, monkeypatch):
    """Inside a shard, between a shard and its note, and before the manifest."""
    folder = tmp_path / "killed"

    def half_a_shard(path, tensors):
        path.with_name(f".{path.name}.partial").write_bytes(b"half a shard")
        raise Killed

    def no_note(path, value):
        if "shards" in value and len(value["shards"]) == 2:
            raise Killed
        return capturing_write_json(path, value)

    def no_manifest(*_, **__):
        raise Killed

    capturing_write_json = capturing.write_json
    deaths = {"_write_shard": half_a_shard, "write_json": no_note, "write_manifest": no_manifest}
    for name, death in deaths.items():
        monkeypatch.setattr(capturing, name, death)
        with pytest.raises(Killed):
            capture(llama(), tokenizer(), rows(), folder, SMALL)
        monkeypatch.undo()
        with pytest.raises(ConfigurationError, match="not finished"):
            Capture(folder)
    capture(llama(), tokenizer(), rows(), folder, SMALL)
    assert shards(folder) == shards(made) and len(shards(made)) > 2
    assert (folder / MANIFEST).read_bytes() == (made / MANIFEST).read_bytes()
    assert not list(folder.glob("*.partial*")) and not list(folder.glob(".shard*"))


# Kills itself as signal 9 does, at the call ``number`` of a function of `capture`.
KILLED = """
import os, signal, sys
from retort.cli import main
from retort.distill import capture
name, number = sys.argv.pop(1), int(sys.argv.pop(1))
original, calls = getattr(capture, name), []
def killed(*arguments, **keywords):
    calls.append(1)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)
setattr(capture, name, killed)
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_nine_on_the_command_line_changes_no_bit(tmp_path):
    """Real processes, killed before a shard, between a shard and its note, before the manifest."""
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    llama().save_pretrained(model)
    tokenizer().save_pretrained(model)
    lines = [{"prompt": f"row {i}", "completion": "x" * (20 + i % 7)} for i in range(40)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def arguments(folder):
        options = ["--shard-tokens", "120", "--batch-size", "2"]
        return ["capture", str(model), str(data), str(tmp_path / folder), *options]

    def start(script, *arguments):
        run = [sys.executable, "-c", script, *arguments]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads spin where cores are busy
        return subprocess.run(run, capture_output=True, check=False, env=one_thread)

    whole = "from retort.cli import main; main()"
    assert start(whole, *arguments("whole")).returncode == 0
    for place in ("_write_shard", "2"), ("write_json", "4"), ("write_manifest", "1"):
        done = start(KILLED, *place, *arguments("killed"))
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        assert not (tmp_path / "killed" / MANIFEST).exists()
    assert start(whole, *arguments("killed")).returncode == 0
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    assert len(shards(tmp_path / "whole")) > 5


def test_finished_shards_are_not_made_again_and_damaged_ones_are(made, tmp_path, monkeypatch):
    folder, written = tmp_path / "c", []
    shutil.copytree(made, folder)
    facts = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    files = facts.pop("files")
    (folder / capturing.PROGRESS).write_text(json.dumps({**facts, "shards": files}))
    flip(folder / "shard-00001.safetensors")
    real = capturing._write_shard
    monkeypatch.setattr(
        capturing, "_write_shard", lambda p, t: (written.append(p.name), real(p, t))
    )
    capture(llama(), tokenizer(), rows(), folder, SMALL)
    assert written == ["shard-00001.safetensors"] and shards(folder) == shards(made)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


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
def test_a_damaged_capture_is_refused_naming_the_file(made, tmp_path, fault, message):
    folder = tmp_path / "c"
    shutil.copytree(made, folder)
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
def test_a_capture_that_was_written_wrong_is_refused_naming_file_and_key(made, tmp_path, fault):
    spoil, message = MALFORMED[fault]
    folder = tmp_path / "c"
    shutil.copytree(made, folder)
    facts = json.loads((folder / MANIFEST).read_text())
    spoil(folder, facts)
    write_manifest(folder, facts, skip=(capturing.PROVENANCE, LOCK))
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        Capture(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_opening_a_capture_copies_no_tensor(made):
    """Its tensors are pages of the files: nothing of their size is allocated."""
    found = Capture(made)
    parts = found._files[0].get_tensor("ids"), found._files[0].get_tensor("ids")
    assert parts[0].data_ptr() == parts[1].data_ptr()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"shards": 3}'])
def test_notes_of_an_unfinished_capture_that_are_damaged_are_refused(tmp_path, content):
    (tmp_path / capturing.PROGRESS).write_text(content)
    with pytest.raises(ConfigurationError, match=f"{capturing.PROGRESS} is damaged"):
        capture(llama(), tokenizer(), rows(), tmp_path, SMALL)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def rename(folder, name):
    facts = json.loads((folder / MANIFEST).read_text())
    facts["files"] = {name: next(iter(facts["files"].values()))}
    (folder / MANIFEST).write_text(json.dumps(facts))


def test_other_data_and_another_tokenizer_are_refused(made):
    found, other = Capture(made), [*rows()[:3], {"prompt_ids": [1], "completion_ids": [2, 3]}]
    found.check(tokenizer(), rows(), "train.jsonl")
    found.check(tokenizer(), rows()[2:5], "train.jsonl")  # a part of the data will do
    with pytest.raises(ConfigurationError, match=r"row 4 of train.jsonl"):
        found.check(tokenizer(), other, "train.jsonl")
    with pytest.raises(ConfigurationError, match="another tokenizer"):
        found.check(byte_level(), rows(), "train.jsonl")


def test_a_row_is_named_by_its_place_in_the_data_where_rows_were_left_out(made):
    kept = [{"index": 2 * place, **row} for place, row in enumerate(rows()[:3])]
    other = {"index": 17, "prompt_ids": [1], "completion_ids": [2, 3]}
    with pytest.raises(ConfigurationError, match=r"row 18 of train.jsonl"):
        Capture(made).check(tokenizer(), [*kept, other], "train.jsonl")


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
    refused_capture, tmp_path, made
):
    out = tmp_path / "out"
    assert "row 1: column 'completion' is empty" in refused_capture("")
    assert "--dtype" in refused_capture("b", "--model-init-kwargs", '{"dtype": "float16"}')
    assert not out.exists()
    out.mkdir()
    (out / "diary.txt").write_text("dear diary")
    assert "holds no capture" in refused_capture("b")
    shutil.rmtree(out)
    shutil.copytree(made, out)
    assert "holds a capture with teacher=''" in refused_capture("b")


def test_a_folder_of_other_inputs_is_refused(made, tmp_path):
    for inputs in [
        (llama(7), tokenizer(), rows(), SMALL),
        (llama(), byte_level(), rows(), SMALL),
        (llama(), tokenizer(), rows(5), SMALL),
        (llama(), tokenizer(), rows(), CaptureSettings(4, 2, 12)),
    ]:
        with pytest.raises(ConfigurationError, match="another folder"):
            capture(*inputs[:3], made, inputs[3])
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


def captured_rows(folder, teacher, **changes):
    """A capture of `ROWS` as the trainer encodes them."""
    encoded = trainer(folder / "t", method="kd", **changes).train_dataset
    return capture(teacher, tokenizer(), encoded, folder / "capture", CaptureSettings(258))


def test_a_run_from_a_whole_capture_follows_the_live_run(tmp_path):
    """With every id kept only the float16 rounding is left between the two."""
    folder = captured_rows(tmp_path, llama(1))
    logs = []
    for name, changes in ("live", {}), ("captured", {"teacher_signal": str(folder)}):
        run = trainer(tmp_path / name, llama(2), llama(1), method="kd", **changes)
        assert isinstance(run.teacher, CapturedTeacher) == (name == "captured")
        run.train()
        logs.append([r["loss"] for r in run.state.log_history if "loss" in r])
    torch.testing.assert_close(*map(torch.tensor, logs), rtol=2e-3, atol=0)
    assert logs[0] != logs[1]


def test_a_captured_run_needs_no_teacher_and_refuses_other_rows(tmp_path):
    from retort.distill.trainer import DistillTrainer

    folder = captured_rows(tmp_path, llama(1))
    settings = config(tmp_path / "run", method="kd", teacher_signal=str(folder))

    def build(data, evaluation=None):
        return DistillTrainer(
            llama(2), settings, None, data, evaluation, processing_class=tokenizer()
        )

    run = build(ROWS, ROWS[:2])
    run.train()
    assert run.evaluate()["eval_forward_kl"] > 0
    with pytest.raises(ConfigurationError, match="row 9 of the training data"):
        build([*ROWS, {"prompt": "new", "completion": "row"}])
    with pytest.raises(ConfigurationError, match="name a teacher"):
        build(ROWS, [{"prompt": "new", "completion": "row"}])


def test_a_configuration_that_contradicts_a_capture_is_refused(tmp_path):
    for method, message in ("sft", "contradicts"), ("mgsr", "others written"):
        with pytest.raises(ConfigurationError, match=message):
            DistillConfig(output_dir=str(tmp_path), use_cpu=True, method=method, teacher_signal="x")


def test_two_runs_never_share_a_folder(tmp_path):
    folder = tmp_path / "c"
    script = (
        "import sys, time; from pathlib import Path; from retort.train.checkpoint import alone\n"
        f"with alone(Path({str(folder)!r})):\n print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigurationError, match="another run is writing"):
            capture(llama(), tokenizer(), rows(), folder, SMALL)
        other.kill()
    capture(llama(), tokenizer(), rows(), folder, SMALL)
    assert Capture(folder).facts["rows"] == 9


def test_nothing_is_left_in_a_folder_of_something_else(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(ConfigurationError, match="holds no capture"):
        capture(llama(), tokenizer(), rows(), tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
