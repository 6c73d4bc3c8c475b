"""How often a teacher would accept its student's drafts: α = mean over tokens of Σ min(p, q).

With speculative sampling a draft token drawn from the student's q is accepted with probability
Σ_v min(p(v), q(v)) (Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via
Speculative Decoding", section 3.3). It is measured here under teacher forcing on the tokens of
given completions, in float32, a chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retort.errors import ConfigurationError
from retort.evaluate.predictions import Example, predict


@dataclass(frozen=True)
class Acceptance:
    """α over all completion tokens.

    ``agreement`` is the share of tokens at which both models have the same most likely token,
    which is what greedy verification accepts; ``per_example`` is each example's own α.
    """

    rate: float
    agreement: float
    tokens: int
    per_example: tuple[float, ...]

    def tokens_per_step(self, draft_length: int) -> float:
        """Expected tokens a step with ``draft_length`` drafts, by `expected_tokens_per_step`."""
        return expected_tokens_per_step(self.rate, draft_length)


def overlap(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Σ_v min(p_t, p_s) of each token: logits ``[..., V]`` to float32 ``[...]`` in [0, 1].

    Models that pad one vocabulary differently are compared on the width they share. float64
    logits are kept in float64.
    """
    width = min(teacher_logits.shape[-1], student_logits.shape[-1])
    p_t, p_s = (_probabilities(logits[..., :width]) for logits in (teacher_logits, student_logits))
    return torch.minimum(p_t, p_s).sum(-1)


def acceptance(
    teacher: nn.Module, student: nn.Module, examples: Sequence[Example], chunk_size: int = 128
) -> Acceptance:
    """Measure α on the completions of ``examples`` (prompt token ids, completion token ids).

    Both models see the same tokens; at most ``chunk_size`` rows of logits of each model exist at
    a time. Raises `ConfigurationError` for no examples, or naming the one that lacks a prompt or a
    completion.
    """
    _check(examples)
    per_token = [_example_overlap(teacher, student, each, chunk_size) for each in examples]
    alphas, agreements = (torch.cat(parts) for parts in zip(*per_token, strict=True))
    return Acceptance(
        rate=alphas.mean().item(),
        agreement=agreements.mean().item(),
        tokens=alphas.numel(),
        per_example=tuple(alpha.mean().item() for alpha, _ in per_token),
    )


def expected_tokens_per_step(alpha: float, draft_length: int) -> float:
    """(1 − α^{k+1}) / (1 − α): what a step with k drafts yields (Leviathan et al., eq. 1).

    It assumes that each draft is accepted with probability α independently of the others.
    Raises `ConfigurationError` for α outside [0, 1] or a negative k.
    """
    if not 0.0 <= alpha <= 1.0 or draft_length < 0:
        raise ConfigurationError(
            f"acceptance must lie in [0, 1] and the draft length be 0 or more, got {alpha} and "
            f"{draft_length}"
        )
    return sum(alpha**i for i in range(draft_length + 1))  # the same sum, exact at α = 1 too


def break_even(step_cost: float, draft_length: int) -> float | None:
    """The α from which drafting pays: `expected_tokens_per_step` of it is ``step_cost``.

    ``step_cost`` is the time of a step with ``draft_length`` drafts, drafting and verification
    together, in steps without any: 1 + k·c where verification is free and a draft costs c
    (Leviathan et al., theorem 3.8). None where even α = 1 does not pay; 0 where the step is no
    dearer than a plain one. Raises `ConfigurationError` for a draft length below 1.
    """
    if draft_length < 1:
        raise ConfigurationError(f"break_even needs at least one draft, got {draft_length}")
    if step_cost > draft_length + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        pays = expected_tokens_per_step(middle, draft_length) >= step_cost
        low, high = (low, middle) if pays else (middle, high)
    return high if step_cost > 1 else 0.0


def _check(examples: Sequence[Example]) -> None:
    if not examples:
        raise ConfigurationError("acceptance needs at least one prompt with a completion, got none")
    for index, (prompt, completion) in enumerate(examples):
        if not len(prompt) or not len(completion):
            raise ConfigurationError(
                f"example {index} has {len(prompt)} prompt tokens and {len(completion)} completion "
                "tokens: acceptance needs at least one of each"
            )


def _example_overlap(
    teacher: nn.Module, student: nn.Module, example: Example, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """α and argmax agreement of each completion token, float ``[N]`` on the CPU."""
    prompt, completion = example
    ids = [*prompt, *completion]
    of_teacher = predict(teacher, ids, len(prompt))
    of_student = predict(student, ids, len(prompt))
    alphas, agreements = [], []
    with torch.no_grad():
        for t, s in zip(of_teacher.chunks(chunk_size), of_student.chunks(chunk_size), strict=True):
            s = s.to(t.device)
            alphas.append(overlap(t, s).cpu())
            agreements.append((t.argmax(-1) == s.argmax(-1)).float().cpu())
    return torch.cat(alphas), torch.cat(agreements)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
