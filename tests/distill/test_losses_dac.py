"""DAC-KL against the float64 reference, its band's limits, and what training does to the band."""

import json
import warnings

import pytest
import torch
from torch import nn

from retort.distill.losses import (
    IGNORED,
    BandNetwork,
    DacSettings,
    DacState,
    DacTerm,
    TokenRows,
)
from retort.distill.losses.dac import band_share, clipped_kl, target_slots
from retort.distill.signals import DenseSignal
from retort.errors import ConfigurationError
from tests.distill import naive
from tests.distill.cases import KINDS, SHAPES, assert_same, random_case
from tests.distill.toys import config


def reference_sum(case, k, lower, upper, temperature=1.0):
    """Σ KL and Σ coverage of the counted rows; lower and upper: floats or [N]."""
    ps = naive.teacher_rows(case.naive, case.width, temperature)
    qs = naive.student_rows(case.logits, case.width, temperature)
    ends = [torch.as_tensor(end, dtype=torch.float64).expand(len(ps)) for end in (lower, upper)]
    known = case.naive.get("indices", [None] * len(ps))
    rows = [
        naive.dac_token(ps[n], qs[n], target, k, ends[0][n], ends[1][n], known=known[n])
        for n, target in enumerate(case.targets.tolist())
        if target != IGNORED
    ]
    zero = case.logits.new_zeros(())
    return sum((value for value, _ in rows), zero), sum((share for _, share in rows), zero)


@pytest.mark.parametrize("k", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("band", [(None, None), (0.1, 0.7), (0.4, 0.45), (0.5, 0.5)])
def test_fixed_band_equals_the_reference_in_value_and_gradient(band, shape, k):
    settings = DacSettings(mode="fixed", top_k=6, lower=band[0], upper=band[1])
    for seed, temperature in [(0, 1.0), (1, 1.8)]:
        case = random_case(shape, k, seed)
        result = DacTerm(settings)(case.rows(temperature))
        reference, share = reference_sum(case, 6, *settings.fixed_band, temperature)
        assert_same(result.total, reference, case.logits)
        torch.testing.assert_close(result.stats["coverage"], share)
        assert result.stats["widened"] == 0


@pytest.mark.parametrize("mode", ["learned", "literal"])
@pytest.mark.parametrize("k", [None, 5])
def test_learned_band_equals_the_reference_in_every_gradient(mode, k):
    """Value: the KL. Gradient: of Σ KL + λ (0.95 − coverage) where the band is learned."""
    case, state = random_case((9, 23, 19), k, seed=4), DacState(dual=1.7)
    network = open_network(seed=4)
    settings = DacSettings(mode=mode, top_k=6, min_coverage=0.0, max_hidden=1.0)
    result = quiet_term(settings, network, state)(case.rows())
    slots = target_slots(case.rows(), 6)
    lower, upper = network(slots.teacher[:, :-1], slots.student[:, :-1])
    reference, covered = reference_sum(case, 6, lower, upper)
    torch.testing.assert_close(result.total, reference, rtol=1e-10, atol=1e-10)
    counted = (case.targets != IGNORED).sum()
    penalty = state.dual * (0.95 * counted - covered) if mode == "learned" else 0 * covered
    parameters = [case.logits, *network.parameters()]
    wanted = torch.autograd.grad(reference + penalty, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(result.total, parameters), wanted)


def open_network(seed):
    torch.manual_seed(seed)
    network = BandNetwork().double()
    nn.init.normal_(network.outer.weight, std=2.0)
    nn.init.zeros_(network.outer.bias)
    return network


def quiet_term(settings, network=None, state=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DacTerm(settings, network, state)


def peaked_rows(rows=40, vocabulary=200, seed=0, target=None):
    torch.manual_seed(seed)
    teacher = 4 * torch.randn(rows, vocabulary, dtype=torch.float64)
    student = teacher + torch.randn(rows, vocabulary, dtype=torch.float64)
    order = teacher.argsort(1, descending=True)
    targets = order[:, 0] if target is None else order[:, target]
    return TokenRows(student.requires_grad_(), targets, DenseSignal(teacher))


@pytest.mark.parametrize("network", [None, BandNetwork()])
def test_full_and_initial_band_equal_the_top_k_kl(network):
    rows = peaked_rows()
    mode = "fixed" if network is None else "learned"
    result = DacTerm(DacSettings(mode=mode), network)(rows)
    slots = target_slots(rows, 64)
    unclipped = clipped_kl(slots, torch.ones_like(slots.teacher)).mean()
    tolerance = 1e-3 if network is None else 2e-3
    assert abs(result.mean() - unclipped) < tolerance * unclipped
    assert result.stats["coverage"] / result.count > 0.998


def test_soft_edges_at_zero_and_one_would_lose_the_top_class():
    """Why the full band reaches 4τ beyond [0, 1]: with u = 1 a certain class keeps far less."""
    slots = target_slots(peaked_rows(target=5), 64)
    narrow, full = (band_share(slots, a, b, 0.02) for a, b in [(0.0, 1.0), (-0.08, 1.08)])
    assert full[:, 0].min() > 0.98
    assert narrow[:, :64].min() < 0.6


def test_target_outside_the_top_k_takes_one_more_slot_once():
    inside, outside = (target_slots(peaked_rows(target=t), 64) for t in (3, 100))
    assert inside.is_target[:, 3].all() and inside.is_target.sum() == 40
    assert not inside.teacher[:, -1].exp().any() and not inside.student[:, -1].exp().any()
    assert outside.is_target[:, -1].all() and outside.is_target.sum() == 40
    for slots in (inside, outside):
        for kept, rest in (slots.teacher, slots.teacher_rest), (slots.student, slots.student_rest):
            torch.testing.assert_close(kept.exp().sum(1) + rest.exp(), torch.ones_like(rest))


def test_loss_is_never_negative_and_never_above_the_whole_kl():
    for seed in range(5):
        rows = peaked_rows(seed=seed, target=seed * 40)
        slots = target_slots(rows, 64)
        whole = (rows.teacher.exp() * (rows.teacher - rows.student)).sum(1)
        bands = torch.rand(2, 30, 40, dtype=torch.float64).sort(0).values
        for lower, upper in zip(*bands, strict=True):
            values = clipped_kl(slots, band_share(slots, lower, upper, 0.02))
            assert (values >= 0).all() and (values <= whole + 1e-9).all()


def test_equal_predictions_lose_nothing_in_single_precision():
    logits = 3 * torch.randn(50, 300)
    rows = TokenRows(logits, torch.randint(0, 300, (50,)), DenseSignal(logits))
    result = DacTerm(DacSettings(), BandNetwork())(rows)
    assert 0 <= result.total < 1e-4 and result.stats["widened"] == 0


def test_tokens_whose_band_hides_too_much_fall_back_to_the_full_band():
    rows = peaked_rows(target=5)
    network = BandNetwork().double()
    with torch.no_grad():
        network.outer.bias.copy_(torch.tensor([3.0, -3.0]))  # a sliver near the top end
    closed = DacTerm(DacSettings(), network)(rows)
    full = DacTerm(DacSettings(mode="fixed"))(rows)
    assert closed.stats["widened"] == closed.count
    assert closed.stats["coverage"] / closed.count < 0.8
    torch.testing.assert_close(closed.total, full.total)
    literal = quiet_term(DacSettings(mode="literal"), network)(rows)
    assert literal.total < 0.5 * full.total
    torch.testing.assert_close(literal.stats["hidden_kl"], full.total - literal.total)


def train_band(mode, seed, steps=120):
    """A table of student logits and the band trained together; per-step mean coverage."""
    torch.manual_seed(seed)
    teacher = torch.linspace(0.5, 4, 64)[:, None] * torch.randn(64, 100)
    student, network, state = torch.zeros_like(teacher).requires_grad_(), BandNetwork(), DacState()
    settings = DacSettings(mode=mode, top_k=32)
    term = quiet_term(settings, network, state)
    groups = [{"params": [student], "lr": 0.02}, {"params": network.parameters(), "lr": 1e-3}]
    optimiser, coverages = torch.optim.Adam(groups), []
    for _ in range(steps):
        targets = torch.distributions.Categorical(logits=student.detach()).sample()
        result = term(TokenRows(student, targets, DenseSignal(teacher)))
        optimiser.zero_grad()
        result.mean().backward()
        optimiser.step()
        coverages.append(float(result.stats["coverage"] / result.count))
        state.update(coverages[-1], settings)
    return coverages, float(result.stats["width"] / result.count), state


def test_constraint_holds_the_band_open_where_the_literal_loss_closes_it():
    for seed in range(2):
        learned, width, state = train_band("learned", seed)
        assert sum(learned) / 120 > 0.98 and min(learned) > 0.95
        assert 0.5 < width < 1.159 and state.updates == 120
    literal, width, _ = train_band("literal", 0)
    assert literal[-1] < 0.3 and width < 0.3


def test_dual_variable_rises_below_the_target_falls_above_and_is_clipped():
    settings, state = DacSettings(dual_rate=2.0, dual_max=5.0), DacState(dual=1.0)
    state.update(0.75, settings)
    assert state.dual == pytest.approx(1.4)
    state.update(1.0, settings)
    assert state.dual == pytest.approx(1.3)
    for _ in range(50):
        state.update(0.0, settings)
    assert state.dual == 5.0
    for _ in range(100):
        state.update(1.0, settings)
    assert state.dual == settings.dual_min == 1.0 and state.updates == 152


def test_a_run_has_the_constants_that_are_proved_here(tmp_path):
    assert config(tmp_path).dac_settings() == DacSettings()


def test_state_survives_json_bit_for_bit():
    state, other = DacState(dual=1 / 3, updates=7), DacState()
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert other == state


def test_band_network_orders_its_ends_and_takes_any_number_of_slots():
    network = open_network(seed=0)
    for slots in (1, 32, 64):
        logs = torch.randn(20, slots, dtype=torch.float64).log_softmax(1)
        lower, upper = network(logs, logs)
        assert (lower >= -0.08).all() and (upper >= lower).all() and (upper <= 1.08).all()


def test_bad_settings_are_named_and_literal_warns():
    with pytest.raises(ConfigurationError, match="adaptive"):
        DacSettings(mode="adaptive")
    with pytest.raises(ConfigurationError, match="top_k"):
        DacSettings(top_k=0)
    with pytest.raises(ConfigurationError, match="BandNetwork"):
        DacTerm(DacSettings())
    with pytest.warns(UserWarning, match="literal"):
        DacTerm(DacSettings(mode="literal"), BandNetwork())
