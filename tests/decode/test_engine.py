"""The engine's tokens are transformers' greedy tokens, whatever drafts, batches and layouts do."""

import pytest
import torch

import retort.decode.engine as engine_module
from retort.decode.engine import Engine
from retort.decode.params import SamplingParams
from retort.errors import ConfigurationError, UnsupportedModelError
from retort.ops import native
from tests.decode.toys import ARCHITECTURES, FLOAT32_ONLY, prompts, reference, toy
from tests.models import mambas, retnets

NEW = 24


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_generate_on_ragged_batches(name, backend):
    """In float64 on PyTorch's arithmetic, and in float32 on the core."""
    if backend == "native" and not native.available():
        pytest.skip("no native core")
    core = backend == "native" or name in FLOAT32_ONLY
    model, texts = toy(name, dtype=torch.float32 if core else torch.float64), prompts()
    expected = [reference(model, p, max_new_tokens=NEW) for p in texts]
    options = {"max_batch_size": 3, "cpu_backend": backend}
    for drafter, budget in ((None, 0), ("prompt-lookup", 5), (model, 3)):
        with Engine(model, drafter=drafter, draft_budget=budget, **options) as engine:
            assert engine.target.backend.name == backend
            outputs = engine.generate(texts, max_new_tokens=NEW)
        assert [o.token_ids for o in outputs] == expected
        assert (engine.stats.accepted_tokens > 0) == (drafter is not None)


@pytest.mark.parametrize("name", ["dense_retnet", "dense_mamba"])
def test_our_own_models_equal_generate_on_ragged_batches(name):
    model = {"dense_retnet": retnets, "dense_mamba": mambas}[name].tiny()
    texts = [[t % 31 for t in p] for p in prompts()]
    expected = [reference(model, p, max_new_tokens=NEW, pad_token_id=0) for p in texts]
    for drafter, budget in ((None, 0), ("prompt-lookup", 5), (model, 3)):
        with Engine(model, drafter=drafter, draft_budget=budget, max_batch_size=3) as engine:
            outputs = engine.generate(texts, max_new_tokens=NEW)
        assert [o.token_ids for o in outputs] == expected
        assert (engine.stats.accepted_tokens > 0) == (drafter is not None)


class ScriptedDrafter:
    """Drafts from a script: right, wrong, random, or nothing on some steps."""

    passes = False

    def __init__(self, kind, answers):
        self.kind, self.answers = kind, answers
        self.random = torch.Generator().manual_seed(7)

    def propose(self, contexts):
        return [self._draft(c) for c in contexts]

    def release(self, request_id):
        pass

    def _draft(self, context):
        answer = next(a for a in self.answers if a[: len(context.tokens)] == list(context.tokens))
        right = answer[len(context.tokens) :][: context.limit]
        if self.kind == "right":
            return right
        if self.kind == "wrong":
            return [(t + 1) % 97 for t in right]
        cut = int(torch.randint(0, context.limit + 1, (1,), generator=self.random))
        flip = int(torch.randint(0, 8, (1,), generator=self.random))
        return [(t + (i == flip)) % 97 for i, t in enumerate(right[:cut])]


@pytest.mark.parametrize("kind", ["right", "wrong", "random, sometimes none"])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_any_draft_pattern_gives_the_same_tokens(kind, batch, k):
    model = toy()
    texts = prompts((5, 11, 3, 14, 7, 2, 9, 6))
    expected = [reference(model, p, max_new_tokens=NEW) for p in texts]
    answers = [p + e + [0] * k for p, e in zip(texts, expected, strict=True)]
    drafter = ScriptedDrafter(kind, answers)
    with Engine(model, drafter=drafter, draft_budget=k, max_batch_size=batch) as engine:
        outputs = engine.generate(texts, max_new_tokens=NEW)
    assert [o.token_ids for o in outputs] == expected
    stats = engine.stats
    assert stats.draft_tokens > 0
    assert (stats.accepted_tokens == 0) == (kind == "wrong")


def test_a_perfect_drafter_of_length_k_gives_k_plus_one_tokens_a_step():
    model = toy(eos_token_id=None)
    texts = prompts((4, 9, 6))
    expected = [reference(model, p, max_new_tokens=21) for p in texts]
    drafter = ScriptedDrafter("right", [p + e for p, e in zip(texts, expected, strict=True)])
    with Engine(model, drafter=drafter, draft_budget=4) as engine:
        outputs = engine.generate(texts, max_new_tokens=21)  # one by prefill, then 4 steps of 5
        assert engine.stats.steps == 5
        assert [(o.stats.steps, o.stats.accepted_tokens) for o in outputs] == [(5, 16)] * 3
        assert engine.stats.tokens_per_step == 5


def test_one_forward_a_step_over_exactly_the_real_tokens(monkeypatch):
    model, shapes, feeds = toy(), [], []
    forward, packed = model.forward, engine_module.PackedModel.forward

    def spy(**kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(**kwargs)

    def count(self, given, *args, **options):
        feeds.append(sum(len(t) for _, t in given))
        return packed(self, given, *args, **options)

    with Engine(model, drafter="prompt-lookup", draft_budget=4) as engine:
        monkeypatch.setattr(model, "forward", spy)
        monkeypatch.setattr(engine_module.PackedModel, "forward", count)
        engine.generate(prompts(), max_new_tokens=NEW)
        assert shapes == [(1, n) for n in feeds]
        assert len(shapes) == engine.stats.steps
        assert engine.stats.padding_tokens == 0


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunked_prefill_changes_nothing(chunk):
    model, texts = toy(), prompts()
    expected = [reference(model, p, max_new_tokens=NEW) for p in texts]
    with Engine(model, max_prefill_tokens=chunk, drafter="prompt-lookup") as engine:
        assert [o.token_ids for o in engine.generate(texts, max_new_tokens=NEW)] == expected


def test_rows_join_and_leave_at_any_step():
    model, texts = toy(), prompts()
    expected = [reference(model, p, max_new_tokens=8 + i) for i, p in enumerate(texts)]
    with Engine(model, drafter="prompt-lookup", draft_budget=3) as engine:
        done, ids = {}, []
        for i, prompt in enumerate(texts):
            ids.append(engine.add_request(prompt, SamplingParams(max_new_tokens=8 + i)))
            done |= {o.request_id: o for o in engine.step()}
        while engine.has_unfinished():
            done |= {o.request_id: o for o in engine.step()}
        assert [done[i].token_ids for i in ids] == expected
        assert engine.target.cache.rows == ()


def test_a_held_row_goes_back_and_on_without_a_second_prefill():
    model, prompt = toy(eos_token_id=None), prompts((9,))[0]
    with Engine(model) as engine:
        rid = engine.add_request(prompt, SamplingParams(max_new_tokens=12), hold=True)
        while engine.has_unfinished():
            (first,) = engine.step() or (None,)
        before = engine.target.forward_tokens
        keep = len(prompt) + 5
        other = (first.token_ids[5] + 1) % 97
        engine.rewind(rid, keep, append=[other], max_new_tokens=6)
        outputs = []
        while engine.has_unfinished():
            outputs += engine.step()
        prefix = prompt + first.token_ids[:5] + [other]
        expected = reference(model, prefix, max_new_tokens=6)
        assert outputs[0].token_ids == [*first.token_ids[:5], other, *expected]
        assert engine.target.forward_tokens - before == 6  # the replaced token and 5 new ones
        engine.release(rid)
        assert engine.target.cache.rows == ()


def test_zero_new_tokens_and_the_context_limit():
    model = toy(max_position_embeddings=32, eos_token_id=None)
    with Engine(model, drafter="prompt-lookup") as engine:
        (empty,) = engine.generate([[5, 6, 7]], max_new_tokens=0)
        assert (empty.token_ids, empty.finish_reason) == ([], "length")
        (full,) = engine.generate([[5, 6, 7]], max_new_tokens=100)
        assert (len(full.token_ids), full.finish_reason) == (29, "length")


def test_end_of_sequence_inside_a_block_ends_the_row():
    model, prompt = toy(eos_token_id=None), prompts((6,))[0]
    plain = reference(model, prompt, max_new_tokens=NEW)
    eos = next(t for i, t in enumerate(plain) if i >= 3 and t not in plain[:i])
    stop = plain.index(eos)
    with Engine(model, drafter=ScriptedDrafter("right", [prompt + plain]), draft_budget=8) as e:
        (out,) = e.generate([prompt], max_new_tokens=NEW, eos_token_id=eos)
    assert out.token_ids == plain[: stop + 1]
    assert out.finish_reason == "stop"


def test_abort_frees_the_row_and_keeps_what_there_is():
    model = toy(eos_token_id=None)
    with Engine(model) as engine:
        rid = engine.add_request([4, 5, 6], SamplingParams(max_new_tokens=50))
        engine.step()
        engine.step()
        out = engine.abort(rid)
        assert (out.finish_reason, len(out.token_ids)) == ("abort", 2)
        assert not engine.has_unfinished()
        assert engine.target.cache.rows == ()


def test_the_model_is_unchanged_between_and_after_passes():
    model = toy()
    model.train()
    before = model.config._attn_implementation
    with Engine(model) as engine:
        engine.generate([[3, 4, 5]], max_new_tokens=3)
        assert model.training and model.config._attn_implementation == before
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([97], {}, "token id 97"),
        ([-1], {}, "token id -1"),
        (list(range(3, 90)) * 3, {}, "context is 256"),
        ([3] * 256, {}, "256 tokens and the model's context is 256"),
        ([3], {"temperature": float("nan")}, "temperature"),
        ([3], {"top_p": 1.5}, "top_p"),
        ([3], {"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens"),
        ([3], {"max_tokens": 3}, "unknown sampling option 'max_tokens'"),
        ([3], {"logit_bias": {500: 1.0}}, "logit_bias"),
        ([3], {"eos_token_id": 500}, "eos_token_id"),
        ("text", {}, "text prompt"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(prompt, options, message):
    with Engine(toy()) as engine:
        with pytest.raises(ConfigurationError, match=message):
            engine.generate([prompt], **options)
        assert engine.target.forward_passes == 0
        assert not engine.has_unfinished()


def test_a_drafter_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigurationError, match=r"96 tokens and the target's 97"):
        Engine(toy(), drafter=toy(vocab_size=96))


def test_unsupported_models_are_refused_by_name():
    from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

    for config, reason in (
        (BloomConfig(vocab_size=97, hidden_size=8, n_layer=1, n_head=1), "attention interface"),
        (MambaConfig(vocab_size=97, hidden_size=8, num_hidden_layers=1), "recurrent state"),
    ):
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(UnsupportedModelError, match=reason):
            Engine(model)


@pytest.mark.parametrize(
    ("append", "more", "named"),
    [
        ([10**6], None, "append: token id 1000000"),
        ([-1], None, "append: token id -1"),
        ([1.5], None, "list of token ids"),
        ([5] * 10_000, 4, "context"),
        ([5], -1, "max_new_tokens=-1"),
    ],
)
def test_a_refused_rewind_leaves_the_row_as_it_was(append, more, named):
    model, prompt = toy(), prompts((6,))[0]
    with Engine(model) as engine:
        rid = engine.add_request(prompt, SamplingParams(max_new_tokens=5), hold=True)
        while engine.has_unfinished():
            engine.step()
        before = list(engine.request(rid).tokens)
        with pytest.raises(ConfigurationError, match=named):
            engine.rewind(rid, len(prompt) + 2, append, more)
        assert engine.request(rid).tokens == before and not engine.has_unfinished()
        engine.rewind(rid, len(prompt) + 2, torch.tensor([5]), 3)
        outputs = [o for _ in range(3) for o in engine.step()]
        assert outputs[0].token_ids[2] == 5


def test_one_prompt_may_be_a_tensor():
    model, prompt = toy(), prompts((6,))[0]
    with Engine(model) as engine:
        (out,) = engine.generate(torch.tensor(prompt), max_new_tokens=3)
        assert out.token_ids == reference(model, prompt, max_new_tokens=3)


def test_an_unsupported_drafter_is_refused_before_its_weights(monkeypatch, tmp_path):
    from transformers import MambaConfig

    MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    monkeypatch.setattr("retort.models.loader.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        Engine(toy(), drafter=str(tmp_path))
