"""One packed pass of a model without weights: what its attention asks for, before any is loaded.

A packed pass makes no masks: a token sees its row up to itself, or as much of that as the attention
call names as a window. The probe builds the model on the meta device, lets it make its masks, and
finds it out where they say something else, and where keys and values do not reach attention as the
cache took them. No weight is read, nothing is computed, no network is asked.
"""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retort.cache.attention import AttentionRowCache
from retort.decode.interface import attending, packed_attention
from retort.errors import UnsupportedModelError

_PROBE = "retort_rows_probe"
_PLACE = 1 << 17  # of a query so late that windows and chunks of usual lengths end before it
_COUNTS = (3, 1)


def objection(config: Any, model_class: Any) -> str | None:
    """Why a packed pass over such a model would be wrong; None where it is right."""
    return _objection(_Key(config, model_class))


class _Key:
    """A class and its configuration, equal to another by what is written in it."""

    def __init__(self, config: Any, model_class: Any) -> None:
        self.config, self.model_class = config, model_class
        self._what = model_class, config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._what == other._what

    def __hash__(self) -> int:
        return hash(self._what)


@lru_cache(maxsize=64)
def _objection(key: _Key) -> str | None:
    try:
        model = _weightless(deepcopy(key.config), key.model_class)
    except Exception as error:  # whatever a foreign constructor raises
        return f"it cannot be built from its configuration ({_line(error)})"
    try:
        _pass(model)
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # whatever a foreign forward raises
        return f"a packed pass through it, tried without weights, fails ({_line(error)})"
    return None


def _weightless(config: Any, model_class: Any) -> Any:
    text = config.get_text_config()
    if getattr(model_class, "config_class", None) is type(text):
        config = text  # as transformers' auto classes do
    config._attn_implementation = "eager"  # replaced in the pass; others look for their packages
    config._experts_implementation = "eager"  # others insist on a dtype
    with torch.device("meta"):
        return model_class(config).eval()


@torch.no_grad()
def _pass(model: Any) -> None:
    _register()
    cache = _ProbeCache()
    rows = [cache.add_row() for _ in _COUNTS]
    positions = cache.begin(rows, _COUNTS).position_ids("meta")
    with attending(model, cache, _PROBE), _Numberless():
        model(
            input_ids=torch.zeros_like(positions),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    if not cache.attended or cache.waiting:
        raise UnsupportedModelError(
            "its attention does not go through transformers' attention interface"
        )


class _ProbeCache(AttentionRowCache):
    """Stores nothing; knows which layers gave keys, and which of them attended."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: set[int] = set()
        self.attended: set[int] = set()

    def _append(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        if layer_idx in self.attended | self.waiting:
            raise UnsupportedModelError("a layer gives keys and values twice in a pass")
        self.waiting.add(layer_idx)

    def attend(self, layer_idx: int, query: Tensor, value_dim: int, **_: Any) -> Tensor:
        self.waiting.discard(layer_idx)
        self.attended.add(layer_idx)
        return query.new_empty(query.shape[2], query.shape[1], value_dim)

    # What transformers' masks ask for
    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class _Numberless(TorchDispatchMode):
    """Where a forward looks at the numbers of tensors without data, every number is 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if name == "_local_scalar_dense":
                return 0
            if name == "nonzero":
                return args[0].new_zeros(1, args[0].ndim, dtype=torch.long)
        return func(*args, **(kwargs or {}))


def _mask(q_length: int, kv_length: int, mask_function: Any, **_: object) -> Tensor:
    """In place of a mask: which keys it would let a late query see."""
    mask: Any = torch.empty(1, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    zero, place = torch.tensor(0), torch.tensor(_PLACE)
    try:
        seen = mask_function(zero, zero, place, torch.arange(_PLACE + 2))
    except IndexError:  # it asks what this row holds
        raise UnsupportedModelError("its mask depends on what a row holds") from None
    mask.seen = seen.expand(_PLACE + 2)
    return mask


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`packed_attention`, where the mask says what that computes."""
    seen = getattr(attention_mask, "seen", None)
    if seen is None:  # no mask: all up to the token, as `packed_attention` checks
        return packed_attention(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **options
        )
    keys = torch.arange(_PLACE + 2)
    window = _PLACE + 1 if sliding_window is None else sliding_window
    if not torch.equal(seen, (keys <= _PLACE) & (keys > _PLACE - window)):
        raise UnsupportedModelError(_difference(seen, sliding_window))
    return packed_attention(
        module, query, key, value, None, sliding_window=sliding_window, **options
    )


def _difference(seen: Tensor, window: int | None) -> str:
    if seen[-1]:
        return "its attention looks ahead"
    return f"its mask shows a token {int(seen.sum())} keys, while attention is told {window=}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if _PROBE not in AttentionInterface._global_mapping:
        AttentionInterface.register(_PROBE, _attention)
        AttentionMaskInterface.register(_PROBE, _mask)
