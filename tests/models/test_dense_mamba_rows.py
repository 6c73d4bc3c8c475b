"""DenseMamba's rows: padding, packing, one pass for many, rewinds, each as if it were alone."""

import pytest
import torch

from retort.errors import ConfigurationError, RewindError
from retort.models.dense_mamba import DenseMambaModel
from tests.models.mambas import FORMS, close, ids, naive_logits, tiny


def packed(model, cache, parts):
    """One packed pass over ``{row: ids}``; the logits of each row."""
    layout = cache.begin(list(parts), [len(t) for t in parts.values()])
    tokens = torch.cat(list(parts.values()))[None]
    logits = model(tokens, position_ids=layout.position_ids(), past_key_values=cache).logits[0]
    cache.end()
    return dict(zip(parts, logits.split(layout.counts), strict=True))


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
