"""The engine: many requests decode together, each row on its own clock.

Here is what callers see; a step is in `retort.decode.step`, requests end in
`retort.decode.roster`, their rows come and go in `retort.decode.seats`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from retort.decode.admission import Admission, Prompt, check_params, check_row, is_single
from retort.decode.budget import build_budget
from retort.decode.drafting import DEFAULT, Drafting
from retort.decode.outputs import chunk
from retort.decode.pace import PrefillPace
from retort.decode.packed import PackedModel
from retort.decode.params import SamplingParams
from retort.decode.prefixes import PrefixCache
from retort.decode.request import Chunk, Request, RequestOutput
from retort.decode.roster import Roster
from retort.decode.scheduler import Scheduler
from retort.decode.stats import EngineStats
from retort.decode.step import Step
from retort.decode.support import check_supported
from retort.decode.verify import RULES
from retort.errors import ConfigurationError


class Engine:
    """Decode many prompts at once, losslessly faster with a drafter.

    Args:
        model: a transformers causal language model (or DenseRetNet); it is unchanged afterwards.
        tokenizer: its tokenizer; not needed for prompts given as ids.
        drafter: None, "prompt-lookup", a model name, folder or module, or a `Drafter`; a mapping
            of names to these offers several, the first by default.
        max_batch_size: rows that decode at once; more prompts wait.
        draft_budget: "auto" lets each row's draft length follow what pays, 0 included; "counts"
            does so without a clock; a number fixes it.
        verification: how drafts of sampled rows are judged: "coupled" (the same text as without
            drafts) or "rejection" (the same distribution), see `retort.decode.sampling`.
        tape: for recurrent models, "draft" or "completion": how far a row can be rewound.
        cpu_backend: "auto", "native" or "torch", see `PackedModel`.
        release_weights: keep packed weights only while the engine lives, so that memory does not
            double; `from_pretrained` does so.
        weight_storage, fuse_layers: how the native core keeps weights, and whether it runs whole
            decoder layers, see `PackedModel`.
        max_prefill_tokens: prompt tokens that one pass reads beside the decoding rows.
        prefill_stretch: how much longer a pass of decoding rows may take for reading prompts beside
            them, such as 2; prompts are then read in smaller slices. None reads as many tokens as
            ``max_prefill_tokens`` says.
        max_cached_tokens: tokens that the rows in work may hold together, drafts included; the
            youngest rows make room and go on later. Held rows do not count.
        prefix_cache_tokens: tokens of prompts (and of finished rows) whose cache entries are kept,
            so that rows which begin alike do not read them again; 0 keeps none, see
            `retort.decode.prefixes`. Call ``engine.prefixes.clear()`` after changing weights.
        debug: check the caches whenever the engine is idle, fill what rows left behind with NaN,
            and record what is scheduled.

    Raises:
        UnsupportedModelError: the model's architecture is not handled; nothing was changed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        drafter: Any = None,
        max_batch_size: int = 16,
        draft_budget: Any = "auto",
        verification: str = "coupled",
        tape: str = "draft",
        cpu_backend: str = "auto",
        max_prefill_tokens: int = 512,
        prefill_stretch: float | None = None,
        max_cached_tokens: int | None = None,
        prefix_cache_tokens: int = 0,
        release_weights: bool = False,
        weight_storage: str = "auto",
        fuse_layers: bool = True,
        debug: bool = False,
    ) -> None:
        if verification not in RULES:
            raise ConfigurationError(f"verification={verification!r} must be one of {RULES}")
        self.verification, self.debug = verification, debug
        self.model, self.tokenizer = model, tokenizer
        self._admission = Admission(model, tokenizer)
        self.budget = build_budget(draft_budget)
        self.scheduler = Scheduler(
            max_batch_size, max_prefill_tokens, max_cached_tokens, self.budget.max_draft, debug
        )
        pace = PrefillPace(max_prefill_tokens, prefill_stretch)
        self.target = self._build_target(
            tape=tape,
            cpu_backend=cpu_backend,
            release_weights=release_weights,
            weight_storage=weight_storage,
            fuse_layers=fuse_layers,
        )
        try:
            self.prefixes = PrefixCache(self.target.cache, prefix_cache_tokens)
            self.drafting = Drafting(drafter, self.target, self.budget, verification == "coupled")
        except BaseException:
            self.target.close()
            raise
        self._step = Step(
            self.target, self.scheduler, self.drafting, self.prefixes, pace, verification
        )
        self._roster = Roster(
            self._step, self.target, self.scheduler, self.prefixes, self._admission, debug
        )
        self._count = 0

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        *,
        dtype: str = "float32",
        device: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Engine:
        """Load a zoo name, hub id or folder, refusing what is not supported before any weight."""
        from retort.models.zoo import load_config, load_model, load_tokenizer

        check_supported(load_config(model_name_or_path, trust_remote_code=trust_remote_code))
        model: Any = load_model(
            model_name_or_path, dtype, device=device, trust_remote_code=trust_remote_code
        )
        tokenizer = load_tokenizer(model_name_or_path, trust_remote_code=trust_remote_code)
        options.setdefault("release_weights", True)
        return cls(model, tokenizer, **options)

    @property
    def stats(self) -> EngineStats:
        """Counters since the engine was built; assign new ones to count from here on."""
        return self._step.stats

    @stats.setter
    def stats(self, fresh: EngineStats) -> None:
        self._step.stats = fresh

    # One call for many prompts
    def generate(
        self, prompts: Any, *, drafter: str | None = DEFAULT, **sampling: Any
    ) -> list[RequestOutput]:
        """Complete prompts and return outputs in their order, ``n`` of each prompt together.

        Args:
            prompts: a prompt or a list of them: text, token ids, or chat messages.
            drafter: name of one of the engine's drafters; None decodes plainly.
            sampling: fields of `SamplingParams`, or ``params=SamplingParams(...)``.
        """
        ids = self._add_all(prompts, sampling, drafter)
        for rid in ids:
            self._roster.requests[rid].together = True
        outputs: dict[str, RequestOutput] = {}
        try:
            while len(outputs) < len(ids):
                outputs |= {o.request_id: o for o in self._roster.advance(ids)}
        finally:
            self._abandon(ids)
        return [outputs[i] for i in ids]

    def stream(
        self, prompts: Any, *, drafter: str | None = DEFAULT, **sampling: Any
    ) -> Iterator[Chunk]:
        """Complete prompts and give text as soon as it is certain; rows interleave.

        A chunk's index is the place of its output in what `generate` would return.
        """
        ids = self._add_all(prompts, sampling, drafter)
        sent = {rid: len(self._roster.requests[rid].prompt) for rid in ids}
        order = {rid: index for index, rid in enumerate(ids)}
        live = [self._roster.requests[rid] for rid in ids]
        try:
            while live:
                self._roster.advance(ids)
                yield from (c for r in live if (c := chunk(r, order[r.id], sent)) is not None)
                live = [r for r in live if r.finish_reason is None]
        finally:
            self._abandon(ids)

    # Request by request
    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        hold: bool = False,
        request_id: str | None = None,
        drafter: str | None = DEFAULT,
        sample: int = 0,
        prefix_group: str = "",
    ) -> str:
        """Queue a prompt and return its id.

        Args:
            hold: keep the row after it finishes, for `rewind`; let it go with `release`.
            drafter: name of one of the engine's drafters; None decodes this request plainly.
            sample: which of the ``params.n`` samples this one request is; each has its own noise.
            prefix_group: kept prefixes are shared within a group only.

        Raises:
            ConfigurationError: the prompt is empty, too long or holds unknown ids; a known id; an
                argument of the wrong kind, which is named.
        """
        request_id = self._free_id() if request_id is None else request_id
        check_row(request_id, sample, prefix_group)
        if request_id in self._roster.requests:
            raise ConfigurationError(f"request id {request_id!r} is already in use")
        params = SamplingParams() if params is None else params
        request = self._admission.request(request_id, self._count, prompt, params, hold)
        request.drafter, request.sample = self.drafting.resolve(drafter), sample
        request.prefix_group = prefix_group
        self.scheduler.check(request_id, request.limit)
        self._roster.requests[request_id] = request
        self._count += 1
        self.scheduler.add(request)
        return request_id

    def has_unfinished(self) -> bool:
        """Whether a step has work to do."""
        return bool(self._roster.finished) or not self.scheduler.idle

    def step(self) -> list[RequestOutput]:
        """Advance every row in work by one pass and return the requests that finished.

        Requests that finished while `generate` or `stream` was at work are returned here too.
        """
        if not self.scheduler.idle or not self._roster.finished:
            self._roster.run_pass()
        finished, self._roster.finished = self._roster.finished, []
        return finished

    def rewind(
        self,
        request_id: str,
        length: int,
        append: Sequence[int] = (),
        max_new_tokens: int | None = None,
    ) -> None:
        """Take a held, finished row back and let it go on from there; no prompt is read again.

        Args:
            length: tokens to keep, prompt included; at least the prompt.
            append: tokens to put after them, before the row goes on; their ``logprobs`` are empty.
            max_new_tokens: most tokens to generate after these.

        Raises:
            ConfigurationError: not a held and finished request, a length outside its text, or
                tokens that the model cannot read; the request stays as it was.
            RewindError: a recurrent row whose tape does not reach back that far.
        """
        request = self._roster.held(request_id)
        append = self._admission.continuation(length, append, max_new_tokens)
        limit = request.limit if max_new_tokens is None else length + len(append) + max_new_tokens
        self.scheduler.check(request_id, limit)
        request.check_kept(length)
        self._step.seats.rewind(request, length if append else length - 1)
        request.reopen(length, append, limit)
        self._admission.limit(request)
        self._admission.replay(request)
        self.scheduler.add(request)

    def release(self, request_id: str) -> None:
        """Let a held row go."""
        request = self._roster.known(request_id)
        if request.finish_reason is None:
            self.abort(request_id)
        else:
            self._roster.free(request)

    def request(self, request_id: str) -> Request:
        """The live state of a request; what it says stays readable after the request finished."""
        return self._roster.known(request_id)

    def row(self, request_id: str) -> int:
        """The row of `target` that holds a request, e.g. to score its text where it lies."""
        return self._roster.known(request_id).row

    def abort(self, request_id: str) -> RequestOutput:
        """Stop a request now and return what it has.

        A function that is called within a pass, such as a stopping criterion, may ask for it, too:
        the request then leaves after the pass, and `step` or `generate` return it like any other.
        """
        return self._roster.abort(request_id)

    def check(self) -> None:
        """Check the caches' integrity between passes.

        Raises:
            RetortError: a cache holds what it should not; that is a fault of Retort.
        """
        self._roster.check()

    def close(self) -> None:
        """Let every row go; the model is as it was given."""
        for request in list(self._roster.requests.values()):
            self._roster.free(request)
        self.target.close()
        self.drafting.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Details
    def _build_target(self, **options: Any) -> PackedModel:
        return PackedModel(self.model, max_draft=max(self.budget.max_draft, 1), **options)

    def _add_all(self, prompts: Any, sampling: dict, drafter: str | None) -> list[str]:
        drafter = self.drafting.resolve(drafter)
        params = sampling.pop("params", None)
        params = SamplingParams.build(**sampling) if params is None else params
        check_params(params)
        many = [prompts] if is_single(prompts) else list(prompts)
        rows = [(ids, i) for ids in map(self._admission.encode, many) for i in range(params.n)]
        added: list[str] = []
        try:
            for ids, i in rows:
                added.append(self.add_request(ids, params, sample=i, drafter=drafter))
        except BaseException:  # all or none
            self._abandon(added)
            raise
        return added

    def _free_id(self) -> str:
        """``request-N``, N being the request's number, or the next that no caller has taken."""
        names = (f"request-{n}" for n in count(self._count))
        return next(name for name in names if name not in self._roster.requests)

    def _abandon(self, ids: Sequence[str]) -> None:
        for rid in ids:
            if rid in self._roster.requests:
                self.abort(rid)
