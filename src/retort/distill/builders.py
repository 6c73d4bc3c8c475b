"""Students built around a teacher: its embedding, head and norms, and on request its layers.

A student as wide as its teacher copies embedding and head. A narrower one takes their best
approximation of that rank [ours]: with P the leading right singular vectors of both, E P and H P,
so that its few dimensions are those in which the teacher's tokens differ most.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from retort.distill.init import cut_layers, evenly_spaced
from retort.errors import ConfigurationError

NORM_SCALE = 0.1
"""[ours] A new student's states are nearly its token's own embedding, for which a trained head is
sure of the wrong token (loss 49 on SmolLM2 instead of 10.8 for a guess). Scaled down, training
starts from a guess: 7.5 instead of 9.4 after 40 steps; 0.03 and 0.3 are no better [measured]."""


def dense_retnet_student(
    teacher: Any, layers: int, warm_start: bool = False, **overrides: Any
) -> Any:
    """A DenseRetNet with the teacher's embedding, head and final norm.

    Embedding and head are tied where the teacher's are. [ours] The final norm is copied too,
    because the head was trained behind it, and scaled by `NORM_SCALE`. Other weights start at
    random (torch's global generator), or with ``warm_start`` as `warm_start_layers` says.

    Args:
        teacher: a causal language model.
        layers: retention layers.
        warm_start: begin with evenly spaced layers of the teacher.
        **overrides: values of `DenseRetNetConfig`; a smaller ``hidden_size`` narrows the student.

    Raises:
        ConfigurationError: an override is unknown, or does not fit the teacher.
    """
    from retort.models.dense_retnet import DenseRetNetConfig, DenseRetNetForCausalLM

    _check_known(overrides, DenseRetNetConfig())
    config = teacher.config.get_text_config()
    values = _retnet_values(config, layers, overrides.get("hidden_size"))
    if warm_start:
        values |= _warm_values(teacher)
    student = DenseRetNetForCausalLM(DenseRetNetConfig(**{**values, **overrides}))
    _finish(teacher, student, student.model.norm, 1.0 if warm_start else NORM_SCALE)
    if warm_start:
        warm_start_layers(teacher, student)
    return student.eval()


def dense_mamba_student(
    teacher: Any, layers: int, warm_start: bool = False, **overrides: Any
) -> Any:
    """A DenseMamba with the teacher's embedding, head and final norm (`dense_retnet_student`).

    ``warm_start`` needs a Mamba teacher, whose layers are taken as they are: with all of them the
    student is the teacher, since its dense gates start at zero.
    """
    from retort.models.dense_mamba import DenseMambaConfig, DenseMambaForCausalLM

    _check_known(overrides, DenseMambaConfig())
    if warm_start:
        if teacher.config.model_type not in ("mamba", "dense_mamba"):
            raise ConfigurationError(
                f"warm_start: a DenseMamba starts from a Mamba, the teacher is "
                f"{teacher.config.model_type!r}; use student_type 'dense_retnet', or leave it out"
            )
        cut = cut_layers(teacher, layers)
        student = DenseMambaForCausalLM.from_mamba(cut, **overrides)
        student.generation_config.eos_token_id = teacher.generation_config.eos_token_id
        return student.eval()
    values = _shared_values(teacher.config.get_text_config(), layers) | overrides
    student = DenseMambaForCausalLM(DenseMambaConfig(**values))
    _finish(teacher, student, student.backbone.norm_f, NORM_SCALE)
    return student.eval()


# Embedding, head and final norm


def _finish(teacher: Any, student: Any, norm: Any, scale: float) -> None:
    student.to(teacher.dtype)
    student.generation_config.eos_token_id = teacher.generation_config.eos_token_id
    weight = getattr(getattr(teacher.base_model, "norm", None), "weight", None)
    basis = copy_embeddings(teacher, student)
    if not isinstance(weight, Tensor):
        return
    if basis is not None:
        weight = _narrowed_norm(weight, basis)
    _copy(weight * scale, norm.weight, "final norm")


@torch.no_grad()
def copy_embeddings(teacher: Any, student: Any) -> Tensor | None:
    """Give ``student`` the teacher's input embedding and head; P ``[D, d]`` where it is narrower.

    Raises ConfigurationError if the vocabularies differ or the student is wider.
    """
    sources = [m.weight for m in (teacher.get_input_embeddings(), teacher.get_output_embeddings())]
    targets = [m.weight for m in (student.get_input_embeddings(), student.get_output_embeddings())]
    basis = None
    if targets[0].shape[1] < sources[0].shape[1]:
        basis = leading_directions(sources, targets[0].shape[1])
        sources = [(w.double() @ basis).to(w.dtype) for w in sources]
    for source, target, what in zip(sources, targets, ("embedding", "head"), strict=True):
        _copy(source, target, what)
    return basis


@torch.no_grad()
def leading_directions(weights: list[Tensor], count: int) -> Tensor:
    """P, float64 ``[D, count]``: orthonormal, the best rank-``count`` span of all rows.

    Σ ‖W − W P Pᵀ‖² over ``weights`` ``[V, D]`` is least (Eckart and Young 1936).
    """
    gram = torch.stack([w.double().T @ w.double() for w in weights]).sum(0)
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]


def _narrowed_norm(weight: Tensor, basis: Tensor) -> Tensor:
    """Diagonal of Pᵀ diag(w) P, times √(D/d) since x = P z has its length over D entries."""
    wide, narrow = basis.shape
    along = (basis.square() * weight.double()[:, None]).sum(0)
    return (along * math.sqrt(wide / narrow)).to(weight.dtype)


@torch.no_grad()
def _copy(source: Tensor, target: Tensor, what: str) -> None:
    if source.shape != target.shape:
        raise ConfigurationError(
            f"the teacher's {what} is {list(source.shape)} and the student's {list(target.shape)}: "
            "leave vocab_size as it is, and hidden_size at most the teacher's"
        )
    target.copy_(source)


# The teacher's layers


@torch.no_grad()
def warm_start_layers(teacher: Any, student: Any) -> None:
    """Fill the layers of a DenseRetNet with those of a Llama-like teacher, evenly spaced.

    The MLP and both norms are copied as they are. Retention takes W_q, W_k, the values' half of W
    and W_o from attention: key and value heads are repeated for the query heads that share them,
    and the rotary halves (i, i + d/2) become our pairs (2i, 2i+1). [ours] Gates of earlier layers
    start at zero; the output gate starts at random and small, so that a block adds little until
    it has learned to, while the MLPs work from the first step.
    """
    source, target = teacher.base_model.layers, student.model.layers
    for new, old in zip(target, evenly_spaced(len(source), len(target)), strict=True):
        layer = source[old]
        for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
            getattr(new, name).load_state_dict(getattr(layer, name).state_dict())
        _fill_retention(layer.self_attn, new.self_attn)


def _fill_retention(attention: Any, retention: Any) -> None:
    heads = retention.heads
    weights = [getattr(attention, f"{n}_proj").weight for n in ("q", "k", "v")]
    width = len(weights[0]) // heads
    q, k, v = (_per_head(weight, heads, width) for weight in weights)
    _copy(_pairs(q), retention.q_proj.weight, "query weight")
    _copy(_pairs(k), retention.k_proj.weight, "key weight")
    values = v.flatten(0, 1)
    _copy(values, retention.vg_proj.weight[: len(values)], "value weight")
    _copy(attention.o_proj.weight, retention.o_proj.weight, "output weight")
    for select in (getattr(retention, n, None) for n in ("k_select", "v_select")):
        if getattr(select, "fc2", None) is not None:
            select.fc2.weight.zero_()  # type: ignore[union-attr]


def _per_head(weight: Tensor, heads: int, width: int) -> Tensor:
    """``[H, width, D]`` of a projection whose heads may be shared by several query heads."""
    own = weight.unflatten(0, (-1, width))
    return own.repeat_interleave(heads // len(own), 0)


def _pairs(weight: Tensor) -> Tensor:
    """Rows of each head from rotary halves to interleaved pairs, ``[H · d, D]``."""
    return weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(0, 2)


def _warm_values(teacher: Any) -> dict[str, Any]:
    config = teacher.config.get_text_config()
    layers = getattr(teacher.base_model, "layers", None)
    names = {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}
    fits = layers is not None and {name for name, _ in layers[0].named_children()} == names
    parts = [f"{n}_proj.weight" for n in ("down", "gate", "up")]
    plain = fits and sorted(layers[0].mlp.state_dict()) == parts  # type: ignore[index]
    if not plain or getattr(config, "hidden_act", None) != "silu":
        raise ConfigurationError(
            f"warm_start: {type(teacher).__name__} is not built like Llama (gated SiLU MLP "
            "without bias, two norms a layer); leave it out"
        )
    attended = layers[0].self_attn.q_proj.weight.shape[0]  # type: ignore[index]
    if attended != config.hidden_size:
        raise ConfigurationError(
            f"warm_start: the teacher's attention is {attended} wide and its states "
            f"{config.hidden_size}; leave it out"
        )
    return {
        "num_attention_heads": config.num_attention_heads,
        "query_key_dim": config.hidden_size,
        "v_factor": 1,
        "mlp_intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
    }


# Configurations


def _retnet_values(teacher: Any, layers: int, width: int | None) -> dict[str, Any]:
    width = width or teacher.hidden_size
    keys = width // 2
    heads = next(h for h in (4, 2, 1) if keys % (2 * h) == 0 or h == 1)
    return {
        **_shared_values(teacher, layers),
        "num_attention_heads": heads,
        "intermediate_v_select_scale": min(32, width),
    }


def _shared_values(teacher: Any, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": teacher.vocab_size,
        "hidden_size": teacher.hidden_size,
        "num_hidden_layers": layers,
        "tie_word_embeddings": bool(teacher.tie_word_embeddings),
        "bos_token_id": teacher.bos_token_id,
        "eos_token_id": teacher.eos_token_id,
        "pad_token_id": None,
    }


def _check_known(overrides: dict[str, Any], config: Any) -> None:
    unknown = sorted(name for name in overrides if not hasattr(config, name))
    if unknown:
        kind = type(config).__name__.removesuffix("Config")
        raise ConfigurationError(f"student_config: {kind} has no {unknown[0]!r}")
