"""transformers' attention interface on row caches: each row of a packed pass sees its own keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from retort.cache.attention import AttentionRowCache
from retort.cache.rows import RowCache
from retort.errors import UnsupportedModelError

ATTENTION = "retort_rows"

# The attention function gets its cache from here: some models drop keywords that they do not know.
active_cache: ContextVar[AttentionRowCache | None] = ContextVar("row cache", default=None)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function for a packed pass: each row attends to its own keys.

    ``query`` is ``[1, heads, total, head_dim]``; returns ``[1, total, heads, value_dim]``.

    Raises:
        UnsupportedModelError: the model wants what a packed pass would compute wrongly.
    """
    cache = active_cache.get()
    if cache is None or cache.layout is None:
        raise RuntimeError(f"attention {ATTENTION!r} runs inside PackedModel.forward only")
    if attention_mask is not None:
        raise UnsupportedModelError("its attention makes a mask of its own")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModelError("its attention looks ahead")
    if not cache.newest(key, value):
        raise UnsupportedModelError(
            "its attention reads keys or values other than those in the cache"
        )
    out = cache.attend(
        module.layer_idx,
        query,
        value.shape[-1],
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


@contextmanager
def attending(model: Any, cache: RowCache, attention: str = ATTENTION) -> Iterator[None]:
    """Evaluation mode and the packed attention function, for one pass; then all as before."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    modes = [(m, m.training) for m in model.modules()] if model.training else []
    _register()
    config._attn_implementation = attention
    token = active_cache.set(cache if isinstance(cache, AttentionRowCache) else None)
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        active_cache.reset(token)
        config._attn_implementation = before
        for module, training in modes:
            module.training = training


def _register() -> None:
    from transformers import AttentionInterface

    if ATTENTION not in AttentionInterface._global_mapping:
        AttentionInterface.register(ATTENTION, packed_attention)
