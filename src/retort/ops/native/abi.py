"""The structures of ``api.h`` for ctypes: field for field the same, in the same order."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any, ClassVar

Fields = list[tuple[str, Any]]


def _fields(**kinds: Any) -> Fields:
    """Fields from ``type="name name"`` groups that keep their order: ``p``, ``i``, ``f``, ``t``."""
    types = {"p": c_void_p, "i": c_int64, "f": c_float, "t": c_int32}
    return [(name, types[kind[0]]) for kind, names in kinds.items() for name in names.split()]


class Linear(ctypes.Structure):
    """A packed layer: weight and bias addresses, inputs, outputs, bf16, the layer it gates."""

    _fields_: ClassVar[Fields] = _fields(p="weight bias", i="k n bf16", p2="up")


class LinearCall(ctypes.Structure):
    """Several packed layers of one input."""

    _fields_: ClassVar[Fields] = _fields(
        p="layers", i="count", p2="x", i2="ldx m", p3="out ldo residual", i3="ldr", t="threads"
    )


class LinearsCall(ctypes.Structure):
    """Linear calls one after the other in one parallel region."""

    _fields_: ClassVar[Fields] = _fields(p="calls", i="count", t="threads")


class ArgmaxCall(ctypes.Structure):
    """The largest output of each row of one packed layer."""

    _fields_: ClassVar[Fields] = _fields(p="layer x", i="ldx m", p2="index value", t="threads")


class Rows(ctypes.Structure):
    """Layout of a packed pass."""

    _fields_: ClassVar[Fields] = _fields(i="rows", p="starts counts offsets capacity order")


class Heads(ctypes.Structure):
    """Shape and options of an attention layer."""

    _fields_: ClassVar[Fields] = _fields(
        i="heads kv_heads key_width value_width", f="scaling softcap", i2="window", p="sinks"
    )


class AttentionCall(ctypes.Structure):
    """One attention layer of a packed pass."""

    _fields_: ClassVar[Fields] = _fields(
        p="rows heads q", i="q_token q_head", p2="k", i2="k_token k_head", p3="v",
        i3="v_token v_head", p4="key_rows value_rows out", t="threads",
    )  # fmt: skip


class NormCall(ctypes.Structure):
    """RMSNorm of rows."""

    _fields_: ClassVar[Fields] = _fields(
        p="x", i="ldx m n", p2="weight", f="eps offset", p3="out", t="threads"
    )


class RotaryCall(ctypes.Structure):
    """Rotary positions of packed heads."""

    _fields_: ClassVar[Fields] = _fields(
        p="x", i="x_token x_head", p2="cos sin", i2="total heads width rotated", p3="out",
        t="threads",
    )  # fmt: skip


class Decoder(ctypes.Structure):
    """Weights, norms and heads of a decoder layer."""

    _fields_: ClassVar[Fields] = _fields(
        p="query output gate down attention_norm mlp_norm query_norm key_norm",
        f="attention_eps mlp_eps query_eps key_eps "
        "attention_offset mlp_offset query_offset key_offset",
        p2="heads",
    )


class DecoderCall(ctypes.Structure):
    """One decoder layer of a packed pass."""

    _fields_: ClassVar[Fields] = _fields(
        p="layer rows key_rows value_rows cos sin", i="rotated total", p2="x out", t="threads"
    )


class ActivationCall(ctypes.Structure):
    """A function of each element of rows."""

    _fields_: ClassVar[Fields] = _fields(
        p="x", i="ldx m n", p2="other", i2="ldother op", p3="out", t="threads"
    )


class Retention(ctypes.Structure):
    """Sizes and decay tables of a retention layer."""

    _fields_: ClassVar[Fields] = _fields(
        i="heads key_width value_width block", p="read pair write carry"
    )


class RetentionCall(ctypes.Structure):
    """One retention layer of a packed pass."""

    _fields_: ClassVar[Fields] = _fields(
        p="shape", i="rows", p2="starts counts offsets q k v states before_k before_v current_k "
        "current_v moved_block moved wanted scores out", t="threads",
    )  # fmt: skip


class FoldCall(ctypes.Structure):
    """States of one layer or many, folded by a block each."""

    _fields_: ClassVar[Fields] = _fields(
        p="shape", i="count", p2="states keys values", i2="fresh", t="threads"
    )


class RetNetLayer(ctypes.Structure):
    """Weights and norms of a DenseRetNet layer."""

    _fields_: ClassVar[Fields] = _fields(
        p="input key_gate value_gate output gate down norm key_norm value_norm group_norm mlp_norm",
        i="window",
    )


class RetNet(ctypes.Structure):
    """All layers of a DenseRetNet and the norm after them."""

    _fields_: ClassVar[Fields] = _fields(
        p="layers", i="count window", p2="retention norm", f="eps scale"
    )


class RetNetCall(ctypes.Structure):
    """All layers of a packed pass."""

    _fields_: ClassVar[Fields] = _fields(
        p="model", i="rows total", p2="starts counts offsets state before current moved_to "
        "moved_block states keys values moved",
        i2="state_layer key_layer value_layer moved_layer",
        p3="positions pages cos sin root", i3="wanted", p4="wanted_tokens x out", t="threads",
    )  # fmt: skip


class ScanCall(ctypes.Structure):
    """One selective scan of a packed pass."""

    _fields_: ClassVar[Fields] = _fields(
        i="rows channels states", p="counts offsets a dt u b c", i2="ld_dt ld_u ld_b ld_c",
        p2="initial kept_ends kept_tokens kept y", t="threads",
    )  # fmt: skip


class ScanGradientCall(ctypes.Structure):
    """Gradients of one selective scan of a packed pass."""

    _fields_: ClassVar[Fields] = _fields(
        i="rows channels states total chunk part", p="counts offsets first_kept a dt u b c",
        i2="ld_dt ld_u ld_b ld_c", p2="kept grad grad_a grad_dt grad_u grad_bc", t="threads",
    )  # fmt: skip


class ConvCall(ctypes.Structure):
    """One causal convolution of a packed pass."""

    _fields_: ClassVar[Fields] = _fields(
        i="rows channels kernel silu", p="counts offsets x", i2="ldx",
        p2="history weight bias out", t="threads",
    )  # fmt: skip


class MambaLayer(ctypes.Structure):
    """Weights of a DenseMamba layer."""

    _fields_: ClassVar[Fields] = _fields(
        p="input gate parameters step output norm conv_weight conv_bias a d", i="window"
    )


class Mamba(ctypes.Structure):
    """All layers of a DenseMamba and the norm after them."""

    _fields_: ClassVar[Fields] = _fields(
        p="layers", i="count window states kernel", p2="norm", f="eps"
    )


class MambaCall(ctypes.Structure):
    """All layers of a packed pass."""

    _fields_: ClassVar[Fields] = _fields(
        p="model", i="rows total", p2="counts offsets initial kept_ends kept_tokens kept last "
        "history_pages history_offsets tape_pages tape_offsets states fed inputs",
        i2="state_layer fed_layer input_layer page", p3="x out", t="threads",
    )  # fmt: skip


class Stack(ctypes.Structure):
    """All decoder layers of a model and the norm after them."""

    _fields_: ClassVar[Fields] = _fields(p="layers", i="count", p2="norm", f="eps offset")


class StackCall(ctypes.Structure):
    """All decoder layers of a packed pass."""

    _fields_: ClassVar[Fields] = _fields(
        p="stack rows key_rows value_rows cos sin", i="rotated total", p2="x out", t="threads"
    )


class RaceCall(ctypes.Structure):
    """Races of score + noise, a row of scores each."""

    _fields_: ClassVar[Fields] = [
        *_fields(p="scores", i="ld rows vocab parts", p2="states"), ("margin", c_double),
        *_fields(p="tokens counts", t="threads"),
    ]  # fmt: skip


CALLS = {
    "retort_linear": LinearCall,
    "retort_linears": LinearsCall,
    "retort_argmax": ArgmaxCall,
    "retort_attention": AttentionCall,
    "retort_norm": NormCall,
    "retort_rotary": RotaryCall,
    "retort_decoder": DecoderCall,
    "retort_activation": ActivationCall,
    "retort_rotate_pairs": RotaryCall,
    "retort_retention": RetentionCall,
    "retort_fold": FoldCall,
    "retort_retnet": RetNetCall,
    "retort_scan": ScanCall,
    "retort_scan_gradient": ScanGradientCall,
    "retort_convolution": ConvCall,
    "retort_mamba": MambaCall,
    "retort_stack": StackCall,
    "retort_race": RaceCall,
}


def declare(lib: ctypes.CDLL) -> None:
    """Tell ctypes what the entry points take and return."""
    lib.retort_sources.restype = ctypes.c_char_p
    lib.retort_select.argtypes = [ctypes.c_char_p]
    lib.retort_linear_dense.restype = None
    lib.retort_linear_dense.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int32]
    for name, call in CALLS.items():
        entry = getattr(lib, name)
        entry.argtypes, entry.restype = [POINTER(call)], None
