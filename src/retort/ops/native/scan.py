"""Selective scan and causal convolution of packed ragged rows, token after token, in native calls.

``h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t`` and ``y_t = C_t·h_t`` (arXiv 2312.00752) with the states
of a channel in registers, so that nothing of size tokens × states × channels exists. A state's bits
depend on its row's inputs alone, and a replay from a kept state repeats them. The PyTorch twins are
in `retort.ops.selective_scan` and `retort.ops.segments`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native import abi
from retort.ops.native.checks import addresses, int64s, require, require_counts, require_rows
from retort.ops.selective_scan import ScanInputs


@dataclass(frozen=True)
class ScanRows:
    """Rows of a pass, the states that they start from and the ones that are kept.

    Attributes:
        counts: tokens of each row, at least 1; they are packed in this order.
        initial: index of each row's state, −1 where it starts from nothing.
        kept: (packed token, index of the state after it), ascending.
    """

    counts: tuple[int, ...]
    initial: tuple[int, ...]
    kept: tuple[tuple[int, int], ...] = field(default=())

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First packed token of each row, and their number."""
        return tuple(accumulate(self.counts, initial=0))

    @cached_property
    def arrays(self) -> list[ctypes.Array]:
        """Counts, offsets, ends of each row's kept states, and their tokens, for the core."""
        tokens = [token for token, _ in self.kept]
        ends = [sum(token < end for token in tokens) for end in self.offsets[1:]]
        return [int64s(a) for a in (self.counts, self.offsets[:-1], ends, tokens)]

    def check(self, initial: int, kept: int) -> None:
        """Refuse what would read or write outside.

        Raises:
            ConfigurationError: an index is too large or tokens are not ascending.
        """
        require_counts(self.counts, self.offsets[-1])
        tokens, places = [t for t, _ in self.kept], [p for _, p in self.kept]
        ordered = tokens == sorted(set(tokens)) and len(self.initial) == len(self.counts)
        inside = max(tokens, default=-1) < self.offsets[-1] and min(tokens, default=0) >= 0
        fits = max(self.initial, default=-1) < initial and max(places, default=-1) < kept
        if not (ordered and inside and fits) or min(places, default=0) < 0:
            raise ConfigurationError(
                f"rows of {self.counts} tokens with initial states {self.initial} of {initial} and "
                f"kept (token, state) {self.kept} of {kept}: out of range or out of order"
            )


def ragged_scan(
    inputs: ScanInputs,
    c: Tensor | None,
    rows: ScanRows,
    initial: Tensor,
    kept: Tensor | None = None,
) -> Tensor | None:
    """Scan every row from its state.

    Args:
        inputs: A ``[N, D]`` contiguous, Δ and u ``[total, D]``, B ``[total, N]``; float32 on the
            CPU with neighbouring columns.
        c: C ``[total, N]``, or None where only states are wanted.
        rows: the rows; their kept states go to ``kept``.
        initial: ``[s, N, D]``, read only.
        kept: ``[k, N, D]``, or None where no state is kept; may share memory with ``initial`` as
            long as no state that a row starts from is overwritten by another row.

    Returns:
        y ``[total, D]`` without the D·u term, or None without C. No gradient flows.

    Raises:
        ConfigurationError: a tensor does not fit, or there is no native core.
    """
    total = rows.offsets[-1]
    states, channels = inputs.a.shape
    require("A", inputs.a, (states, channels))
    for name, x, width in (("dt", inputs.dt, channels), ("u", inputs.u, channels)):
        require_rows(name, x, total, width)
    for name, x in (("B", inputs.b), ("C", inputs.b if c is None else c)):
        require_rows(name, x, total, states)
    out = initial[:0] if kept is None else kept
    for name, x in (("initial", initial), ("kept", out)):
        require(name, x, (len(x), states, channels))
    rows.check(len(initial), len(out))
    y = None if c is None else torch.empty(total, channels)
    counts, offsets, ends, tokens = map(ctypes.addressof, rows.arrays)
    first, last = addresses(initial, rows.initial), addresses(out, [p for _, p in rows.kept])
    call = abi.ScanCall(
        len(rows.counts), channels, states, counts, offsets, inputs.a.data_ptr(),
        inputs.dt.data_ptr(), inputs.u.data_ptr(), inputs.b.data_ptr(),
        None if c is None else c.data_ptr(), inputs.dt.stride(0), inputs.u.stride(0),
        inputs.b.stride(0), 0 if c is None else c.stride(0), ctypes.addressof(first), ends, tokens,
        ctypes.addressof(last), None if y is None else y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if total:
        native.library().retort_scan(call)
    return y


def ragged_convolution(
    x: Tensor,
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Sequence[int],
    silu: bool = False,
) -> Tensor:
    """Causal depthwise convolution of every row after its own history.

    Args:
        x: inputs ``[total, D]`` float32 on the CPU with neighbouring columns.
        history: the K−1 inputs before each row ``[rows, K−1, D]``, oldest first, contiguous.
        weight: ``[D, K]`` contiguous.
        bias: ``[D]`` or None.
        counts: tokens of each row.
        silu: pass the result through silu.

    Returns:
        ``[total, D]``. No gradient flows.

    Raises:
        ConfigurationError: a tensor does not fit, or there is no native core.
    """
    total, (channels, kernel) = sum(counts), weight.shape
    require_counts(counts, len(x))
    require_rows("x", x, total, channels)
    require("weight", weight, (channels, kernel))
    require("history", history, (len(counts), kernel - 1, channels))
    if bias is not None:
        require("bias", bias, (channels,))
    out = torch.empty(total, channels)
    arrays = [int64s(counts), int64s(list(accumulate(counts, initial=0)))]
    call = abi.ConvCall(
        len(counts), channels, kernel, int(silu), *map(ctypes.addressof, arrays), x.data_ptr(),
        x.stride(0), history.data_ptr(), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if total:
        native.library().retort_convolution(call)
    return out
