"""Numbers of a language-model run: perplexities that compare, throughput, time that is left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


def perplexities(nll: float, tokens: int, size: tuple[int, int] | None = None) -> dict[str, float]:
    """Evaluation numbers from the summed −log p (nats) of ``tokens`` tokens.

    Args:
        nll: sum over all predicted tokens, the end token of each text among them.
        tokens: how many they are.
        size: bytes (UTF-8) and words of the same texts. With them come ``bits_per_byte`` and
            ``word_perplexity`` = exp(nll / words), which compare over tokenizers.
    """
    mean = nll / max(tokens, 1)
    found = {"loss": mean, "perplexity": _exp(mean), "tokens": float(tokens)}
    if size is not None:
        count_bytes, words = size
        found["bits_per_byte"] = nll / math.log(2) / max(count_bytes, 1)
        found["word_perplexity"] = _exp(nll / max(words, 1))
    return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


class Throughput:
    """Seconds and tokens of training steps, without evaluation and saving."""

    def __init__(self) -> None:
        self.seconds = self._since = 0.0
        self._tokens = self._first = 0
        self._started = perf_counter()

    def begin(self, step: int) -> None:
        """A run starts, or goes on, at ``step``."""
        self._started, self._first = perf_counter(), step

    @contextmanager
    def measure(self, tokens: int) -> Iterator[None]:
        """Count what runs inside as training on ``tokens`` tokens."""
        started = perf_counter()
        yield
        spent = perf_counter() - started
        self.seconds += spent
        self._since += spent
        self._tokens += tokens

    def take(self, step: int, max_steps: int) -> dict[str, float]:
        """Tokens a second since the last call, and the seconds that are left by the clock."""
        rate = self._tokens / self._since if self._since else 0.0
        self._since, self._tokens = 0.0, 0
        a_step = (perf_counter() - self._started) / max(step - self._first, 1)
        return {"tokens_per_second": rate, "eta_seconds": a_step * (max_steps - step)}
