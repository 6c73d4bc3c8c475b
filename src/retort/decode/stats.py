"""Counters of an engine, with the definitions that servers share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class EngineStats:
    """What an engine did so far.

    Attributes:
        steps: passes of the target.
        row_steps: rows that decoded, summed over passes.
        prompt_tokens, generated_tokens: read and produced.
        drafts: rows and passes in which a draft was verified.
        draft_tokens, accepted_tokens: verified and accepted.
        accepted_per_position: how often the draft's 1st, 2nd, … token was accepted.
        packed_tokens, padding_tokens: tokens through the linear layers, and how many were padding.
        decode_seconds, prefill_seconds: time in passes without and with prompt slices.
        preemptions: rows that had to leave the cache for a while.
        prefix_queries, prefix_hits: prompt tokens that were looked up among the kept prefixes, and
            found there.
    """

    steps: int = 0
    row_steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    packed_tokens: int = 0
    padding_tokens: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted / drafts: tokens that a verified draft yields on average."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else 1.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens a decoding row gains a pass."""
        return self.decode_tokens / self.row_steps if self.row_steps else 0.0

    @property
    def padding_share(self) -> float:
        """Share of padding among the tokens that the linear layers computed."""
        return self.padding_tokens / self.packed_tokens if self.packed_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, prompts excluded."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def record_step(self, seconds: float, rows: int, new: int, prompts: bool) -> None:
        """Count a pass in which ``rows`` decoded ``new`` tokens, with prompt slices or without.

        Only passes without prompt slices tell the decoding speed.
        """
        self.steps += 1
        if prompts:
            self.prefill_seconds += seconds
            return
        self.decode_seconds += seconds
        self.decode_tokens += new
        self.row_steps += rows

    def record_draft(self, length: int, accepted: int) -> None:
        """Count one verified draft."""
        self.drafts += 1
        self.draft_tokens += length
        self.accepted_tokens += accepted
        missing = length - len(self.accepted_per_position)
        self.accepted_per_position += [0] * max(0, missing)
        for position in range(accepted):
            self.accepted_per_position[position] += 1

    def as_dict(self) -> dict:
        """All counters and the ratios derived from them."""
        ratios = ("mean_acceptance_length", "tokens_per_step", "padding_share", "tokens_per_second")
        return asdict(self) | {name: getattr(self, name) for name in ratios}
