"""Packing changes the layout of a batch and nothing else: losses, gradients, spans, captures."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from retort import (
    DenseMambaConfig,
    DenseMambaForCausalLM,
    DenseRetNetConfig,
    DenseRetNetForCausalLM,
)
from retort.distill.batch import TrainingSequence, build_batch, sequence_slices, stream_mask
from retort.distill.capture import capture
from retort.distill.capture_facts import CaptureSettings
from retort.distill.captured import CapturedTeacher
from retort.distill.hidden import HeadlessModel
from retort.distill.losses import IGNORED
from retort.distill.packing import packed_rows, require_packing
from retort.distill.presets import PRESETS
from retort.distill.spans import pair_mask
from retort.errors import ConfigurationError, UnsupportedModelError
from tests.decode.toys import toy
from tests.distill.toys import ROWS, config, llama, tokenizer, trainer, weights

OFF_POLICY = [name for name, preset in PRESETS.items() if not preset.writes]
MIX = {"method": "mgsr", "lmbda": 0, "scrg": False, "dac_mode": "fixed", "dac_top_k": 9}


def sequences(seed=0, count=9):
    """Random lengths from one token on, ids of a vocabulary of 97, two kinds of streams."""
    draw = random.Random(seed)

    def ids(n):
        return [draw.randrange(97) for _ in range(n)]

    return [
        TrainingSequence(ids(draw.randint(1, 6)), ids(draw.randint(1, 7)), True, i % 3 > 0)
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_has_a_place_and_rows_are_full(seed):
    draw = random.Random(seed)
    size, lengths = draw.randint(3, 20), [draw.randint(1, 12) for _ in range(draw.randint(0, 30))]
    rows = packed_rows(lengths, size)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    held = [sum(lengths[i] for i in row) for row in rows]
    assert all(n <= size or len(row) == 1 for n, row in zip(held, rows, strict=True))
    for first, row in enumerate(rows):  # what a later row holds did not fit into an earlier one
        free = size - held[first]
        assert all(lengths[i] > free for later in rows[first + 1 :] for i in later)
        assert row


def test_equal_lengths_keep_their_order():
    assert packed_rows([3, 3, 3, 3], 6) == [[0, 1], [2, 3]]
    assert packed_rows([2, 5, 9, 2], 7) == [[2], [1, 0], [3]]


def test_a_packed_batch_holds_each_sequence_as_it_stands_alone():
    made = sequences()
    batch = build_batch(made, 5, tagger=lambda ids: [i // 2 for i in range(len(ids))], pack_to=17)
    assert len(batch["input_ids"]) < len(made) and batch["input_ids"].shape[1] <= 17
    seen = []
    for row, place in sequence_slices(batch):
        ids = batch["input_ids"][row, place].tolist()
        whole = next(s for s in made if [*s.prompt, *s.completion] == ids)
        flags = (whole.supervised, whole.distilled, whole.contrasted)
        names = ("supervised", "distilled", "contrasted")
        assert flags == tuple(bool(batch[n][row]) for n in names)
        alone = build_batch([whole], 5, lambda ids: [i // 2 for i in range(len(ids))])
        for name in ("targets", "span_ids"):
            assert torch.equal(batch[name][row, place], alone[name][0]), name
        assert batch["position_ids"][row, place].tolist() == list(range(len(ids)))
        seen.append(whole)
    assert len(seen) == len(made) and all(any(s is m for s in seen) for m in made)
    outside = batch["attention_mask"] == 0
    assert (batch["targets"][outside] == IGNORED).all()
    assert (batch["position_ids"][outside] == 0).all()


def test_no_span_reaches_into_the_next_sequence():
    """One span over everything: pairs are those within completions, as many as unpacked."""
    made = [TrainingSequence([1, 2], [3] * n, False, True) for n in (1, 2, 3, 5)]
    pairs = []
    for size in (None, 32):
        batch = build_batch(made, 0, lambda ids: [7] * len(ids), size)
        mask = stream_mask(batch, "distilled")
        pairs.append(pair_mask(batch["span_ids"], mask).sum().item())
    assert pairs == [0 + 1 + 2 + 4] * 2


def dense(kind, seed=3):
    """A DenseRetNet or DenseMamba with three layers whose dense gates are open."""
    torch.manual_seed(seed)
    shared = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": None}
    if kind == "dense_retnet":
        sizes = {"query_key_dim": 16, "num_attention_heads": 2, "intermediate_k_select_scale": 4}
        model = DenseRetNetForCausalLM(DenseRetNetConfig(**shared, **sizes))
    else:
        model = DenseMambaForCausalLM(DenseMambaConfig(**shared, state_size=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


MODELS = {
    "llama": lambda: toy("llama"),
    "llama, eager": lambda: toy("llama", attn_implementation="eager"),
    "gpt2": lambda: toy("gpt2"),
    "mistral": lambda: toy("mistral"),
    "gemma2": lambda: toy("gemma2"),
    "gpt_neox": lambda: toy("gpt_neox"),
    "dense_retnet": lambda: dense("dense_retnet").double(),
    "dense_mamba": lambda: dense("dense_mamba"),
}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_gradients_are_those_of_single_rows(name):
    model = MODELS[name]()
    headless = HeadlessModel(model)
    require_packing(headless, "student")
    made = sequences(4, 7)
    packed = build_batch(made, 3, pack_to=21)
    assert len(packed["input_ids"]) < 7
    ids, places = packed["input_ids"], packed["position_ids"]
    together = headless.hidden(ids, None, positions=places)
    parts = {
        tuple(ids[r, p].tolist()): (together[r, p], headless.hidden(ids[r : r + 1, p], None)[0])
        for r, p in sequence_slices(packed)
    }
    assert len(parts) == 7
    eager = model.config._attn_implementation == "eager"  # its softmax is in float32
    tolerance = 1e-9 if together.dtype == torch.float64 and not eager else 2e-5
    loss = [torch.zeros(()), torch.zeros(())]
    for number, pair in enumerate(parts.values()):
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)
        loss = [a + (number + 1) * b.square().sum() for a, b in zip(loss, pair, strict=True)]
    grads = [
        torch.autograd.grad(each, list(model.parameters()), allow_unused=True) for each in loss
    ]
    scale = max(float(g.abs().max()) for g in grads[1] if g is not None)
    compared = 0
    for ours, theirs in zip(*grads, strict=True):
        if theirs is None:
            assert ours is None
            continue
        torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * tolerance * scale)
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("name", ["llama", "mistral", "dense_retnet", "dense_mamba"])
def test_other_sequences_of_a_row_change_no_bit(name):
    """The rest of the row is poisoned with other tokens."""
    headless = HeadlessModel(MODELS[name]())
    batch = build_batch(sequences(6, 8), 3, pack_to=23)
    with torch.no_grad():
        before = headless.hidden(batch["input_ids"], None, positions=batch["position_ids"])
        for row, place in sequence_slices(batch):
            ids = (batch["input_ids"] + 41) % 97
            ids[row, place] = batch["input_ids"][row, place]
            after = headless.hidden(ids, None, positions=batch["position_ids"])
            assert torch.equal(after[row, place], before[row, place])


# What cannot be packed


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)).eval()


def mamba():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


class Leaking:
    """A model that drops the positions: plain causal attention over the whole row."""

    def __init__(self, model):
        self.model, self.config, self.device = model, model.config, model.device

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, position_ids=None, **inputs):
        return self.model(**inputs)


class Shifted(Leaking):
    """A model that keeps sequences apart and counts positions over the whole row."""

    def __call__(self, position_ids=None, **inputs):
        if position_ids is None or not (position_ids == 0).sum() > 1:
            return self.model(**inputs)
        half = position_ids.shape[1] // 2
        logits = [
            self.model(input_ids=inputs["input_ids"][:, part], position_ids=shifted).logits
            for part, shifted in (
                (slice(half), position_ids[:, :half]),
                (slice(half, None), position_ids[:, half:] + half),
            )
        ]
        return SimpleNamespace(logits=torch.cat(logits, 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (bloom, "BloomForCausalLM"),
        (mamba, "MambaForCausalLM"),
        (lambda: toy("opt"), "OPTForCausalLM"),
        (lambda: Leaking(toy("llama")), "see the one before it"),
        (lambda: Shifted(toy("gpt2")), "at position 0"),
    ],
)
def test_a_model_that_would_mix_sequences_is_refused_by_name(build, message):
    torch.manual_seed(0)
    headless = HeadlessModel(build())
    if message.endswith("position 0"):
        headless.plain, headless.head = False, lambda logits: logits
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        require_packing(headless, "teacher")
    assert "teacher" in str(caught.value) and "\n" not in str(caught.value)


def test_the_trial_leaves_training_mode_as_it_was():
    model = llama().train()
    model.model.layers[0].eval()
    require_packing(HeadlessModel(model), "student")
    assert model.training and not model.model.layers[0].training


def test_a_run_refuses_such_a_student_and_such_a_teacher(tmp_path):
    torch.manual_seed(0)
    other = bloom()
    other.resize_token_embeddings(258)
    with pytest.raises(UnsupportedModelError, match=r"student \(BloomForCausalLM\)"):
        trainer(tmp_path, other, llama(1), method="kd", packing=True)
    with pytest.raises(UnsupportedModelError, match=r"teacher \(BloomForCausalLM\)"):
        trainer(tmp_path, llama(1), other, method="kd", packing=True)


@pytest.mark.parametrize("method", sorted(set(PRESETS) - set(OFF_POLICY)))
def test_presets_with_student_text_refuse_packing_and_say_why(tmp_path, method):
    with pytest.raises(ConfigurationError, match="the student writes") as caught:
        config(tmp_path, method=method, packing=True)
    assert "packing" in str(caught.value) and method in str(caught.value)


# Whole runs


def one_run(folder, packing, **changes):
    student, teacher = (llama(seed, dtype=torch.float64) for seed in (2, 1))
    changes = {"max_length": 30, "per_device_train_batch_size": 4, **changes}
    run = trainer(folder, student, teacher, packing=packing, eval_dataset=ROWS[:3], **changes)
    shapes = []
    original = run._batch
    run._batch = lambda made: (
        shapes.append((len(made), len(original(made)["input_ids"]))) or (original(made))
    )
    run.train()
    logged = [(r["loss"], r["grad_norm"]) for r in run.state.log_history if "loss" in r]
    return logged, run.evaluate(), weights(run.model), shapes


@pytest.mark.parametrize("mix", [*({"method": m} for m in OFF_POLICY), MIX], ids=str)
def test_a_packed_run_is_the_unpacked_one(tmp_path, mix):
    """Loss, gradient norm, evaluation and final weights; fewer rows go through the models."""
    (logged, scores, end, _), (ours, our_scores, our_end, shapes) = (
        one_run(tmp_path / str(packing), packing, **mix) for packing in (False, True)
    )
    assert any(rows < count for count, rows in shapes)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(logged), rtol=1e-6, atol=1e-9)
    for name, value in scores.items():
        if not name.endswith(("runtime", "per_second")):
            assert our_scores[name] == pytest.approx(value, rel=1e-6), name
    for name, value in end.items():
        torch.testing.assert_close(our_end[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["dense_retnet", "dense_mamba"])
def test_dense_students_train_packed(tmp_path, kind):
    losses = []
    for packing in (False, True):
        student = _student(kind)
        run = trainer(
            tmp_path / str(packing), student, llama(1), method="kd", packing=packing, max_length=30
        )
        run.train()
        losses.append([r["loss"] for r in run.state.log_history if "loss" in r])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)


def _student(kind):
    from retort.distill import builders

    torch.manual_seed(0)
    return getattr(builders, f"{kind}_student")(llama(1), 2)


def test_a_capture_feeds_packed_rows(tmp_path):
    encoded = trainer(tmp_path / "t", method="kd").train_dataset
    settings = CaptureSettings(top_k=258, shard_tokens=30)
    folder = capture(llama(1), tokenizer(), encoded, tmp_path / "capture", settings)
    losses = []
    for packing in (False, True):
        run = trainer(
            tmp_path / str(packing),
            llama(2),
            method="kd",
            packing=packing,
            teacher_signal=str(folder),
            per_device_train_batch_size=4,
        )
        assert isinstance(run.teacher, CapturedTeacher)
        run.train()
        losses.append([r["loss"] for r in run.state.log_history if "loss" in r])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=2e-5, atol=0)
