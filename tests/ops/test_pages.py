"""Memory in large pages: tensors that do not overlap, freed with the last of a piece."""

from __future__ import annotations

import gc

import psutil
import torch

from retort.ops.pages import PAGE, LargePages
from retort.ops.panels import pack, unpack


def test_tensors_are_aligned_and_do_not_overlap():
    pages, taken = LargePages(), []
    for i, shape in enumerate([(3, 5, 7), (1,), (0, 4), (PAGE // 4,), (17, PAGE // 8), (2, 2)]):
        dtype = torch.bfloat16 if i % 2 else torch.float32
        taken.append(pages.take(shape, dtype).fill_(i))
        assert taken[-1].shape == shape and taken[-1].dtype == dtype
        assert taken[-1].is_contiguous() and taken[-1].data_ptr() % 64 == 0
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(taken))


def test_pieces_start_at_the_border_of_a_page():
    assert LargePages().take((PAGE // 4,), torch.float32).data_ptr() % PAGE == 0


def test_memory_is_freed_with_the_last_tensor():
    process = psutil.Process()
    kept = LargePages().take((100,), torch.float32).fill_(1)
    before = process.memory_info().rss
    pages = LargePages()
    large = [pages.take((8 * PAGE,), torch.uint8).fill_(1) for _ in range(4)]
    assert process.memory_info().rss - before > 30 * PAGE
    del large, pages
    gc.collect()
    assert process.memory_info().rss - before < 4 * PAGE
    assert bool((kept == 1).all())


def test_a_weight_packed_into_pages_is_the_same():
    pages = LargePages()
    for weight in (torch.randn(70, 33), torch.randn(5, 9).bfloat16().float()):
        packed, alone = pack(weight, pages=pages), pack(weight)
        assert torch.equal(packed.data, alone.data) and torch.equal(unpack(packed), weight)
