"""Teacher signals: truncation, shared widths, and the check of two vocabularies."""

import pytest
import torch
from torch import nn

from retort.distill.signals import (
    FLOOR,
    DenseSignal,
    HeadSignal,
    TopKSignal,
    check_vocabularies,
    split,
)
from retort.errors import ConfigurationError
from tests.distill import naive
from tests.distill.tokenizers import TEXT, byte_level


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return DenseSignal(3 * torch.randn(6, 20, dtype=torch.float64))


def test_top_k_keeps_the_likeliest_and_the_mass_of_the_rest(dense):
    top, p = dense.top_k(4), dense.log_probs(20).exp()
    assert top.vocab_size == 20 and len(top) == 6
    torch.testing.assert_close(top.log_probs_kept.exp(), p.topk(4).values)
    torch.testing.assert_close(top.log_tail.exp(), 1 - p.topk(4).values.sum(1))


@pytest.mark.parametrize("width", [20, 17])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distributions_equal_the_reference_at_any_width_and_temperature(dense, width, temperature):
    top = dense.top_k(4)
    described = {"indices": top.indices, "log_probs": top.log_probs_kept}
    described |= {"log_tail": top.log_tail, "vocab": 20}
    for signal, description in (dense, {"logits": dense.logits}), (top, described):
        wanted = torch.stack(naive.teacher_rows(description, width, temperature))
        torch.testing.assert_close(signal.log_probs(width, temperature).exp(), wanted)


def test_a_signal_of_every_id_loses_nothing(dense):
    top = dense.top_k(50)
    torch.testing.assert_close(top.log_probs(20), dense.log_probs(20))
    assert not top.log_tail.exp().any()


def test_ids_beyond_the_shared_width_leave_the_support(dense):
    top = dense.top_k(6)
    support = top.support(10)
    assert ((support == top.indices) | ((support == -1) & (top.indices >= 10))).all()
    assert dense.support(10) is None


def test_compact_integer_and_half_types_are_read(dense):
    top = dense.top_k(4)
    stored = TopKSignal(
        top.indices.to(torch.int32), top.log_probs_kept.half(), top.log_tail.half(), 20
    )
    assert stored.log_probs(20).dtype == torch.float32
    close = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(stored.log_probs(20).double(), top.log_probs(20), **close)


def test_rows_are_the_same_rows(dense):
    for signal in (dense, dense.top_k(3)):
        part = signal.rows(2, 5)
        assert len(part) == 3
        torch.testing.assert_close(part.log_probs(20), signal.log_probs(20)[2:5])


def test_a_live_head_runs_without_gradient_on_the_rows_asked_for():
    head, hidden = nn.Linear(5, 9), torch.randn(7, 5, requires_grad=True)
    source = HeadSignal(hidden, head)
    part = source.rows(1, 4)
    torch.testing.assert_close(part.logits, head(hidden[1:4]).detach())
    assert len(source) == 7 and not part.logits.requires_grad


def test_split_sums_the_rest_without_cancelling():
    logs = torch.tensor([[20.0, 0.0, 1.0, 2.0]]).log_softmax(1)
    kept, rest = split(logs, torch.tensor([[0, 3, -1]]))
    assert kept[0, 2] == FLOOR
    torch.testing.assert_close(kept[0, :2], logs[0, [0, 3]])
    torch.testing.assert_close(rest[0], torch.logaddexp(logs[0, 1], logs[0, 2]))


def test_shapes_that_disagree_are_named(dense):
    top = dense.top_k(4)
    with pytest.raises(ConfigurationError, match=r"\(6, 4\)"):
        TopKSignal(top.indices, top.log_probs_kept[:, :3], top.log_tail, 20)


def test_equal_vocabularies_pass_whatever_ends_a_text():
    other = byte_level()
    other.eos_token = "<pad>"
    check_vocabularies(byte_level(), other)


def test_the_first_difference_is_named():
    other = byte_level()
    other.add_tokens(["<extra>"])
    with pytest.raises(ConfigurationError, match=f"id {len(other) - 1}: None against '<extra>'"):
        check_vocabularies(byte_level(), other)
    renamed = byte_level(TEXT.replace("the", "xyz"))
    with pytest.raises(ConfigurationError, match=r"differ at id 2\d\d"):
        check_vocabularies(byte_level(), renamed)


def test_who_asks_says_what_to_do():
    other = byte_level()
    other.add_tokens(["<extra>"])
    with pytest.raises(ConfigurationError, match=r"^Two tokenizers differ at .*\. Do this\.$"):
        check_vocabularies(byte_level(), other, "Do this.", "Two")


def test_equal_vocabularies_that_split_differently_are_refused():
    from tokenizers import normalizers

    other = byte_level()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigurationError, match="split text differently"):
        check_vocabularies(byte_level(), other)
