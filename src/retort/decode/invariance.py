"""Which modules give a row other bits in other company: found by running the model, and named.

On the native core linears, attention, norms of fused layers and the usual activations are the same
bits in any company. What a model computes besides (a norm of its own, an unusual activation, an
expert product) is PyTorch's, whose kernels may split or round by the size of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from retort.cache.rows import PackedRows
from retort.decode.packed import PackedModel

Layouts = Sequence[Sequence[tuple[int, int]]]  # passes of (row, new tokens)

Parts = dict[int, dict[int, list[Tensor]]]  # row → which of the tensors → its tokens

_ROWS, _LENGTH = 5, 6


@dataclass
class _Trace:
    """What a module read and gave for each row, token after token, tensor by tensor."""

    inputs: Parts = field(default_factory=dict)
    outputs: Parts = field(default_factory=dict)


def variant_modules(packed: PackedModel, tokens: Sequence[Sequence[int]] = ()) -> dict[str, str]:
    """Modules that compute other bits for a row in company than for the row alone.

    Rows are read twice, token by token alone and in chunks together. A module is named when a row
    came to it with the same bits both times and left with different ones, unless a module inside
    it is named already; what follows from its difference is not.

    Args:
        packed: a model without rows in work.
        tokens: rows of one length to try; random ones by default.

    Returns:
        Module name (``""`` is the model itself) → class name; empty where bits never differed.
    """
    rows = [list(row) for row in tokens] or _random_rows(packed.model)
    count, length = len(rows), len(rows[0])
    alone = [[(r, 1)] for r in range(count) for _ in range(length)]
    middle = length // 2
    together = [[(r, n) for r in range(count)] for n in (middle, 1, length - middle - 1) if n]
    first, second = (_traces(packed, rows, layouts) for layouts in (alone, together))
    found = {name for name in first.keys() & second.keys() if _differs(first[name], second[name])}
    inner = {n for n in found if not any(o != n and o.startswith(f"{n}." * bool(n)) for o in found)}
    return {n: type(packed.model.get_submodule(n)).__name__ for n in sorted(inner)}


def _random_rows(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(vocab, (_ROWS, _LENGTH), generator=generator).tolist()


def _traces(packed: PackedModel, tokens: list[list[int]], layouts: Layouts) -> dict[str, _Trace]:
    """Run passes and keep what every module read and gave; the rows are gone afterwards."""
    rows = [packed.add_row() for _ in tokens]
    traces: dict[str, _Trace] = {}
    try:
        with _recorded(packed, traces):
            for layout in layouts:
                lengths = [packed.length(rows[r]) for r, _ in layout]
                feeds = [
                    (rows[r], tokens[r][at : at + n])
                    for (r, n), at in zip(layout, lengths, strict=True)
                ]
                packed.forward(feeds, [n for _, n in layout])
    finally:
        for row in rows:
            packed.free_row(row)
    return traces


@contextmanager
def _recorded(packed: PackedModel, traces: dict[str, _Trace]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            layout = packed.cache.layout
            assert layout is not None
            trace = traces.setdefault(name, _Trace())
            _split((args, kwargs), layout, trace.inputs)
            _split(output, layout, trace.outputs)

        return hook

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in packed.model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _split(values: Any, layout: PackedRows, into: Parts) -> None:
    """Add the rows' parts of all floating tensors that have one entry a token."""
    for place, tensor in enumerate(_tensors(values)):
        shape, total = tensor.shape, layout.total
        dim = 1 if len(shape) > 2 and shape[:2] == (1, total) else 0
        if not tensor.is_floating_point() or len(shape) < 2 or shape[dim] != total:
            continue
        for row, part in zip(layout.rows, tensor.split(list(layout.counts), dim), strict=True):
            row_parts = into.setdefault(row, {})
            row_parts.setdefault(place, []).append(part.detach().clone().flatten())


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _differs(a: _Trace, b: _Trace) -> bool:
    """Whether some row's inputs are equal and its outputs are not."""
    return any(
        _equal(a.inputs[row], b.inputs[row]) and not _equal(a.outputs[row], b.outputs[row])
        for row in a.inputs.keys() & b.inputs.keys() & a.outputs.keys() & b.outputs.keys()
    )


def _equal(a: dict[int, list[Tensor]], b: dict[int, list[Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(torch.cat(a[place]), torch.cat(b[place])) for place in a
    )
