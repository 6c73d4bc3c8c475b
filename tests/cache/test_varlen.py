"""The CUDA path's layout: what it hands to varlen attention gives what rows give one by one."""

import pytest
import torch

from retort.cache import varlen
from retort.cache.attention import AttentionRowCache
from retort.cache.varlen import VarlenAttentionRowCache


def naive_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa, num_splits):
    """torch's documented meaning: causal against the end of each row's keys, window to the left."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and enable_gqa and num_splits == 1
    assert window_size[1] == 0
    out, groups = torch.empty_like(q), q.shape[1] // k.shape[1]
    sizes_q, sizes_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max(sizes_q), max(sizes_k)) == (max_q, max_k)
    for row, (n, length) in enumerate(zip(sizes_q, sizes_k, strict=True)):
        for i in range(n):
            at = length - n + i
            low = 0 if window_size[0] < 0 else max(0, at - window_size[0])
            here = slice(int(cu_k[row]) + low, int(cu_k[row]) + at + 1)
            for head in range(q.shape[1]):
                query, kv = q[int(cu_q[row]) + i, head], head // groups
                probs = (k[here, kv] @ query * scale).softmax(0)
                out[int(cu_q[row]) + i, head] = probs @ v[here, kv]
    return out


def step(cache, rows, counts, seed, **options):
    torch.manual_seed(seed)
    cache.begin(rows, counts)
    total = sum(counts)
    keys, values = torch.randn(2, 1, 2, total, 6, dtype=torch.float64)
    cache.update(keys, values, 0)
    query = torch.randn(1, 4, total, 6, dtype=torch.float64)
    out = cache.attend(0, query, 6, scaling=0.3, **options)
    cache.end()
    return out


@pytest.mark.parametrize("window", [None, 3])
def test_one_call_gives_what_rows_give_alone(monkeypatch, window):
    monkeypatch.setattr(varlen, "_varlen_attn", naive_varlen)
    ours, twin = VarlenAttentionRowCache(float("nan")), AttentionRowCache(float("nan"))
    for cache in (ours, twin):
        for _ in range(3):
            cache.add_row()
    passes = [([0, 1, 2], [5, 1, 9]), ([2, 0], [4, 1]), ([1, 2, 0], [1, 1, 3])]
    for seed, (rows, counts) in enumerate(passes):
        got, want = (step(c, rows, counts, seed, sliding_window=window) for c in (ours, twin))
        assert torch.allclose(got, want, atol=1e-12)
        for cache in (ours, twin):
            cache.rewind(2, cache.length(2) - 1)


@pytest.mark.parametrize("special", [{"softcap": 5.0}, {"sinks": torch.zeros(4).double()}])
def test_what_varlen_lacks_goes_row_by_row(monkeypatch, special):
    monkeypatch.setattr(varlen, "_varlen_attn", None)
    ours, twin = VarlenAttentionRowCache(), AttentionRowCache()
    for cache in (ours, twin):
        cache.add_row()
    assert torch.equal(*(step(c, [0], [4], 0, **special) for c in (ours, twin)))


def test_it_serves_half_precision_on_cuda_only():
    assert varlen.serves(torch.device("cuda"), torch.bfloat16)
    assert not varlen.serves(torch.device("cuda"), torch.float32)
    assert not varlen.serves(torch.device("cpu"), torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_gives_what_rows_give_alone():
    torch.manual_seed(0)
    ours, twin = VarlenAttentionRowCache(), AttentionRowCache()
    outs = []
    for cache in (ours, twin):
        torch.manual_seed(0)
        cache.add_row(), cache.add_row()
        cache.begin([0, 1], [7, 33])
        make = {"device": "cuda", "dtype": torch.bfloat16}
        cache.update(*torch.randn(2, 1, 2, 40, 64, **make), 0)
        outs.append(cache.attend(0, torch.randn(1, 4, 40, 64, **make), 64, scaling=0.125))
        cache.end()
    assert torch.allclose(outs[0].float(), outs[1].float(), atol=2e-2)
