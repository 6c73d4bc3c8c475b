"""The greedy token out of the output layer, without storing the logits of a whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from retort.decode.choosing import decided
from retort.ops.linear import packed_argmax
from retort.ops.packing import PackedLinear


class GreedyHead:
    """A model's packed output layer that gives token ids in place of logits while `choosing`.

    That is right only where the model hands the layer's result out as it is: a model that scales or
    caps its logits would do so to token ids. `untouched` tells.

    Args:
        model: a causal model.

    Attributes:
        usable: whether the output layer is a packed one without hooks.
    """

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        hooked = head is not None and (head._forward_hooks or head._forward_pre_hooks)
        self.usable = isinstance(head, PackedLinear) and not hooked
        self._head: Any = head if self.usable else None
        self._tokens: Tensor | None = None

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """For one pass the layer maps ``[..., hidden]`` to token ids, int64 ``[...]``.

        −1 where no logit is above −inf or one is NaN.
        """
        self._head.forward = self._choose
        try:
            yield
        finally:
            del self._head.forward

    def untouched(self, logits: Any) -> bool:
        """Whether what the model gave in the last pass is what the layer gave."""
        return logits is self._tokens

    def _choose(self, hidden: Tensor) -> Tensor:
        self._tokens = decided(*packed_argmax(hidden, self._head.packed))
        return self._tokens
