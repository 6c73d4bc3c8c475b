"""The Mamba row cache alone: anchors, tape and replay, rewinds, slots, the Hugging Face surface."""

import random

import pytest
import torch
from torch import nn

from retort.cache.mamba import MambaRowCache, MambaShape
from retort.cache.mamba_anchors import GRID
from retort.errors import ConfigurationError, RewindError
from retort.models.mamba_passes import StatePass
from retort.ops import reference
from retort.ops.segments import cut
from retort.ops.selective_scan import ScanInputs

LAYERS, D, N, K = 2, 8, 3, 4
F64 = torch.float64
torch.manual_seed(5)
A = [-torch.randn(N, D, dtype=F64).exp() for _ in range(LAYERS)]
CONV = nn.Conv1d(D, D, K, groups=D).double().requires_grad_(False)
CONV32 = nn.Conv1d(D, D, K, groups=D).requires_grad_(False)
CONV32.load_state_dict(CONV.state_dict())


def new_cache(tape="draft", max_draft=8, dtype=F64, rows=1):
    cache = MambaRowCache(MambaShape(LAYERS, D, N, K), dtype, tape=tape, max_draft=max_draft)
    for _ in range(rows):
        cache.add_row()
    return cache


def sequence(length, seed, dtype=F64):
    """x, Δ, B, C ``[T, ·]`` of a row; both layers see the same ones."""
    generator = torch.Generator().manual_seed(seed)
    x, dt, b, c = (torch.randn(length, d, generator=generator, dtype=F64) for d in (D, D, N, N))
    return [t.to(dtype) for t in (x, dt.exp(), b, c)]


def expected(row):
    """y of the whole sequence in each layer, by the naive recurrence."""
    x, dt, b, c = row
    u = reference.causal_convolution(x, CONV.weight[:, 0], CONV.bias)
    states = [reference.selective_states(a, dt, b, u) for a in A]
    return torch.stack([reference.dense_readout(c, h, torch.zeros_like(u), []) for h in states], 1)


def run(cache, counts, packed, size=64):
    """Both layers over the packed tokens; y ``[total, layers, D]``."""
    x, dt, b, c = packed
    conv = CONV if x.dtype == F64 else CONV32
    step = StatePass(cut(counts, size, K, cache.max_draft + 1), cache)
    pieces = []
    for piece in step:
        part, ys = slice(piece.begin, piece.end), []
        for layer in range(LAYERS):
            u = step.convolve(layer, x[part], conv)
            inputs = ScanInputs(A[layer].to(x.dtype), dt[part], b[part], u)
            ys.append(step.mix(layer, inputs, c[part], None, ())[0])
        pieces.append(torch.stack(ys, 1))
    return torch.cat(pieces)


def feed(cache, parts, end=True, size=64):
    """One pass: ``parts`` maps rows to their new x, Δ, B, C; gives y by row."""
    layout = cache.begin(list(parts), [len(row[0]) for row in parts.values()])
    packed = [torch.cat(x) for x in zip(*parts.values(), strict=True)]
    y = run(cache, layout.counts, packed, size)
    if end:
        cache.end()
    return dict(zip(parts, y.split(layout.counts), strict=True))


def part(row, start, stop=None):
    return [x[start:stop] for x in row]


def check_slots(cache):
    """Every slot is free or belongs to exactly one anchor."""
    used = [slot for a in cache.anchors.slots.values() for slot in a.values() if slot >= 0]
    assert sorted([*used, *cache.anchors.free]) == list(range(cache.states.shape[1]))


@pytest.mark.parametrize("tape", ["draft", "completion"])
@pytest.mark.parametrize("seed", range(6))
def test_random_passes_with_rejections_equal_the_whole_sequence(tape, seed):
    """Rows of all lengths, drafts for some rows only, rewinds between passes, poisoned room."""
    dice = random.Random(seed)
    rows = [sequence(dice.randint(1, 140), seed * 10 + r) for r in range(4)]
    cache = new_cache(tape, rows=4)
    got = [torch.full((len(row[0]), LAYERS, D), torch.nan, dtype=F64) for row in rows]
    while unfinished := [r for r in range(4) if cache.length(r) < len(rows[r][0])]:
        parts = {}
        for r in dice.sample(unfinished, dice.randint(1, len(unfinished))):
            start = cache.length(r)
            parts[r] = part(rows[r], start, start + dice.choice([1, 1, 2, 5, 9, 40]))
        starts = {r: cache.length(r) for r in parts}
        cache.poison()
        for r, y in feed(cache, parts, size=dice.choice([3, 16, 64])).items():
            got[r][starts[r] : starts[r] + len(y)] = y
            cache.rewind(r, cache.length(r) - dice.randint(0, min(8, len(y))))
        check_slots(cache)
    for r, row in enumerate(rows):
        torch.testing.assert_close(got[r], expected(row), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tape", ["draft", "completion"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_bits_do_not_depend_on_rejections(tape, dtype):
    """Drafts of 7, of which any number is accepted, leave the bits of plain decoding."""
    row, other = sequence(60, 1, dtype), sequence(8, 2, dtype)
    plain = new_cache(tape, dtype=dtype)
    feed(plain, {0: part(row, 0, 10)})
    want = torch.cat([feed(plain, {0: part(row, t, t + 1)})[0] for t in range(10, 60)])
    for accepted in range(8):
        cache = new_cache(tape, dtype=dtype)
        feed(cache, {0: part(row, 0, 10)})
        got, at = [], 10
        while at < 60:
            good = part(row, at, min(60, at + 1 + accepted))
            draft = [torch.cat([g, o])[:8] for g, o in zip(good, other, strict=True)]
            got.append(feed(cache, {0: draft})[0][: len(good[0])])
            at += len(good[0])
            cache.rewind(0, at)
        assert torch.equal(torch.cat(got), want), accepted


def test_a_drafter_takes_back_single_steps_with_the_same_bits():
    """As a drafter does: k passes of one token, then back by any number of them."""
    row, other = sequence(60, 1, torch.float32), sequence(60, 2, torch.float32)
    plain, cache = new_cache(dtype=torch.float32), new_cache(dtype=torch.float32)
    want = torch.cat([feed(plain, {0: part(row, t, t + 1)})[0] for t in range(60)])
    got, at = [], 0
    for back in [8, 1, 0, 7, 3, 8, 5] * 2:
        for i in range(8):
            source = row if i < 8 - back else other
            y = feed(cache, {0: part(source, at + i, at + i + 1)})[0]
            if i < 8 - back and at + i < 60:
                got.append(y)
        at = min(60, at + 8 - back)
        cache.rewind(0, at)
        if at > 50:
            break
    assert len(got) > 40
    assert torch.equal(torch.cat(got), want[: len(got)])


def test_completion_tape_reaches_every_length():
    row, other = sequence(180, 4), sequence(180, 5)
    for length in (0, 1, 15, 16, 17, 47, GRID, GRID + 1, 150):
        cache = new_cache("completion")
        feed(cache, {0: part(row, 0, length + 1)})
        feed(cache, {0: part(other, 0, 170 - length)})
        assert cache.earliest(0) == 0
        cache.rewind(0, length)
        got = feed(cache, {0: part(row, length)})[0]
        torch.testing.assert_close(got, expected(row)[length:], atol=1e-12, rtol=0)
        check_slots(cache)
    assert len(cache.anchors.slots[0]) <= 180 // GRID + 5


def test_draft_tape_is_bounded_and_names_the_earliest_length():
    cache = new_cache(max_draft=8)
    feed(cache, {0: sequence(200, 6)})
    assert cache.earliest(0) == 192
    for step in range(40):
        feed(cache, {0: sequence(1 + step % 5, 7)})
        assert cache.length(0) - 24 < cache.earliest(0) <= cache.length(0) - 8
    assert cache.tape.keys.shape[1] <= 16 and cache.states.shape[1] <= 8
    check_slots(cache)
    earliest = cache.earliest(0)
    with pytest.raises(RewindError, match=f"earliest reachable length is {earliest}"):
        cache.rewind(0, earliest - 1)
    with pytest.raises(RewindError, match="holds 320 tokens"):
        cache.rewind(0, 321)
    cache.rewind(0, earliest)


def test_a_rewind_computes_nothing(monkeypatch):
    cache = new_cache()
    feed(cache, {0: sequence(40, 6)})
    monkeypatch.setattr(ScanInputs, "discretise", None)
    cache.rewind(0, 35)
    assert cache.length(0) == 35
    cache.rewind(0, 33)
    assert cache.length(0) == 33


def test_freed_slots_and_pages_never_surface():
    cache = new_cache(rows=2)
    for row in (sequence(70, 8), sequence(70, 9)):
        feed(cache, {0: row})
        cache.free_row(0)
        cache.poison()
        assert cache.add_row() == 0
        for n in (1, 20, 40):
            y = feed(cache, {0: part(row, cache.length(0), cache.length(0) + n)})[0]
            stop = cache.length(0)
            torch.testing.assert_close(y, expected(row)[stop - n : stop], atol=1e-12, rtol=0)
            cache.poison()


def test_a_cancelled_pass_leaves_the_row_as_it_was():
    row = sequence(80, 10)
    cache = new_cache()
    feed(cache, {0: part(row, 0, 37)})
    feed(cache, {0: sequence(60, 11)}, end=False)
    cache.cancel()
    assert cache.length(0) == 37
    check_slots(cache)
    feed(cache, {0: sequence(60, 11)}, end=False)  # neither ended nor cancelled
    got = feed(cache, {0: part(row, 37)})[0]
    torch.testing.assert_close(got, expected(row)[37:], atol=1e-12, rtol=0)
    check_slots(cache)


def test_states_are_float32_at_least():
    assert new_cache(dtype=torch.bfloat16).states.dtype == torch.float32
    assert new_cache(dtype=torch.float16).tape.keys.dtype == torch.float32
    assert new_cache(dtype=F64).states.dtype == F64


def test_gradients_flow_through_a_cached_pass():
    for size in (7, 64):
        grads = []
        for cached in (True, False):
            row = [x.requires_grad_() for x in sequence(40, 13)]
            y = feed(new_cache(), {0: row}, size=size)[0] if cached else expected(row)
            y.square().sum().backward()
            grads.append(torch.cat([x.grad.flatten() for x in row]))
        torch.testing.assert_close(*grads, atol=1e-9, rtol=0)


def test_selected_rows_are_copies():
    """reorder, repeat and select: every copy goes on by itself, with the bits of its source."""
    rows = [sequence(n, 20 + n) for n in (20, 50)]
    more = sequence(30, 14)
    cache = new_cache(rows=2)
    feed(cache, dict(enumerate(rows)))
    single = [feed(cache, {r: part(more, 0, 4)})[r] for r in range(2)]
    for r in range(2):
        cache.rewind(r, len(rows[r][0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
    cache.batch_select_indices(torch.tensor([True, True, False, True]))
    assert [cache.length(r) for r in cache.rows] == [50, 20, 50]
    check_slots(cache)
    got = feed(cache, {r: part(more, 0, 4) for r in range(3)})
    assert all(torch.equal(got[r], single[s]) for r, s in enumerate((1, 0, 1)))
    cache.rewind(0, 50)
    got = feed(cache, {2: part(more, 4), 0: part(more, 0)})
    torch.testing.assert_close(got[2], got[0][4:], atol=1e-12, rtol=0)


def test_crop_takes_columns_or_the_length_of_each_row():
    real = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]]).bool()
    row = [torch.randn(2, 5, d, dtype=F64).abs() for d in (D, D, N, N)]
    cache = new_cache(rows=0)

    def rectangle(row, real):
        with cache.feed(real.shape, real) as step:
            counts = cache.layout.counts
            return step.unpack(run(cache, counts, [step.pack(x) for x in row]))

    y = rectangle(row, real)
    assert not y[~real].any() and cache.get_seq_length() == 5
    cache.crop(-2)
    assert (cache.get_seq_length(), cache.length(0), cache.length(1)) == (3, 2, 3)
    again = rectangle([x[:, 3:] for x in row], real[:, 3:])
    torch.testing.assert_close(again, y[:, 3:], atol=1e-12, rtol=0)
    cache.crop(torch.tensor([1, 4]))
    assert (cache.length(0), cache.length(1)) == (1, 4)


def test_storage_made_in_inference_mode_serves_outside():
    cache = new_cache(rows=0)
    with torch.inference_mode():
        cache.add_row()
        feed(cache, {0: sequence(50, 15)})
        cache.rewind(0, 45)
        feed(cache, {0: sequence(2, 15)})
    feed(cache, {0: sequence(50, 16)})
    cache.reorder_cache(torch.tensor([0, 0]))
    assert feed(cache, {1: sequence(3, 17)})[1].isfinite().all()


def test_wrong_use_is_named():
    with pytest.raises(ConfigurationError, match="tape is 'draft' or 'completion'"):
        new_cache("all")
    with pytest.raises(RuntimeError, match=r"between begin\(\) and end\(\)"):
        new_cache().resume(0, slice(0, 1))
