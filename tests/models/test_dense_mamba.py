"""DenseMamba: exact in every form, in loss and gradient, and wrong use is named."""

import copy

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from retort.errors import ConfigurationError
from retort.models.dense_mamba import DenseMambaForCausalLM
from tests.models.mambas import FORMS, VOCAB, close, ids, naive_logits, tiny
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
