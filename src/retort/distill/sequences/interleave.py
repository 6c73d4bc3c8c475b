"""Speculative KD: student drafts, teacher verifies, token by token (SKD, arXiv 2410.11325, alg. 1).

A token of the student stands where it is among the teacher's K likeliest; the first that is not
is replaced by a token of the teacher, drawn from its distribution (or its likeliest, where the
student does not sample either), and the student goes on from there. Tokens after a replaced one
are thrown away, so the text never depends on how many are drafted at once when it is greedy.

On the engine: the student proposes a block of every row, the teacher reads all blocks in one
packed pass, and each row is rewound to its own first replaced token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from retort.decode.engine import Engine
from retort.decode.outputs import require_whole
from retort.decode.packed import PackedModel
from retort.decode.sampling import RESAMPLE, draw
from retort.distill.sequences.scrg import Text
from retort.distill.signals import log_probabilities

BLOCK = 5
"""γ of the paper: tokens that the student proposes at once."""


class Interleaver:
    """Finishes texts that the student began, in held rows of ``engine``.

    Args:
        engine: the student's, built with ``tape="completion"``.
        teacher: the teacher's packed model; its rows are opened and freed here.
        end_tokens: ids that end a text.
        top_k: K, how far down the teacher's list a token may stand.
        do_sample: draw the teacher's token; its likeliest otherwise.
        block: γ, tokens proposed at once.

    Attributes:
        judged, replaced: tokens that the teacher looked at, and those that it replaced.
        teacher_tokens: tokens that went through the teacher.
    """

    def __init__(
        self,
        engine: Engine,
        teacher: PackedModel,
        end_tokens: Sequence[int],
        top_k: int,
        do_sample: bool = True,
        block: int = BLOCK,
    ) -> None:
        self.engine, self.teacher, self.end_tokens = engine, teacher, set(end_tokens)
        self.top_k, self.do_sample, self.block = top_k, do_sample, block
        models = (engine.model, teacher.model)
        self.width = min(m.config.get_text_config().vocab_size for m in models)
        self.judged = self.replaced = 0
        self.teacher_seconds = 0.0

    @property
    def teacher_tokens(self) -> int:
        """Tokens that the teacher has read."""
        return self.teacher.forward_tokens

    def finish(self, texts: Sequence[Text], seeds: Sequence[int]) -> None:
        """Judge and extend ``texts`` in place until each ends; ``seeds`` are the noise of each."""
        rows = [self.teacher.add_row() for _ in texts]
        work = [_Work(t, r, s) for t, r, s in zip(texts, rows, seeds, strict=True)]
        try:
            while work:
                self._judge(work)
                work = [w for w in work if self._may_grow(w.text)]
                self._propose([w.text for w in work])
        finally:
            for row in rows:
                self.teacher.free_row(row)

    def _may_grow(self, text: Text) -> bool:
        return len(text.tokens) < text.limit and text.tokens[-1] not in self.end_tokens

    def _propose(self, texts: Sequence[Text]) -> None:
        """Let the student write the next block of each text."""
        waiting = {text.request_id: text for text in texts}
        for text in texts:
            kept = len(text.prompt) + len(text.tokens) - 1
            room = min(self.block, text.limit - len(text.tokens))
            self.engine.rewind(text.request_id, kept, text.tokens[-1:], max_new_tokens=room)
        while waiting:
            for output in require_whole(self.engine.step()):
                waiting.pop(output.request_id).tokens = list(output.token_ids)

    def _judge(self, work: Sequence[_Work]) -> None:
        feeds, keep = [], []
        for each in work:
            start = len(each.text.prompt) + each.stands - 1
            self.teacher.rewind(each.row, min(start, self.teacher.length(each.row)))
            sequence = [*each.text.prompt, *each.text.tokens]
            feeds.append((each.row, sequence[self.teacher.length(each.row) : -1]))
            keep.append(len(each.text.tokens) - each.stands)
        started = time.perf_counter()
        parts = self.teacher.forward(feeds, keep).split(keep)
        self.teacher_seconds += time.perf_counter() - started
        for each, logits in zip(work, parts, strict=True):
            self._correct(each, log_probabilities(logits, self.width))

    def _correct(self, each: _Work, log_probs: Tensor) -> None:
        """Keep tokens up to the first that the teacher replaces."""
        proposed = torch.tensor(each.text.tokens[each.stands :], device=log_probs.device)
        better = (log_probs > log_probs.gather(1, proposed[:, None])).sum(1)
        wrong = (better >= self.top_k).nonzero()[:, 0].tolist()
        if wrong:
            place = each.stands + wrong[0]
            token = self._teachers_token(log_probs[wrong[0]], each.seed, place)
            each.text.tokens = [*each.text.tokens[:place], token]
            self.replaced += 1
        self.judged += len(each.text.tokens) - each.stands
        each.stands = len(each.text.tokens)

    def _teachers_token(self, log_probs: Tensor, seed: int, place: int) -> int:
        if not self.do_sample:
            return int(log_probs.argmax())
        return int(draw(log_probs.double(), seed, place, RESAMPLE))


class _Work:
    """A text in the making: its row at the teacher, its noise, and how many tokens stand."""

    def __init__(self, text: Text, row: int, seed: int) -> None:
        self.text, self.row, self.seed, self.stands = text, row, seed, 0
