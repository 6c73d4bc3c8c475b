"""transformers' processors and criteria for one row of a padded batch, on its unpadded ids.

``generate`` prepares them for the padded batch: lengths count padding. For each row they are
prepared again by transformers itself as for that row alone; the caller's own are carried over.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class RowProcessors:
    """A row's logits processors as one function, see `SamplingParams.logits_processors`.

    Args:
        processors: a transformers ``LogitsProcessorList`` for ids ``[1, length]``.
        stateless: the part of it that drafts may go through, too.
        keep: remember what was read and returned, for ``output_logits`` and ``output_scores``.
    """

    def __init__(self, processors: Any, stateless: Any, keep: bool) -> None:
        self._processors, self._stateless, self._keep = processors, stateless, keep
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []

    def __call__(self, tokens: Sequence[int], scores: Tensor) -> Tensor:
        """New scores ``[vocab]`` after ``tokens``, computed in float32 as in ``generate``."""
        logits = scores.float()
        shaped = _apply(self._processors, tokens, logits)
        if self._keep:
            self.logits.append(logits)
            self.scores.append(shaped)
        return shaped.to(scores)

    def for_drafts(self, tokens: Sequence[int], scores: Tensor) -> Tensor:
        """The same for a draft: nothing is remembered, nothing that keeps a state is called."""
        return _apply(self._stateless, tokens, scores.float()).to(scores)

    def __bool__(self) -> bool:
        return self._keep or len(self._processors) > 0


class Processors:
    """Makes the processors of each row.

    Args:
        model: whose ``_get_logits_processor`` knows what a configuration means.
        config: the prepared generation configuration.
        input_ids: ``[batch, length]``, padded.
        attention_mask: as ``generate`` hands it on.
        prepared: the list that ``generate`` prepared: the configuration's and the caller's.
    """

    def __init__(
        self,
        model: Any,
        config: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prepared: Any,
    ) -> None:
        self._model, self._config = model, config
        self._length, self._device = input_ids.shape[1], input_ids.device
        own = self._get(config, input_ids[:: config.num_return_sequences], attention_mask)
        self._prepared = [(p, any(_same(p, q) for q in own)) for p in prepared]

    def row(self, index: int, ids: Sequence[int], keep: bool) -> RowProcessors:
        """Processors of the row ``index`` with the unpadded prompt ``ids``."""
        config = copy.copy(self._config)
        padding = self._length - len(ids)
        config.max_length = config.max_length - padding
        config.min_length = max((config.min_length or 0) - padding, 0)
        own = self._get(config, torch.tensor([ids], device=self._device), None)
        stateless = _list([p for p in own if "Watermark" not in type(p).__name__])
        return RowProcessors(_list(self._in_order(own, index)), stateless, keep)

    def _in_order(self, own: Any, index: int) -> list[Any]:
        """The prepared list, in whose order it counts, with the row's ``own`` in their places."""
        kinds = {type(p): p for p in own}
        row = [kinds.get(type(p)) if known else _for_row(p, index) for p, known in self._prepared]
        return [p for p in row if p is not None]

    def _get(self, config: Any, ids: Tensor, mask: Tensor | None) -> Any:
        return self._model._get_logits_processor(
            config,
            input_ids_seq_length=ids.shape[1],
            encoder_input_ids=ids,
            logits_processor=_list([]),
            device=ids.device,
            model_kwargs={"attention_mask": mask},
        )


class RowCriterion:
    """A stopping criterion of transformers as a function of one row's tokens."""

    def __init__(self, criterion: Any) -> None:
        self._criterion = criterion

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the row ends here."""
        return bool(torch.as_tensor(self._criterion(torch.tensor([list(tokens)]), None)).all())


def split_criteria(criteria: Any) -> tuple[int | None, list[int], list[RowCriterion]]:
    """The longest padded length, the end-of-sequence ids, and all other criteria."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    ends = [t for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.tolist()]
    known = (EosTokenCriteria, MaxLengthCriteria)
    others = [RowCriterion(c) for c in criteria if not isinstance(c, known)]
    return min(lengths, default=None), ends, others


def _apply(processors: Any, tokens: Sequence[int], scores: Tensor) -> Tensor:
    ids = torch.tensor([list(tokens)], device=scores.device)
    return processors(ids, scores[None].clone())[0]


def _for_row(processor: Any, index: int) -> Any:
    """A processor that asks for the place in the batch is told the row's."""
    from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

    if not isinstance(processor, PrefixConstrainedLogitsProcessor):
        return processor
    allowed, beams = processor._prefix_allowed_tokens_fn, processor._num_beams
    return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(index, ids), beams)


def _list(processors: Sequence[Any]) -> Any:
    from transformers.generation.logits_process import LogitsProcessorList

    return LogitsProcessorList(processors)


def _same(a: Any, b: Any) -> bool:
    """Whether two processors are of one kind and hold the same values."""
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    return all(_equal(x, vars(b)[name]) for name, x in vars(a).items())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)
