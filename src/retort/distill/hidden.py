"""A causal model up to its head: the hidden states that chunked losses turn into logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retort.distill.sharding import gather_own
from retort.distill.signals import Head


class HeadlessModel:
    """Gives hidden states ``[R, T, D]`` and the head that makes logits ``[n, V]`` of ``[n, D]``.

    The model's own forward runs (so that wrappers see it), but its head is given one position
    only. Where a model does more after its head than apply it (a soft cap, a scale), that is
    noticed once, here, and its full logits stand in for hidden states with the identity as head.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        module = model.get_output_embeddings()
        self.plain = module is not None and _explains_logits(model, module)
        self.module: nn.Module | None = module
        self.head: Head = module if module is not None and self.plain else _identity

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        through: Any = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of a right-padded batch; ``through`` is the model as it is wrapped.

        ``positions`` int64 ``[R, T]`` take the mask's place where rows are packed (`packing`).
        """
        call = self.model if through is None else through
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        packed = positions is not None
        inputs |= {"position_ids": positions} if packed else {"attention_mask": attention_mask}
        if not self.plain or self.module is None:
            return call(**inputs).logits
        with _watched(self.module, narrow=True) as seen:
            call(**inputs)
        gather_own(call)
        return seen[0]


def _identity(logits: Tensor) -> Tensor:
    return logits


@contextmanager
def _watched(head: nn.Module, narrow: bool) -> Iterator[list[Tensor]]:
    """Catch what the head is given; with ``narrow`` it computes one position only."""
    seen: list[Tensor] = []

    def watch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0][:, :1], *args[1:]) if narrow else args

    handle = head.register_forward_pre_hook(watch)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def _explains_logits(model: Any, head: nn.Module) -> bool:
    """Whether the head alone makes the model's logits (a cast to float32 is no difference).

    Several tokens are tried, since the embedding of a padding token may be 0.
    """
    size = min(8, model.config.get_text_config().vocab_size)
    ids = torch.arange(size, device=model.device)[None]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with _watched(head, narrow=False) as seen:
            logits = model(input_ids=ids, use_cache=False).logits
        ours = [head(hidden) for hidden in seen]
    finally:
        for module in training:
            module.training = True
    return len(ours) == 1 and torch.equal(ours[0].to(logits.dtype), logits)
