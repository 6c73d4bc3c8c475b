"""Which tokens may win a row's race of score + Gumbel noise: few enough for an exact look."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native import abi

MARGIN = 1e-6  # far above the kernel's error of 1e-9
ROOM = 32  # RETORT_SHORTLIST


def shortlist(scores: Tensor, states: Tensor) -> tuple[Tensor, Tensor] | None:
    """Tokens near the best of each row, ascending, so that the exact winner is among them.

    Args:
        scores: float64 ``[rows, vocab]`` on the CPU with neighbouring columns.
        states: int64 ``[rows]``: what `retort.decode.sampling` adds to a token's own bits.

    Returns:
        Rows and tokens, int64 ``[found]`` each; a row without a score above −inf has none. None
        where too many lie too close together.

    Raises:
        ConfigurationError: a tensor is not as above, or there is no native core.
    """
    good = scores.dim() == 2 and scores.dtype is torch.float64 and scores.is_cpu
    if not good or (scores.stride(1) != 1 and scores.shape[1] > 1):
        raise ConfigurationError(
            f"scores must be float64 [rows, vocab] on the CPU with neighbouring columns, not "
            f"{scores.dtype} {tuple(scores.shape)} on {scores.device}, strides {scores.stride()}"
        )
    rows, vocab = scores.shape
    if states.shape != (rows,) or states.dtype is not torch.int64:
        raise ConfigurationError(f"{rows} rows need as many int64 states, not {states.shape}")
    threads = torch.get_num_threads()
    tokens, counts = torch.empty(rows, threads, ROOM).long(), torch.zeros(rows, threads).long()
    states = states.contiguous()
    native.library().retort_race(
        abi.RaceCall(
            scores.data_ptr(), scores.stride(0), rows, vocab, threads, states.data_ptr(), MARGIN,
            tokens.data_ptr(), counts.data_ptr(), threads,
        )
    )  # fmt: skip
    if rows and counts.max() > ROOM:
        return None
    row, part, place = (torch.arange(ROOM) < counts[..., None]).nonzero(as_tuple=True)
    return row, tokens[row, part, place]
