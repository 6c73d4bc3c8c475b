"""One model with its row cache, fed by packed passes: new tokens of many rows as one sequence.

Every layer but the token mixer sees ``[1, Σ counts]``, so no linear layer computes padding. This
is the "unpad input tokens" and "unpad KV cache" of EMS-SD (arXiv 2405.07542, section 3), for any
Hugging Face decoder, without code for each model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from retort.cache.native import NativeAttentionRowCache
from retort.cache.rows import RowCache
from retort.decode.backend import Backend
from retort.decode.head import GreedyHead
from retort.decode.interface import attending
from retort.decode.packing import pass_lock
from retort.decode.support import check_supported
from retort.errors import ConfigurationError

TAPES = ("draft", "completion")
MAX_PASS_TOKENS = 512  # up to here the packed linear is measured against PyTorch's

Feed = tuple[int, Sequence[int]]


class PackedModel:
    """A causal model whose rows are fed, read and rewound each on its own.

    Args:
        model: a transformers causal language model; after `close` it is as it was.
        tape: for recurrent models, how far a row can go back: over drafts, or over the completion.
        max_draft: longest draft that a recurrent row must be able to take back.
        cpu_backend: "auto", "native" (a row's bits are the same in any company) or "torch".
        weight_storage: with the native core, "auto" keeps weights in bf16 where that is exact,
            "float32" never; the arithmetic is float32 either way.
        fuse_layers: with the native core, run decoder layers that it knows as one call.
        release_weights: keep packed weights only; `close` unpacks them.
        prepack: on "torch", pack float32 weights once for oneDNN, in a layout beside their own.

    Attributes:
        forward_passes, forward_tokens: what was computed so far; a rewind changes neither.
        padding_tokens: how many of the tokens were padding: none, by construction.

    Raises:
        UnsupportedModelError: the model uses a feature that a packed pass would get wrong.
        ConfigurationError: an option has an unknown value.
    """

    padding_tokens = 0

    def __init__(
        self,
        model: Any,
        *,
        tape: str = "draft",
        max_draft: int = 16,
        cpu_backend: str = "auto",
        release_weights: bool = False,
        weight_storage: str = "auto",
        fuse_layers: bool = True,
        prepack: bool = True,
    ) -> None:
        if tape not in TAPES:
            raise ConfigurationError(f"tape={tape!r} must be one of {TAPES}")
        check_supported(model.config, type(model))
        self.model, self._lock = model, pass_lock(model)
        self.forward_passes = self.forward_tokens = 0
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        with self._lock:
            self.backend = Backend(model, cpu_backend, release_weights, weight_storage, prepack)
            self.cache = self._new_cache(tape, max_draft)
            if fuse_layers and isinstance(self.cache, NativeAttentionRowCache):
                self.backend.fuse(model, attending)
            self._greedy_head = self._find_greedy_head()

    def add_row(self) -> int:
        """Open an empty row and return its id."""
        return self.cache.add_row()

    def free_row(self, row: int) -> None:
        """Retire a row."""
        self.cache.free_row(row)

    def length(self, row: int) -> int:
        """Number of tokens in the cache of ``row``."""
        return self.cache.length(row)

    def rewind(self, row: int, length: int) -> None:
        """Forget the tokens of ``row`` from position ``length`` on; computes nothing."""
        if length != self.cache.length(row):
            self.cache.rewind(row, length)

    def forward(self, feeds: Sequence[Feed], keep: Sequence[int], greedy: bool = False) -> Tensor:
        """Append new tokens to rows in one pass.

        Args:
            feeds: ``(row, tokens)`` pairs, one a row, at least one token each.
            keep: for each feed, how many of its last tokens need logits (0 for none).
            greedy: only the most likely tokens are needed; where the native core can choose them
                inside the output layer, logits are not stored.

        Returns:
            Logits ``[Σ keep, vocab]`` in feed order, or, ``greedy`` permitting, int64 ``[Σ keep]``:
            the argmax of each (the lowest of equal ones).
        """
        if self._divides and sum(len(tokens) for _, tokens in feeds) > MAX_PASS_TOKENS:
            return self._in_parts(feeds, keep, greedy)
        layout = self.cache.begin([row for row, _ in feeds], [len(t) for _, t in feeds])
        ids = torch.tensor([[t for _, tokens in feeds for t in tokens]], device=self.model.device)
        index = torch.tensor(layout.last_indices(keep), dtype=torch.long, device=self.model.device)
        logits = self._guarded(ids, layout.position_ids(self.model.device), index, greedy)
        self._count(layout.total)
        return logits

    def _in_parts(self, feeds: Sequence[Feed], keep: Sequence[int], greedy: bool) -> Tensor:
        """A long pass as several of at most `MAX_PASS_TOKENS`: the same bits, all or nothing."""
        before = [(row, self.cache.length(row)) for row, _ in feeds]
        try:
            outs = [self.forward(*part, greedy) for part in _parts(feeds, keep, MAX_PASS_TOKENS)]
        except BaseException:
            for row, length in before:
                self.rewind(row, length)
            raise
        return torch.cat(outs)

    @property
    def _divides(self) -> bool:
        """Whether long passes are cut: natively, where cutting changes no bit."""
        return type(self.cache) is NativeAttentionRowCache

    def close(self) -> None:
        """Let every row go and put the model's own modules back."""
        for row in self.cache.rows:
            self.cache.free_row(row)
        with self._lock:
            self.backend.close()

    def _new_cache(self, tape: str, max_draft: int) -> RowCache:
        if hasattr(self.model, "new_row_cache"):
            cache = self.model.new_row_cache(tape=tape, max_draft=max_draft)
            cache.use_native = self.backend.name == "native"
            return cache
        return self.backend.attention_cache()

    def _count(self, tokens: int) -> None:
        self.forward_passes += 1
        self.forward_tokens += tokens

    def _guarded(
        self, ids: Tensor, position_ids: Tensor, index: Tensor, greedy: bool = False
    ) -> Tensor:
        """Run a pass; when it fails, rows keep the lengths that they had."""
        head = self._greedy_head if greedy else None
        try:
            with self._lock, head.choosing() if head is not None else nullcontext():
                logits = self._run(ids, position_ids, index)
        except BaseException:
            self.cache.cancel()
            raise
        self.cache.end()
        return logits

    def _find_greedy_head(self) -> GreedyHead | None:
        """The greedy head, where one token shows that the model hands its result out unchanged."""
        head = GreedyHead(self.model)
        if not head.usable:
            return None
        row = self.add_row()
        positions = self.cache.begin([row], [1]).position_ids()
        try:
            with head.choosing():
                logits = self._logits(torch.zeros_like(positions), positions, positions[0])
        except Exception:  # whatever a foreign forward does with token ids in place of logits
            return None
        finally:
            self.cache.cancel()
            self.free_row(row)
        return head if head.untouched(logits) else None

    def _run(self, ids: Tensor, position_ids: Tensor, index: Tensor) -> Tensor:
        logits = self._logits(ids, position_ids, index)[0]
        return logits if self._takes_logits_to_keep else logits[index]

    def _arithmetic(self) -> AbstractContextManager:
        """What element functions run on; our own models call the core by themselves."""
        own = getattr(self.model, "calls_core", False)
        return nullcontext() if own else self.backend.arithmetic()

    @torch.no_grad()
    def _logits(self, ids: Tensor, position_ids: Tensor, index: Tensor) -> Tensor:
        extra = {"logits_to_keep": index} if self._takes_logits_to_keep else {}
        with attending(self.model, self.cache), self._arithmetic():
            return self.model(
                input_ids=ids,
                position_ids=position_ids,
                past_key_values=self.cache,
                use_cache=True,
                **extra,
            ).logits


def _parts(
    feeds: Sequence[Feed], keep: Sequence[int], limit: int
) -> Iterator[tuple[list[Feed], list[int]]]:
    """Feeds in order, cut into passes of ``limit`` tokens, with what each keeps of its last."""
    part: list[Feed] = []
    kept: list[int] = []
    room = limit
    for (row, tokens), wanted in zip(feeds, keep, strict=True):
        start = 0
        while start < len(tokens):
            piece = tokens[start : start + room]
            start, room = start + len(piece), room - len(piece)
            part.append((row, piece))
            kept.append(min(len(piece), max(0, wanted - (len(tokens) - start))))
            if not room:
                yield part, kept
                part, kept, room = [], [], limit
    if part:
        yield part, kept
