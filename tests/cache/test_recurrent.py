"""The retention row cache alone: deferred commit, rewinds, slots and the Hugging Face surface."""

import random

import pytest
import torch

from retort.cache.retention import RetentionRowCache, RetentionShape
from retort.errors import ConfigurationError, RewindError
from retort.ops.clock import Clock
from retort.ops.retention import chunkwise_retention, log_decay

LAYERS, H, DK, DV, L = 2, 2, 4, 6, 16
F64 = torch.float64


def new_cache(tape="draft", max_draft=8, dtype=F64, rows=1):
    shape = RetentionShape(LAYERS, H, DK, DV)
    cache = RetentionRowCache(shape, dtype, tape=tape, max_draft=max_draft, block=L)
    for _ in range(rows):
        cache.add_row()
    return cache


def sequence(length, seed, dtype=F64):
    """q, k, v ``[T, H, d]`` of a row; the layers of these tests see the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, H, d, generator=generator, dtype=dtype) for d in (DK, DK, DV)]


def expected(qkv):
    """Y of the whole sequence by the chunkwise form."""
    clock = Clock.of(None, None, (1, len(qkv[0])))
    return chunkwise_retention(*(x[None] for x in qkv), log_decay(H, F64), clock)[0]


def feed(cache, parts, end=True):
    """One pass: ``parts`` maps rows to their new q, k, v; gives Y by row (layers agree)."""
    layout = cache.begin(list(parts), [len(qkv[0]) for qkv in parts.values()])
    packed = [torch.cat(x) for x in zip(*parts.values(), strict=True)]
    ys = [cache.retention(layer, *packed) for layer in range(LAYERS)]
    assert torch.equal(*ys)
    if end:
        cache.end()
    return dict(zip(parts, ys[0].split(layout.counts), strict=True))


def cut(qkv, start, stop=None):
    return [x[start:stop] for x in qkv]


@pytest.mark.parametrize("tape", ["draft", "completion"])
@pytest.mark.parametrize("seed", range(6))
def test_random_passes_with_rejections_equal_the_whole_sequence(tape, seed):
    """Rows of all lengths, long and short pieces, rewinds between them, poisoned spare room."""
    dice = random.Random(seed)
    rows = [sequence(dice.randint(1, 140), seed * 10 + r) for r in range(4)]
    cache = new_cache(tape, rows=4)
    got = [torch.full_like(qkv[2], torch.nan) for qkv in rows]
    while unfinished := [r for r in range(4) if cache.length(r) < len(rows[r][0])]:
        parts = {}
        for r in dice.sample(unfinished, dice.randint(1, len(unfinished))):
            start = cache.length(r)
            parts[r] = cut(rows[r], start, start + dice.choice([1, 2, 5, 9, 40]))
        starts = {r: cache.length(r) for r in parts}
        cache.poison()
        for r, y in feed(cache, parts).items():
            got[r][starts[r] : starts[r] + len(y)] = y
            back = dice.randint(0, min(8, len(y)))
            cache.rewind(r, cache.length(r) - back)
    for r, qkv in enumerate(rows):
        torch.testing.assert_close(got[r], expected(qkv), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tape", ["draft", "completion"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_bits_do_not_depend_on_rejections_at_any_offset_around_a_boundary(tape, dtype):
    """Drafts of 7 rejected at every offset around two boundaries leave the plain row's bits."""
    qkv, other = sequence(60, 1, dtype), sequence(8, 2, dtype)
    plain = new_cache(tape, dtype=dtype)
    feed(plain, {0: cut(qkv, 0, 10)})
    want = torch.cat([feed(plain, {0: cut(qkv, t, t + 1)})[0] for t in range(10, 60)])
    for accepted in range(8):
        cache = new_cache(tape, dtype=dtype)
        feed(cache, {0: cut(qkv, 0, 10)})
        got, at = [], 10
        while at < 60:
            good = cut(qkv, at, min(60, at + 1 + accepted))
            draft = [torch.cat([g, o])[:8] for g, o in zip(good, other, strict=True)]
            got.append(feed(cache, {0: draft})[0][: len(good[0])])
            at += len(good[0])
            cache.rewind(0, at)
        assert torch.equal(torch.cat(got), want), accepted


def test_bits_do_not_depend_on_how_a_prompt_is_cut():
    qkv = sequence(100, 3)
    results = []
    for pieces in ([100], [33, 67], [16] * 6 + [4], [50, 30, 20]):
        cache, at = new_cache(), 0
        for n in pieces:
            feed(cache, {0: cut(qkv, at, at + n)})
            at += n
        results.append(feed(cache, {0: cut(qkv, 0, 1)})[0])
    assert all(torch.equal(r, results[0]) for r in results)


def test_completion_tape_reaches_every_length():
    qkv, other = sequence(120, 4), sequence(120, 5)
    for length in (0, 1, 15, 16, 17, 47, 48, 90):
        cache = new_cache("completion")
        feed(cache, {0: cut(qkv, 0, length + 1)})
        feed(cache, {0: cut(other, 0, 100 - length)})
        assert cache.earliest(0) == 0
        cache.rewind(0, length)
        got = feed(cache, {0: cut(qkv, length)})[0]
        torch.testing.assert_close(got, expected(qkv)[length:], atol=1e-12, rtol=0)


def test_draft_tape_is_bounded_and_names_the_earliest_length():
    cache = new_cache(max_draft=8)
    feed(cache, {0: sequence(200, 6)})
    assert cache.length(0) - 8 - L < cache.earliest(0) <= cache.length(0) - 8
    for _ in range(20):
        feed(cache, {0: sequence(5, 7)})
        assert cache.earliest(0) <= cache.length(0) - 5
    assert cache.tape.keys.shape[1] <= 8  # pages of 16 tokens
    earliest = cache.earliest(0)
    with pytest.raises(RewindError, match=f"earliest reachable length is {earliest}"):
        cache.rewind(0, earliest - 1)
    with pytest.raises(RewindError, match="holds 300 tokens"):
        cache.rewind(0, 301)
    cache.rewind(0, earliest)


def test_freed_slots_and_pages_never_surface():
    rows = [sequence(70, 8), sequence(70, 9)]
    cache = new_cache(rows=2)
    for qkv in rows:
        feed(cache, {0: qkv})
        cache.free_row(0)
        cache.poison()
        assert cache.add_row() == 0
        for n in (1, 20, 40):  # a young row, then ones with a state
            y = feed(cache, {0: cut(qkv, cache.length(0), cache.length(0) + n)})[0]
            stop = cache.length(0)
            torch.testing.assert_close(y, expected(qkv)[stop - n : stop], atol=1e-12, rtol=0)
            cache.poison()


def test_a_cancelled_pass_leaves_the_row_as_it_was():
    qkv = sequence(80, 10)
    cache = new_cache()
    feed(cache, {0: cut(qkv, 0, 37)})
    feed(cache, {0: sequence(60, 11)}, end=False)
    cache.cancel()
    assert cache.length(0) == 37
    got = feed(cache, {0: cut(qkv, 37)})[0]
    torch.testing.assert_close(got, expected(qkv)[37:], atol=1e-12, rtol=0)


def test_states_are_float32_at_least():
    assert new_cache(dtype=torch.bfloat16).states.dtype == torch.float32
    assert new_cache(dtype=torch.float16).tape.keys.dtype == torch.float32
    assert new_cache(dtype=F64).states.dtype == F64


def test_float32_is_close_to_float64():
    qkv = sequence(300, 12)
    cache = new_cache(dtype=torch.float32)
    got = torch.cat([feed(cache, {0: [x.float() for x in cut(qkv, t, t + 30)]})[0]
                     for t in range(0, 300, 30)])  # fmt: skip
    torch.testing.assert_close(got.double(), expected(qkv), atol=2e-4, rtol=1e-4)


def test_gradients_flow_through_a_cached_pass():
    """Tokens of one pass over three blocks: the gradient of the chunkwise form."""
    grads = []
    for cached in (True, False):
        qkv = [x.requires_grad_() for x in sequence(40, 13)]
        y = feed(new_cache(), {0: qkv})[0] if cached else expected(qkv)
        y.square().sum().backward()
        grads.append(torch.cat([x.grad.flatten() for x in qkv]))
    torch.testing.assert_close(*grads, atol=1e-10, rtol=0)


def test_selected_rows_are_copies():
    """reorder, repeat and select: every copy goes on by itself, with the bits of its source."""
    rows = [sequence(n, 20 + n) for n in (20, 50)]
    more = sequence(30, 14)
    cache = new_cache(rows=2)
    feed(cache, dict(enumerate(rows)))
    single = [feed(cache, {r: cut(more, 0, 4)})[r] for r in range(2)]
    for r in range(2):
        cache.rewind(r, len(rows[r][0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
    cache.batch_select_indices(torch.tensor([True, True, False, True]))
    assert [cache.length(r) for r in cache.rows] == [50, 20, 50]
    got = feed(cache, {r: cut(more, 0, 4) for r in range(3)})
    assert all(torch.equal(got[r], single[s]) for r, s in enumerate((1, 0, 1)))
    cache.rewind(0, 50)
    got = feed(cache, {2: cut(more, 4), 0: cut(more, 0)})
    torch.testing.assert_close(got[2], got[0][4:], atol=1e-12, rtol=0)


def rectangle(cache, qkv, real):
    """Feed ``[B, T, H, d]`` with a mask; Y is zero at padding."""
    with cache.feed(real.shape, real) as step:
        y = cache.retention(0, *(step.pack(x) for x in qkv))
        cache.retention(1, *(step.pack(x) for x in qkv))
        return step.unpack(y)


def test_crop_counts_columns_and_takes_lengths_of_rows():
    real = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]]).bool()
    qkv = [torch.randn(2, 5, H, d, dtype=F64) for d in (DK, DK, DV)]
    cache = new_cache(rows=0)
    y = rectangle(cache, qkv, real)
    assert not y[~real].any() and cache.get_seq_length() == 5
    cache.crop(0)
    cache.crop(-2)
    assert (cache.get_seq_length(), cache.length(0), cache.length(1)) == (3, 2, 3)
    again = rectangle(cache, [x[:, 3:] for x in qkv], real[:, 3:])
    torch.testing.assert_close(again, y[:, 3:], atol=1e-12, rtol=0)
    cache.crop(torch.tensor([1, 4]))
    assert (cache.length(0), cache.length(1)) == (1, 4)
    assert cache.columns.tolist() == [[False, True, False, False, False], [True] * 4 + [False]]


def test_crop_changes_no_row_when_one_cannot_follow():
    cache = new_cache(rows=0)
    qkv = [torch.randn(2, 60, H, d, dtype=F64) for d in (DK, DK, DV)]
    rectangle(cache, qkv, torch.ones(2, 60).bool())
    with pytest.raises(RewindError, match="row 1 cannot be cropped to length 3"):
        cache.crop(torch.tensor([59, 3]))
    with pytest.raises(RewindError, match="beyond the past"):
        cache.crop(-61)
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(5)
    with pytest.raises(ConfigurationError, match="3 lengths for 2 rows"):
        cache.crop(torch.tensor([1, 2, 3]))
    assert (cache.length(0), cache.length(1), cache.get_seq_length()) == (60, 60, 60)


def test_rectangles_name_what_does_not_fit():
    cache = new_cache(rows=2)
    with (
        pytest.raises(ConfigurationError, match="holds 2 rows, the input has 3"),
        cache.feed(torch.Size([3, 4]), None),
    ):
        pass
    cache = new_cache(rows=0)
    with (
        pytest.raises(ConfigurationError, match=r"attention_mask is \[2, 5\]"),
        cache.feed(torch.Size([2, 4]), torch.ones(2, 5)),
    ):
        pass
    cache.free_row(0), cache.free_row(1)
    cache.begin([cache.add_row()], [3])
    with (
        pytest.raises(ConfigurationError, match="has 3 tokens"),
        cache.feed(torch.Size([1, 4]), None),
    ):
        pass
    with pytest.raises(ConfigurationError, match="tape is 'draft' or 'completion'"):
        new_cache("all")


def test_a_rectangle_of_padding_only_moves_no_row():
    cache = new_cache(rows=0)
    qkv = [torch.randn(2, 3, H, d, dtype=F64) for d in (DK, DK, DV)]
    y = rectangle(cache, qkv, torch.zeros(2, 3).bool())
    assert not y.any() and cache.get_seq_length() == 3 and cache.length(0) == 0


def test_storage_made_in_inference_mode_serves_outside():
    cache = new_cache(rows=0)
    with torch.inference_mode():
        cache.add_row()
        feed(cache, {0: sequence(50, 15)})
    feed(cache, {0: sequence(50, 16)})
    cache.reorder_cache(torch.tensor([0, 0]))
    assert feed(cache, {1: sequence(3, 17)})[1].isfinite().all()
