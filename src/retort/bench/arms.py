"""Ways of decoding that ``retort bench decode`` compares, by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retort.decode.draft import DraftContext
from retort.decode.engine import Engine
from retort.decode.padded import PaddedEngine
from retort.evaluate.decoding import Arm, Measurement, Tokens, grouped_arm

LOOKUP = "prompt-lookup"
DRAFT_MODEL = "draft-model"  # stands for the model that --draft-model names


class Hopeless:
    """Proposes seven tokens that are always wrong, and promises much: what does failing cost?"""

    passes = False

    def propose(self, contexts: Sequence[DraftContext]) -> list[list[int]]:
        """The last token again and again; greedy text has none of these runs."""
        return [[c.tokens[-1]] * min(c.limit, 7) for c in contexts]

    def release(self, request_id: str) -> None:
        """Nothing was kept."""


def hopeless_model(target: Any) -> Any:
    """An untrained model of a tenth of the target's depth, with its vocabulary."""
    from retort.models.dense_retnet import DenseRetNetConfig, DenseRetNetForCausalLM

    torch.manual_seed(0)
    config = DenseRetNetConfig(
        vocab_size=target.config.vocab_size, hidden_size=128, num_hidden_layers=2,
        query_key_dim=64, num_attention_heads=2,
    )  # fmt: skip
    return DenseRetNetForCausalLM(config).eval()


Options = dict[str, Any]
ENGINES: dict[str, tuple[type[Engine], Options]] = {
    "plain": (Engine, {}),
    "plain again": (Engine, {}),  # how far two equal arms lie apart
    "plain fp32 weights": (Engine, {"weight_storage": "float32"}),
    "plain torch": (Engine, {"cpu_backend": "torch"}),
    "auto": (Engine, {"drafter": LOOKUP}),
    "auto fp32 weights": (Engine, {"drafter": LOOKUP, "weight_storage": "float32"}),
    "hopeless": (Engine, {"drafter": Hopeless}),
    "hopeless model": (Engine, {"drafter": hopeless_model}),
    "draft model": (Engine, {"drafter": DRAFT_MODEL}),
    "draft model k=4": (Engine, {"drafter": DRAFT_MODEL, "draft_budget": 4}),
    **{f"unpadded k={k}": (Engine, {"drafter": LOOKUP, "draft_budget": k}) for k in (1, 2, 4, 7)},
    # The padded method runs layer by layer in PyTorch: this is the arm that differs in padding only
    "unpadded k=7 unfused": (
        Engine,
        {"drafter": LOOKUP, "draft_budget": 7, "fuse_layers": False},
    ),
    "padded k=7": (PaddedEngine, {"drafter": LOOKUP, "draft_budget": 7}),
    "padded cache only": (
        PaddedEngine,
        {"drafter": LOOKUP, "draft_budget": 7, "pad_input": False},
    ),
    "padded input only": (
        PaddedEngine,
        {"drafter": LOOKUP, "draft_budget": 7, "pad_cache": False},
    ),
}
TRANSFORMERS = ("transformers", "transformers assisted", "transformers continuous")
ARMS = (*ENGINES, *TRANSFORMERS)


def weights_of(name: str) -> tuple:
    """Arms of which this is equal decode on one model's packed weights.

    Two copies of the same weights differ in speed by up to a tenth, as memory lies.
    """
    engine_class, options = ENGINES[name]
    fused = engine_class is Engine and options.get("fuse_layers", True)
    return fused, options.get("weight_storage"), options.get("cpu_backend")


def drafts_by_model(name: str) -> bool:
    """Whether the arm needs a draft model of the user's."""
    return name in ENGINES and ENGINES[name][1].get("drafter") == DRAFT_MODEL


def build_engine(
    model: Any, name: str, max_batch_size: int, prefix_tokens: int = 0, draft_model: Any = None
) -> Engine:
    """The engine of an arm; see `Engine` for ``prefix_tokens``."""
    engine_class, options = ENGINES[name]
    if prefix_tokens and engine_class is Engine:
        options = {**options, "prefix_cache_tokens": prefix_tokens}
    drafter = options.get("drafter")
    if drafter is Hopeless:
        drafter = Hopeless()
    elif drafter == DRAFT_MODEL:
        drafter = draft_model
    elif callable(drafter):
        drafter = drafter(model)
    given = {**options, "drafter": drafter}
    return engine_class(model, max_batch_size=max_batch_size, release_weights=True, **given)


def transformers_arm(model: Any, name: str) -> Arm:
    """transformers' own decoding; its decoding time is a whole call less a call for one token."""
    calls = {
        "transformers": _generate,
        "transformers assisted": _assisted,
        "transformers continuous": _continuous,
    }
    call = calls[name]

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Measurement:
        first = _timed(call, model, prompts, 1)[1]
        rows, total = _timed(call, model, prompts, max_new_tokens)
        rows = [_cut(row, model) for row in rows]
        return Measurement(rows, sum(map(len, rows)) - len(rows), total - first, total)

    return grouped_arm(run)


def _timed(
    call: Callable, model: Any, prompts: Sequence[Sequence[int]], new: int
) -> tuple[Tokens, float]:
    started = time.perf_counter()
    rows = call(model, prompts, new)
    return rows, time.perf_counter() - started


def _generate(model: Any, prompts: Sequence[Sequence[int]], new: int, **options: Any) -> Tokens:
    """`model.generate` on the left-padded batch."""
    ids, mask = _left_padded(prompts)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options
    )
    return [row.tolist() for row in out[:, ids.shape[1] :]]


def _assisted(model: Any, prompts: Sequence[Sequence[int]], new: int) -> Tokens:
    """transformers' prompt lookup, which takes one prompt at a time."""
    return [_generate(model, [p], new, prompt_lookup_num_tokens=7)[0] for p in prompts]


def _continuous(model: Any, prompts: Sequence[Sequence[int]], new: int) -> Tokens:
    """transformers' continuous batching."""
    from transformers import GenerationConfig

    eos = model.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=_first(eos)
    )
    outputs = model.generate_batch(inputs=list(map(list, prompts)), generation_config=config)
    by_prompt = {tuple(o.prompt_ids): o.generated_tokens for o in outputs.values()}
    return [list(by_prompt[tuple(p)]) for p in prompts]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def _cut(row: list[int], model: Any) -> list[int]:
    """The row up to and with its first end-of-sequence token."""
    eos = model.generation_config.eos_token_id
    stops = {eos} if isinstance(eos, int) else set(eos)
    return next((row[: i + 1] for i, t in enumerate(row) if t in stops), row)


def _first(ids: int | Sequence[int]) -> int:
    return ids if isinstance(ids, int) else ids[0]
