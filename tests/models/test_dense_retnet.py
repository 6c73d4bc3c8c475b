"""DenseRetNet: exact in every form, and a transformers model in every respect we promise."""

import copy

import pytest
import torch
from transformers import DynamicCache

from retort.errors import ConfigurationError, RewindError
from retort.models.dense_retnet import DenseRetNetConfig, DenseRetNetForCausalLM, DenseRetNetModel
from tests.models.retnets import VOCAB, ids, naive_logits, tiny

VARIANTS = {
    "RetNet": {"dense_block_layers": 0},
    "norms alone": {"dense_block_layers": 0, "dense_norms": True},
    "m=1": {"dense_block_layers": 1},
    "m=2, other scales": {"intermediate_k_select_scale": 8, "intermediate_v_select_scale": 2},
    "m beyond the layers, MLP": {"dense_block_layers": 5, "mlp_intermediate_size": 12},
    "no gate": {"dense_gate": False},
    "four heads": {"num_attention_heads": 4},
}
WHOLE = 1000
FORMS = [("parallel", 64), ("recurrent", 64), *(("chunkwise", n) for n in (1, 7, 64, WHOLE))]


def close(got, want, atol=1e-10):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def packed(model, cache, parts):
    """One packed pass over ``{row: ids}``; the logits of each row."""
    layout = cache.begin(list(parts), [len(t) for t in parts.values()])
    tokens = torch.cat(list(parts.values()))[None]
    logits = model(tokens, position_ids=layout.position_ids(), past_key_values=cache).logits[0]
    cache.end()
    return dict(zip(parts, logits.split(layout.counts), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_form_equals_the_naive_model_in_value_and_gradient(name):
    model, tokens = tiny(**VARIANTS[name]), ids(1, 23)
    weight = torch.randn(23, VOCAB, dtype=torch.float64)

    def gradients(logits):
        grads = torch.autograd.grad((logits * weight).sum(), list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    want = naive_logits(model, tokens[0])
    want_grads = gradients(want)
    for form, size in FORMS:
        model.config.retention_form, model.config.chunk_size = form, size
        got = model(tokens, use_cache=False).logits[0]
        close(got, want)
        close(gradients(got), want_grads, 1e-9)
    got = model(tokens, use_cache=True).logits[0]
    close(got, want)
    close(gradients(got), want_grads, 1e-9)


def test_m0_has_no_fusion_and_the_switch_adds_only_norms():
    names = {name for name, _ in tiny(dense_block_layers=0).named_parameters()}
    normed = {n for n, _ in tiny(dense_block_layers=0, dense_norms=True).named_parameters()}
    dense = {name for name, _ in tiny(dense_block_layers=2).named_parameters()}
    assert not [name for name in names if "select" in name or "k_norm" in name]
    added = {f"model.layers.{i}.self_attn.{x}_norm.weight" for i in (1, 2) for x in "kv"}
    assert normed - names == added
    assert all("select" in name for name in dense - normed)
    assert not [name for name in dense if "layers.0.self_attn.k_" in name and "proj" not in name]


@torch.no_grad()
def test_float32_is_close_to_float64():
    tokens = ids(2, 150)
    model = tiny(num_attention_heads=4)
    want = model(tokens, use_cache=False).logits
    single = copy.deepcopy(model).float()
    scale = want.abs().max()
    for form, size in FORMS:
        single.config.retention_form, single.config.chunk_size = form, size
        close(single(tokens, use_cache=False).logits.double() / scale, want / scale, 4e-5)
    close(single(tokens, use_cache=True).logits.double() / scale, want / scale, 4e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_runs_with_float32_states(dtype):
    model = tiny().to(dtype)
    tokens = ids(2, 40)
    output = model(tokens, use_cache=True)
    assert output.logits.dtype == dtype and output.past_key_values.states.dtype == torch.float32
    whole = tiny()(tokens, use_cache=False).logits
    assert (output.logits.double() - whole).abs().mean() < 0.1 * whole.std()
    more = model(ids(2, 1), past_key_values=output.past_key_values).logits
    assert more.isfinite().all()


@torch.no_grad()
def test_padding_anywhere_changes_nothing_with_any_cut():
    """Left, right and in holes; whole, and continued by pieces with masks of either width."""
    model = tiny()
    mask = torch.ones(4, 50, dtype=torch.long)
    mask[0, :11], mask[1, 33:], mask[2, 5::7] = 0, 0, 0
    tokens = ids(4, 50)
    want = [naive_logits(model, tokens[b][mask[b] == 1]) for b in range(4)]

    def check(logits):
        for b in range(4):
            close(logits[b][mask[b] == 1], want[b])

    check(model(tokens, attention_mask=mask, use_cache=False).logits)
    for cuts in ([50], [1] * 50, [20, 3, 27]):
        for full in (False, True):
            cache, at, logits = model.new_row_cache(), 0, []
            for n in cuts:
                part = mask[:, : at + n] if full else mask[:, at : at + n]
                piece = tokens[:, at : at + n]
                logits.append(model(piece, attention_mask=part, past_key_values=cache).logits)
                at += n
            check(torch.cat(logits, 1))


def test_packed_training_input_equals_its_sequences():
    model = tiny().train()
    lengths = [13, 1, 30]
    tokens = ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 13, 14, 44])
    want = torch.cat([model(t).logits for t in tokens.split(lengths, 1)], 1)
    for size in (1, 7, 64):
        model.config.chunk_size = size
        close(model(tokens, position_ids=positions).logits, want)
        close(model(tokens, cu_seq_lens_q=bounds).logits, want)
    model.eval()
    close(model(tokens, position_ids=positions).logits, want)  # the default cache stays away
    with pytest.raises(ConfigurationError, match="packed sequences restart"):
        model(tokens, position_ids=positions, use_cache=True)


@torch.no_grad()
def test_a_packed_pass_equals_single_rows():
    """Rows that join, leave and reuse slots, long prefill beside single steps."""
    model, cache = tiny(), tiny().new_row_cache()
    texts = {cache.add_row(): ids(70, seed=s) for s in range(3)}
    want = {r: naive_logits(model, t) for r, t in texts.items()}
    done = dict.fromkeys(texts, 0)
    for step, counts in enumerate([(5, 40), (1, 1, 17), (20, 4, 1), (1, 1, 1), (3, 2, 30)]):
        parts = {r: texts[r][done[r] : done[r] + n] for r, n in enumerate(counts)}
        for r, logits in packed(model, cache, parts).items():
            close(logits, want[r][done[r] : done[r] + len(logits)])
            done[r] += len(logits)
        if step == 2:
            cache.free_row(1)
            cache.poison()
            assert cache.add_row() == 1
            done[1] = 0


@torch.no_grad()
@pytest.mark.parametrize("tape", ["draft", "completion"])
def test_a_rewound_row_goes_on_as_if_it_had_never_been_there(tape, monkeypatch):
    """Every rejection length around block boundaries; no forward runs for a rewind."""
    model = tiny()
    text, wrong = ids(80), ids(9, seed=5)
    want = naive_logits(model, text)
    calls = []
    forward = DenseRetNetModel.forward
    monkeypatch.setattr(
        DenseRetNetModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    for start in (1, 15, 16, 31, 33, 47):
        cache = model.new_row_cache(tape, max_draft=9)
        row = cache.add_row()
        packed(model, cache, {row: text[:start]})
        packed(model, cache, {row: wrong})
        before = len(calls)
        cache.rewind(row, start)
        assert len(calls) == before
        close(packed(model, cache, {row: text[start:]})[row], want[start:], 1e-12)


@torch.no_grad()
def test_crop_runs_no_forward_and_goes_on_exactly(monkeypatch):
    model, tokens = tiny(), ids(2, 40)
    want = model(tokens, use_cache=False).logits
    cache = model(tokens, use_cache=True).past_key_values
    with monkeypatch.context() as spy:
        spy.setattr(DenseRetNetModel, "forward", None)
        cache.crop(-7)
    got = model(tokens[:, 33:], past_key_values=cache).logits
    close(got, want[:, 33:], 1e-12)
    with pytest.raises(RewindError, match="beyond the past"):
        cache.crop(-41)


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [{}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}],
    ids=["greedy", "sampling", "beams", "beam sampling"],
)
def test_generate_with_and_without_cache(how):
    model = tiny()
    tokens, mask = ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :7], mask[1, 4:6] = 0, 0
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(
            model.generate(
                tokens, attention_mask=mask, max_new_tokens=25, use_cache=use_cache,
                pad_token_id=0, **how,
            )
        )  # fmt: skip
    assert torch.equal(*outputs) and outputs[0].shape == (3, 45)


@torch.no_grad()
def test_generate_equals_single_rows_and_continues_a_cache():
    model = tiny()
    tokens, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    batch = model.generate(tokens, attention_mask=mask, max_new_tokens=20, pad_token_id=0)
    single = model.generate(tokens[:1, 7:], max_new_tokens=20, pad_token_id=0)
    assert torch.equal(batch[0, 20:], single[0, 13:])
    cache = model.new_row_cache()
    half = model.generate(
        tokens, attention_mask=mask, max_new_tokens=9, pad_token_id=0, past_key_values=cache
    )
    mask = torch.cat([mask, mask.new_ones(2, 9)], 1)
    rest = model.generate(
        half, attention_mask=mask, max_new_tokens=11, pad_token_id=0, past_key_values=cache
    )
    assert torch.equal(rest, batch)
    embeds = model.get_input_embeddings()(tokens[1:])
    from_embeds = model.generate(inputs_embeds=embeds, max_new_tokens=20, pad_token_id=0)
    assert torch.equal(from_embeds[0], batch[1, 20:])


@torch.no_grad()
def test_generation_prefills_in_chunks_and_refuses_other_caches():
    model, tokens = tiny(), ids(2, 21)
    plain = model.generate(tokens, max_new_tokens=8, pad_token_id=0)
    chunked = model.generate(tokens, max_new_tokens=8, pad_token_id=0, prefill_chunk_size=8)
    assert torch.equal(chunked, plain)
    with pytest.raises(ConfigurationError, match="cache_implementation='static'"):
        model.generate(tokens, max_new_tokens=2, pad_token_id=0, cache_implementation="static")


@torch.no_grad()
def test_logits_to_keep_and_hidden_states():
    model, tokens = tiny(), ids(2, 12)
    output = model(tokens, output_hidden_states=True)
    close(model(tokens, logits_to_keep=3).logits, output.logits[:, -3:], 1e-13)
    keep = torch.tensor([0, 5, 11])
    close(model(tokens, logits_to_keep=keep).logits, output.logits[:, keep], 1e-13)
    states = output.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    close(states[0], model.get_input_embeddings()(tokens))
    close(model.lm_head(states[-1]), output.logits)
    embeds = model(inputs_embeds=states[0]).logits
    close(embeds, output.logits)
    assert model(tokens, return_dict=False)[0].shape == (2, 12, VOCAB)


def test_loss_shifts_labels_and_counts_items():
    model, tokens = tiny(dtype=torch.float32), ids(2, 12)
    labels = tokens.clone()
    labels[0, :5] = -100
    output = model(tokens, labels=labels)
    target = labels[:, 1:].flatten()
    want = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), target)
    close(output.loss, want, 1e-6)
    count = int((target != -100).sum())
    summed = model(tokens, labels=labels, num_items_in_batch=2 * count).loss
    close(summed, want / 2, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    tokens = ids(2, 20)
    grads = []
    for checkpointing in (False, True):
        model = tiny(dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output = model(tokens, labels=tokens, use_cache=checkpointing)
        assert output.past_key_values is None
        output.loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(*grads)


def test_dropout_acts_in_training_only():
    model, tokens = tiny(dropout=0.5), ids(1, 8)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tied, tmp_path):
    model, tokens = tiny(tie_word_embeddings=tied, dense_norms=True, chunk_size=9), ids(2, 12)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = DenseRetNetForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    base = DenseRetNetModel.from_pretrained(tmp_path)
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    loaded.resize_token_embeddings(VOCAB + 5)
    assert loaded(tokens).logits.shape[-1] == VOCAB + 5


def test_initial_weights():
    torch.manual_seed(0)
    model = DenseRetNetForCausalLM(
        DenseRetNetConfig(vocab_size=500, hidden_size=128, num_hidden_layers=2, pad_token_id=3)
    )
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all()
        else:
            assert 0.9 < weight.std() / 0.02 < 1.1, name
    assert model.get_input_embeddings().weight[3].any()  # pad may be eos, which must learn


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads=3 does not divide query_key_dim=8"),
        ({"dense_block_layers": -1}, "dense_block_layers=-1 must be 0"),
        ({"query_key_dim": 6}, "= 3 must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"intermediate_k_select_scale": 17}, "intermediate_k_select_scale=17 is not in"),
        ({"intermediate_v_select_scale": 0}, "intermediate_v_select_scale=0 is not in"),
        ({"retention_form": "quick"}, "retention_form='quick'"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"mlp_intermediate_size": -4}, "mlp_intermediate_size=-4"),
    ],
)
def test_wrong_configurations_are_named(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        tiny(**wrong)


def test_wrong_input_is_named():
    model, tokens = tiny(), ids(2, 6)
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ConfigurationError, match="holds 2 rows, the input has 3"):
        model(ids(3, 1), past_key_values=cache)
    with pytest.raises(ConfigurationError, match=r"layers=2.*this model needs.*layers=3"):
        model(tokens, past_key_values=tiny(num_hidden_layers=2).new_row_cache())
    with pytest.raises(ConfigurationError, match=r"DynamicCache.*new_row_cache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ConfigurationError, match=r"\[batch, tokens\]"):
        model(tokens, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ConfigurationError, match="one of the two"):
        model()
    with pytest.raises(ConfigurationError, match=r"attention_mask is \[2, 5\]"):
        model(tokens, attention_mask=torch.ones(2, 5), use_cache=False)
