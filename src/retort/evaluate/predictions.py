"""Teacher-forced predictions of one sequence without holding its ``[T, V]`` logits.

A causal model's logits are nearly always its output embedding applied to the last hidden states.
`predict` keeps those hidden states (``[N, D]``, a hundredth of the logits) and lets the reader
apply the head to a chunk of tokens at a time. Where a model does more after its head (a soft cap,
a scale), that is noticed and the model's own logits are kept instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retort.errors import ConfigurationError

Example = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of its completion."""


@dataclass(frozen=True)
class Predictions:
    """What a model predicted for ``N`` consecutive tokens.

    ``hidden`` is ``[N, D]`` and ``head`` maps ``[n, D]`` to logits ``[n, V]``; ``targets`` is the
    int64 ``[N]`` of the tokens that were predicted.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    targets: Tensor

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Logits ``[<= size, V]`` of successive tokens."""
        return (self.head(part) for part in self.hidden.split(size))


def predict(model: nn.Module, token_ids: Sequence[int], first: int) -> Predictions:
    """Run ``model`` over one sequence and return its predictions of ``token_ids[first:]``.

    ``first`` is at least 1: the first token of a sequence has nothing to be predicted from.
    Raises `ConfigurationError` if no token is left to predict.
    """
    if not 1 <= first < len(token_ids):
        raise ConfigurationError(
            f"nothing to predict: {len(token_ids)} tokens, scored from index {first}; a prompt and "
            "a completion need at least one token each"
        )
    ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
    with evaluating(model):
        hidden, head = _hidden_and_head(model, ids)
    return Predictions(hidden[first - 1 : -1], head, ids[0, first:])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; the model's former mode comes back at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _hidden_and_head(model: nn.Module, ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``[T, D]`` states and the map to logits; ``[T, V]`` and the identity for unusual heads."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    seen: list[Tensor] = []

    def narrow(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0][:, :1], *args[1:])  # the pass itself computes one row of logits

    if head is not None:
        handle = head.register_forward_pre_hook(narrow)
        try:
            first_row = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        if len(seen) == 1 and _same(head(seen[0][:, :1]), first_row):
            return seen[0][0], head
    return model(input_ids=ids, use_cache=False).logits[0], lambda logits: logits


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the head alone explains the model's logits (a cast to float32 is no difference)."""
    return ours.shape == theirs.shape and torch.equal(ours.to(theirs.dtype), theirs)
