"""DenseMamba: exact in every form, and a transformers model in every respect we promise."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
)

from retort.errors import ConfigurationError, RewindError
from retort.models.dense_mamba import DenseMambaConfig, DenseMambaForCausalLM, DenseMambaModel
from tests.models.mambas import VOCAB, ids, naive_logits, tiny
from tests.ops.test_selective_scan import operations

VARIANTS = {
    "Mamba": {"dense_block_layers": 0},
    "m=1": {"dense_block_layers": 1},
    "m=2": {},
    "no gate": {"dense_gate": False},
    "m beyond the layers": {"dense_block_layers": 5, "intermediate_select_scale": 8},
    "other sizes": {"state_size": 3, "conv_kernel": 2, "expand": 3, "time_step_rank": 2},
    "other biases": {"use_bias": True, "use_conv_bias": False},
}
FORMS = [(form, size) for form in ("chunked", "rescan", "recurrent") for size in (1, 7, 64, 4096)]


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
        model.config.scan_form, model.config.chunk_size = form, size
        got = model(tokens, use_cache=False).logits[0]
        close(got, want)
        close(gradients(got), want_grads, 1e-9)
    got = model(tokens, use_cache=True).logits[0]
    close(got, want)
    close(gradients(got), want_grads, 1e-9)


def test_m0_has_no_gate_and_layer_0_never_has_one():
    names = {name for name, _ in tiny(dense_block_layers=0).named_parameters()}
    dense = {name for name, _ in tiny().named_parameters()}
    added = {f"backbone.layers.{i}.mixer.select.fc{j}.weight" for i in (1, 2) for j in (1, 2)}
    assert dense - names == added and not names - dense


@torch.no_grad()
def test_float32_is_close_to_float64():
    tokens = ids(2, 150)
    model = tiny()
    want = model(tokens, use_cache=False).logits
    single = copy.deepcopy(model).float()
    scale = want.abs().max()
    for form, size in FORMS:
        single.config.scan_form, single.config.chunk_size = form, size
        close(single(tokens, use_cache=False).logits.double() / scale, want / scale, 4e-5)
    close(single(tokens, use_cache=True).logits.double() / scale, want / scale, 4e-5)


def mamba(**changes):
    """transformers' own Mamba at toy size, with decided logits."""
    torch.manual_seed(3)
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=4, **changes
    )
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(5)
        for layer in model.backbone.layers:
            layer.mixer.x_proj.weight.mul_(4)  # states weigh as in a trained model
            layer.mixer.dt_proj.bias.add_(2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_a_mamba_checkpoint_keeps_its_logits(m, tied, tmp_path):
    """From a model in memory, from its folder, and loaded by the class itself."""
    theirs, tokens = mamba(tie_word_embeddings=tied, use_bias=not tied), ids(2, 70)
    want = theirs(tokens, use_cache=False).logits
    theirs.save_pretrained(tmp_path)
    models = [
        DenseMambaForCausalLM.from_mamba(theirs, dense_block_layers=m),
        DenseMambaForCausalLM.from_mamba(tmp_path, dense_block_layers=m),
        DenseMambaForCausalLM.from_pretrained(tmp_path, dense_block_layers=m),
    ]
    for ours in models:
        assert ours.config.dense_block_layers == m and ours.config.model_type == "dense_mamba"
        for form in ("chunked", "rescan", "recurrent"):
            ours.config.scan_form = form
            close(ours(tokens, use_cache=False).logits, want, 2e-5)
        close(ours(tokens, use_cache=True).logits, want, 2e-5)
    assert want.abs().max() > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_runs_with_float32_states(dtype):
    model = tiny().to(dtype)
    tokens = ids(2, 40)
    output = model(tokens, use_cache=True)
    cache = output.past_key_values
    assert output.logits.dtype == dtype and cache.states.dtype == torch.float32
    assert cache.tape.keys.dtype == torch.float32
    whole = tiny()(tokens, use_cache=False).logits
    assert (output.logits.double() - whole).abs().mean() < 0.1 * whole.std()
    assert model(ids(2, 1), past_key_values=cache).logits.isfinite().all()
    model.train()
    loss = torch.enable_grad()(model)(tokens, labels=tokens).loss
    assert loss.isfinite()


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

    for form, size in FORMS:
        model.config.scan_form, model.config.chunk_size = form, size
        check(model(tokens, attention_mask=mask, use_cache=False).logits)
    model.config.chunk_size = 64
    for cuts in ([50], [1] * 50, [20, 3, 27]):
        for full in (False, True):
            cache, at, logits = model.new_row_cache(), 0, []
            for n in cuts:
                part = mask[:, : at + n] if full else mask[:, at : at + n]
                piece = tokens[:, at : at + n]
                logits.append(model(piece, attention_mask=part, past_key_values=cache).logits)
                at += n
            check(torch.cat(logits, 1))
    nothing = model(tokens[:, :3], attention_mask=torch.zeros(4, 3), use_cache=True)
    assert nothing.past_key_values.get_seq_length() == 3 and nothing.logits.shape[1] == 3


def test_packed_training_input_equals_its_sequences():
    model = tiny().train()
    lengths = [13, 1, 30]
    tokens = ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 13, 14, 44])
    want = torch.cat([model(t).logits for t in tokens.split(lengths, 1)], 1)
    for form, size in FORMS:
        model.config.scan_form, model.config.chunk_size = form, size
        close(model(tokens, position_ids=positions).logits, want)
        close(model(tokens, cu_seq_lens_q=bounds).logits, want)
    model.eval()
    close(model(tokens, position_ids=positions).logits, want)  # the default cache stays away
    with pytest.raises(ConfigurationError, match="packed sequences restart"):
        model(tokens, position_ids=positions, use_cache=True)


@torch.no_grad()
def test_a_packed_pass_equals_single_rows():
    """Rows that join, leave and reuse slots, long prefill beside single steps."""
    model, cache = tiny(chunk_size=16), tiny().new_row_cache(max_draft=4)
    texts = {cache.add_row(): ids(90, seed=s) for s in range(3)}
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
    """After drafts of which three tokens stand; no forward runs for a rewind."""
    model = tiny()
    text, wrong = ids(80), ids(9, seed=5)
    calls = []
    forward = DenseMambaModel.forward
    monkeypatch.setattr(
        DenseMambaModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    for start in (1, 15, 16, 31, 33, 47):
        caches = [model.new_row_cache(tape, max_draft=9) for _ in range(2)]
        for cache in caches:
            packed(model, cache, {cache.add_row(): text[:start]})
        packed(model, caches[0], {0: torch.cat([text[start : start + 3], wrong[:6]])})
        before = len(calls)
        caches[0].rewind(0, start + 3)
        assert len(calls) == before
        packed(model, caches[1], {0: text[start : start + 3]})
        got, want = (packed(model, cache, {0: text[start + 3 : start + 9]})[0] for cache in caches)
        close(got, want, 1e-12)
        close(got, naive_logits(model, text[: start + 9])[start + 3 :])


@torch.no_grad()
def test_crop_runs_no_forward_and_goes_on_exactly(monkeypatch):
    model, tokens = tiny(), ids(2, 40)
    want = model(tokens, use_cache=False).logits
    cache = model(tokens, use_cache=True).past_key_values
    with monkeypatch.context() as spy:
        spy.setattr(DenseMambaModel, "forward", None)
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
@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
def test_generate_equals_single_rows_and_continues_a_cache(name):
    model = tiny()
    tokens, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    batch = model.generate(tokens, attention_mask=mask, max_new_tokens=20, pad_token_id=0)
    single = model.generate(tokens[:1, 7:], max_new_tokens=20, pad_token_id=0)
    assert torch.equal(batch[0, 20:], single[0, 13:])
    cache = {name: model.new_row_cache()}
    half = model.generate(tokens, attention_mask=mask, max_new_tokens=9, pad_token_id=0, **cache)
    assert cache[name].get_seq_length() == 28
    mask = torch.cat([mask, mask.new_ones(2, 9)], 1)
    rest = model.generate(half, attention_mask=mask, max_new_tokens=11, pad_token_id=0, **cache)
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
    model, tokens = tiny(chunk_size=5), ids(2, 12)
    mask = torch.ones(2, 12)
    mask[0, :3] = 0
    output = model(tokens, attention_mask=mask, output_hidden_states=True)
    keep = torch.tensor([0, 5, 11])
    for n in (3, keep):
        got = model(tokens, attention_mask=mask, logits_to_keep=n).logits
        close(got, output.logits[:, -3:] if n is not keep else output.logits[:, keep], 1e-13)
    states = output.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    close(states[0][1], model.get_input_embeddings()(tokens[1]))
    close(model.lm_head(states[-1]), output.logits)
    embeds = model(inputs_embeds=states[0], attention_mask=mask).logits
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
@pytest.mark.parametrize("form", ["auto", "chunked"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, form):
    tokens = ids(2, 20)
    grads = []
    for checkpointing in (False, True):
        model = tiny(scan_form=form).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output = model(tokens, labels=tokens, use_cache=checkpointing)
        assert output.past_key_values is None or not checkpointing
        output.loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(*grads)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tied, tmp_path):
    model, tokens = tiny(tie_word_embeddings=tied, chunk_size=9), ids(2, 12)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DenseMambaForCausalLM
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    base = DenseMambaModel.from_pretrained(tmp_path)
    assert torch.equal(base(tokens).last_hidden_state, model.backbone(tokens).last_hidden_state)
    loaded.resize_token_embeddings(VOCAB + 5)
    assert loaded(tokens).logits.shape[-1] == VOCAB + 5


def test_initial_weights_are_mambas_and_the_gate_is_zero():
    torch.manual_seed(0)
    config = {"vocab_size": 200, "hidden_size": 128, "num_hidden_layers": 3}
    ours = DenseMambaForCausalLM(DenseMambaConfig(**config))
    theirs = dict(MambaForCausalLM(MambaConfig(**config)).named_parameters())
    for name, weight in ours.named_parameters():
        if "fc2" in name:
            assert not weight.any()
        elif "fc1" not in name:
            close(weight.mean(), theirs[name].mean(), 0.3)
            close(weight.norm(), theirs[name].norm(), 0.1 * theirs[name].norm().item())


@torch.no_grad()
@pytest.mark.parametrize("form", ["chunked", "rescan"])
def test_operations_do_not_grow_with_the_tokens_inside_a_chunk(form):
    model = tiny(scan_form=form, chunk_size=512)
    counts = [operations(lambda n=n: model(ids(1, n), use_cache=False)) for n in (32, 64, 200, 512)]
    assert len(set(counts)) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dense_block_layers": -1}, "dense_block_layers=-1 must be 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"conv_kernel": 0}, "conv_kernel=0"),
        ({"intermediate_select_scale": 17}, "intermediate_select_scale=17 is not in"),
        ({"scan_form": "quick"}, "scan_form='quick'"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"chunk_size": 5000}, "chunk_size=5000 is not in 1..4096"),
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
        model(tokens, cache_params=DynamicCache())
    with pytest.raises(ConfigurationError, match="one of the two"):
        model()
    with pytest.raises(ConfigurationError, match=r"attention_mask is \[2, 5\]"):
        model(tokens, attention_mask=torch.ones(2, 5), use_cache=False)
    with pytest.raises(ConfigurationError, match="does not fit: missing"):
        DenseMambaForCausalLM.from_mamba(Headless())


class Headless(MambaForCausalLM):
    """A Mamba that lacks a weight."""

    def __init__(self):
        super().__init__(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1))

    def state_dict(self, *args, **kwargs):
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if "norm_f" not in k}
