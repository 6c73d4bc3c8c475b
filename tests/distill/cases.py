"""Random rows for the loss tests: one signal as Retort's type and as the reference's dict."""

from dataclasses import dataclass

import torch

from retort.distill.losses import IGNORED, TokenRows
from retort.distill.signals import DenseSignal, Signal

SHAPES = [(7, 23, 19), (5, 17, 21), (1, 11, 11), (1, 9, 13)]  # rows, teacher's and student's V
KINDS = [None, 1, 5]  # dense, or the K of a top-k signal


@dataclass
class Case:
    signal: Signal
    naive: dict
    logits: torch.Tensor
    targets: torch.Tensor
    pairs: torch.Tensor
    width: int

    def rows(self, temperature=1.0):
        return TokenRows(self.logits, self.targets, self.signal, self.pairs, temperature)


def random_case(shape, k=None, seed=0, dtype=torch.float64, sharpness=2.0):
    """k None: a dense signal. About a third of the rows do not count."""
    generator = torch.Generator().manual_seed(seed)
    rows, teacher_v, student_v = shape
    teacher = sharpness * torch.randn(rows, teacher_v, generator=generator, dtype=dtype)
    logits = sharpness * torch.randn(rows, student_v, generator=generator, dtype=dtype)
    width = min(teacher_v, student_v)
    targets = torch.randint(0, width, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = IGNORED
    pairs = torch.rand(rows, generator=generator) < 0.6
    signal, naive = _signals(teacher, k)
    return Case(signal, naive, logits.requires_grad_(), targets, pairs, width)


def _signals(teacher, k):
    dense = DenseSignal(teacher)
    if k is None:
        return dense, {"logits": teacher}
    top = dense.top_k(k)
    naive = {"indices": top.indices, "log_probs": top.log_probs_kept}
    return top, naive | {"log_tail": top.log_tail, "vocab": top.vocab_size}


def assert_same(value, reference, parameter, tolerance=1e-10):
    """Equal value and equal gradient with respect to `parameter`."""
    torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance)
    if not reference.requires_grad:
        assert not torch.autograd.grad(value, parameter)[0].any()
        return
    pair = [torch.autograd.grad(total, parameter)[0] for total in (value, reference)]
    torch.testing.assert_close(pair[0], pair[1], rtol=tolerance, atol=tolerance)
