"""How much memory a training step takes, worked out on the meta device: no weight is allocated.

Sizes are bytes of one process. What is counted: the student's parameters, gradients and AdamW
states (spread over processes by FSDP2), the layer that is gathered at a time, the teacher (whole in
each process, or nothing where its signal was captured), the rollout copy of a sharded student, its
cache of keys and values, saved activations, and the logits of one chunk of the loss. The
allocator's waste and libraries' workspaces are not: plan for a tenth more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

LOGITS_COPIES = 8
"""[ours] float32 tensors of a chunk's [tokens, V] that live at once in the widest of our losses:
logits and log-probabilities of both models, and their gradients."""


@dataclass(frozen=True)
class Workload:
    """What a step does in one process.

    Attributes:
        rows: sequences of one batch; ``tokens`` of each, prompt and completion.
        chunk: tokens whose logits exist at once (`loss_chunk_size`).
        rollout_rows: rows that the student writes at once; 0 where it writes nothing.
        processes: over which the student is sharded; 1: not at all.
        gradient_checkpointing: keep a layer's input only.
    """

    rows: int
    tokens: int
    chunk: int = 128
    rollout_rows: int = 0
    processes: int = 1
    gradient_checkpointing: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process, by use."""

    parameters: int
    gradients: int
    optimizer: int
    gathered_layer: int
    teacher: int
    rollout_copy: int
    rollout_cache: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All of them; writing and training do not overlap, but caches of memory may keep both."""
        return sum(getattr(self, each.name) for each in fields(self))


def on_meta(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal language model of ``config`` without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).to(dtype)


def plan(student: Any, teacher: Any | None, work: Workload) -> MemoryPlan:
    """The memory of one process; ``student`` and ``teacher`` may lie on the meta device.

    Parameters of the student that do not require gradients (LoRA's base) have no gradient and no
    optimiser state. ``teacher`` None: its signal was captured. Gradients and AdamW's two moments
    have the parameters' own type.
    """
    parts, sharded = work.processes, work.processes > 1
    trained = _bytes(p for p in student.parameters() if p.requires_grad)
    weights = _bytes(student.parameters())
    cache = rollout_cache(student.config, work, _itemsize(student)) if work.rollout_rows else 0
    return MemoryPlan(
        parameters=_share(weights, parts),
        gradients=_share(trained, parts),
        optimizer=_share(2 * trained, parts),
        gathered_layer=largest_layer(student) if sharded else 0,
        teacher=0 if teacher is None else _bytes(teacher.parameters()),
        rollout_copy=weights if sharded and work.rollout_rows else 0,
        rollout_cache=cache,
        activations=activations(student, work),
        loss=LOGITS_COPIES * min(work.chunk, work.rows * work.tokens) * _vocabulary(student) * 4,
    )


def activations(student: Any, work: Workload) -> int:
    """Bytes that autograd keeps between a forward and its backward, without the loss.

    Counted by running the forward on the meta device. With checkpointing each layer keeps its
    input, and one layer at a time everything.
    """
    text = student.config.get_text_config()
    inputs = work.rows * work.tokens * text.hidden_size * _itemsize(student)
    whole = saved_bytes(student, work.rows, work.tokens)
    if not work.gradient_checkpointing:
        return whole
    return inputs * text.num_hidden_layers + whole // text.num_hidden_layers


def saved_bytes(student: Any, rows: int, tokens: int) -> int:
    """Bytes of the storages that a forward saves for its backward, weights left out.

    As if every weight were trained: adapters on frozen weights read the same activations.
    """
    weights = {p.untyped_storage()._cdata for p in student.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, or its address may come again
        return tensor

    device = student.device
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    mask = None
    if not hasattr(student, "new_row_cache"):  # transformers would look into its own mask's values
        mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    with _trained(student), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(size for size, _ in kept.values())


def rollout_cache(config: Any, work: Workload, itemsize: int) -> int:
    """Keys and values of the rows that are written at once.

    For recurrent layers: the float32 state of each row and, for revision, a tape of keys and values
    of its whole text.
    """
    text = config.get_text_config()
    layers, tokens = text.num_hidden_layers, work.rollout_rows * work.tokens
    if hasattr(text, "query_key_dim"):
        values = int(text.hidden_size * getattr(text, "v_factor", 1))
        state = text.query_key_dim * values // text.num_attention_heads
        return 4 * layers * (work.rollout_rows * state + tokens * (text.query_key_dim + values))
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * layers * heads * width * tokens * itemsize


def largest_layer(model: Any) -> int:
    """Bytes of the largest group that FSDP2 gathers: a decoder layer, or embedding and head."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = _bytes(p for p in model.parameters() if id(p) not in inside)
    return max([rest, *(_bytes(layer.parameters()) for layer in layers)])


@contextmanager
def _trained(model: nn.Module) -> Iterator[None]:
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _share(size: int, parts: int) -> int:
    return -(-size // parts)


def _itemsize(model: Any) -> int:
    return next(model.parameters()).element_size()


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config().vocab_size
