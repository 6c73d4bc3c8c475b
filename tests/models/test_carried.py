"""States that the caller carries: exact in any cut, differentiable, one graph for a compiler."""

import pytest
import torch

from retort.errors import ConfigurationError
from tests.models import mambas, retnets

F64 = torch.float64
MODELS = {
    "RetNet": lambda: retnets.tiny(dense_block_layers=0),
    "RetNet with norms": lambda: retnets.tiny(dense_block_layers=0, dense_norms=True),
    "DenseRetNet": retnets.tiny,
    "Mamba": lambda: mambas.tiny(dense_block_layers=0),
    "DenseMamba": lambda: mambas.tiny(chunk_size=8),
}
NAIVE = {"dense_retnet": retnets.naive_logits, "dense_mamba": mambas.naive_logits}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def ids(*shape, seed=1):
    return retnets.ids(*shape, seed=seed)


def naive(model, tokens):
    return NAIVE[model.config.model_type](model, tokens)


def close(got, want, atol=1e-10):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[31], [1] * 31, [20, 1, 2, 8]])
def test_any_cut_is_exact_with_padding_anywhere(model, cuts):
    mask = torch.ones(4, 31, dtype=torch.long)
    mask[0, :11], mask[1, 17:], mask[2, 5::3] = 0, 0, 0
    tokens = ids(4, 31)
    want = [naive(model, tokens[b][mask[b] == 1]) for b in range(4)]
    state, logits = model.new_state(4), []
    for part, real in zip(tokens.split(cuts, 1), mask.split(cuts, 1), strict=True):
        before = [x.clone() for x in state]
        output = model(part, attention_mask=real, past_key_values=state)
        assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
        state = output.past_key_values
        logits.append(output.logits)
    logits = torch.cat(logits, 1)
    for b in range(4):
        close(logits[b][mask[b] == 1], want[b])


@torch.no_grad()
@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_every_form_goes_on_from_a_state(form, size):
    tokens = ids(2, 30)
    for model in (retnets.tiny(retention_form=form, chunk_size=size), mambas.tiny(chunk_size=size)):
        state = model(tokens[:, :13], past_key_values=model.new_state(2)).past_key_values
        got = model(tokens[:, 13:], past_key_values=state).logits
        close(got[1], naive(model, tokens[1])[13:])


def test_gradients_cross_from_part_to_part(model):
    """Back-propagation through carried states is that of the naive recurrence."""
    tokens = ids(1, 17)
    weight = torch.randn(17, model.config.vocab_size, dtype=F64)
    weights = list(model.parameters())
    want = torch.autograd.grad((naive(model, tokens[0]) * weight).sum(), weights)
    state, total = model.new_state(1), 0
    for part, w in zip(tokens.split([6, 1, 2, 8], 1), weight.split([6, 1, 2, 8]), strict=True):
        output = model(part, past_key_values=state)
        state, total = output.past_key_values, total + (output.logits[0] * w).sum()
    for got, wanted in zip(torch.autograd.grad(total, weights), want, strict=True):
        close(got, wanted, 1e-9)


@pytest.mark.parametrize("width", [1, 5])
def test_the_gradient_of_the_initial_state_is_the_difference_quotient(model, width):
    """A state that is learnt, or that comes from elsewhere, at both ends of a pass."""
    first = model(ids(2, 4), past_key_values=model.new_state(2)).past_key_values
    leaves = [x.detach() for x in first if x.is_floating_point()]
    others = [x for x in first if not x.is_floating_point()]
    tokens = ids(2, width, seed=2)

    def run(*parts):
        output = model(tokens, past_key_values=type(first)(*parts, *others))
        ends = [x for x in output.past_key_values if x.is_floating_point()]
        return output.logits, *ends

    seed = torch.Generator().manual_seed(0)
    sides = [torch.randn(x.shape, generator=seed, dtype=F64) for x in leaves]
    inputs = [x.clone().requires_grad_() for x in leaves]
    outputs = run(*inputs)
    weights = [torch.randn(y.shape, generator=seed, dtype=F64) for y in outputs]
    total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(total, inputs)
    got = sum((g * s).sum() for g, s in zip(grads, sides, strict=True))
    moved = []
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            outputs = run(*(x + step * s for x, s in zip(leaves, sides, strict=True)))
            moved.append(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)))
    torch.testing.assert_close(got, (moved[0] - moved[1]) / 2e-5, rtol=1e-6, atol=1e-7)
    assert all(g.any() for g in grads)


@torch.no_grad()
def test_half_precision_carries_float32():
    for model in (retnets.tiny().bfloat16(), mambas.tiny().bfloat16()):
        state = model.new_state(2)
        for part in ids(2, 9).split([5, 1, 3], 1):
            output = model(part, past_key_values=state)
            state = output.past_key_values
            assert output.logits.dtype == torch.bfloat16
            assert state.states.dtype == torch.float32 and output.logits.isfinite().all()


@torch.no_grad()
def compiled_step(model, backend):
    """Greedy tokens of one-token steps by ``torch.compile`` in one graph, and without."""
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend=backend)
    prompt = model(ids(3, 6), past_key_values=model.new_state(3))
    for run in (step, model):
        state, token = prompt.past_key_values, ids(3, 1, seed=4)
        logits = []
        for _ in range(5):
            output = run(input_ids=token, past_key_values=state)
            state, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
            logits.append(output.logits)
        yield torch.cat(logits, 1)


@pytest.mark.parametrize("name", ["DenseRetNet", "DenseMamba"])
def test_the_recurrent_step_is_one_graph(name):
    got, want = compiled_step(MODELS[name](), "aot_eager")
    close(got, want, 1e-11)


@pytest.mark.slow
def test_the_compiled_step_gives_the_same_logits(model):
    got, want = compiled_step(model, "inductor")
    close(got, want, 1e-10)


def test_wrong_states_are_named():
    packed, clamped = torch.tensor([[0, 1, 0, 1]]), retnets.tiny(retention_form="clamped")
    for model, other in ((retnets.tiny(), retnets.tiny(num_hidden_layers=2)),
                         (mambas.tiny(), mambas.tiny(state_size=3))):  # fmt: skip
        with pytest.raises(ConfigurationError, match=r"3 rows need .* use model.new_state"):
            model(ids(3, 1), past_key_values=model.new_state(2))
        with pytest.raises(ConfigurationError, match=r"state has shapes .* this model and 2 rows"):
            model(ids(2, 1), past_key_values=other.new_state(2))
        with pytest.raises(ConfigurationError, match="packed sequences restart"):
            model(ids(1, 4), position_ids=packed, past_key_values=model.new_state(1))
        with pytest.raises(ConfigurationError, match=r"generate needs a cache"):
            model.generate(ids(1, 4), past_key_values=model.new_state(1), max_new_tokens=2)
    with pytest.raises(ConfigurationError, match="'clamped' has no state"):
        clamped(ids(1, 2), past_key_values=clamped.new_state(1))
