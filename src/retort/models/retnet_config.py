"""The configuration of DenseRetNet (`dense_retnet.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from retort.errors import ConfigurationError
from retort.ops.retention import Form


@strict
class DenseRetNetConfig(PreTrainedConfig):
    """Configuration of DenseRetNet; the defaults are the authors' 350M model.

    Attributes:
        query_key_dim: width of queries and keys over all heads; half of hidden_size if None.
        v_factor: values are hidden_size · v_factor wide.
        dense_block_layers: the window m; 0 is RetNet.
        intermediate_k_select_scale: the gate of k is hidden_size // this wide inside.
        intermediate_v_select_scale: the same for v.
        dense_gate: off, earlier keys and values are added without a gate (an ablation).
        dense_norms: at m = 0, still norm k and v from layer 1 on, as dense layers do (the
            control of every experiment).
        mlp_intermediate_size: when above 0, a gated SiLU MLP with its own norm follows each
            retention block.
        retention_form: how passes without a cache compute; "clamped" is the authors' parallel
            mode, for comparison only.
        chunk_size: tokens in a chunk of the chunkwise form.
        initializer_range: standard deviation of initial weights.
    """

    model_type = "dense_retnet"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32001
    hidden_size: int = 1536
    query_key_dim: int | None = None
    num_attention_heads: int = 2
    num_hidden_layers: int = 16
    v_factor: int = 2
    dense_block_layers: int = 2
    intermediate_k_select_scale: int = 8
    intermediate_v_select_scale: int = 32
    dense_gate: bool = True
    dense_norms: bool = False
    mlp_intermediate_size: int = 0
    rms_norm_eps: float = 1e-6
    dropout: float = 0.0
    initializer_range: float = 0.02
    retention_form: Form = "chunkwise"
    chunk_size: int = 64
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the default width of keys and check every size."""
        if self.query_key_dim is None:
            self.query_key_dim = self.hidden_size // 2
        super().__post_init__(**kwargs)
        for fault in self._faults():
            raise ConfigurationError(fault)

    @property
    def value_dim(self) -> int:
        """Width of the values over all heads."""
        return self.hidden_size * self.v_factor

    @property
    def key_dim(self) -> int:
        """Width of queries and keys over all heads."""
        return self.query_key_dim or 0

    def _faults(self) -> Iterator[str]:
        heads, keys, values = self.num_attention_heads, self.key_dim, self.value_dim
        for name in ("num_attention_heads", "num_hidden_layers", "chunk_size"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1"
        for name in ("dense_block_layers", "mlp_intermediate_size"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)} must be 0 (none) or more"
        if keys % heads or values % heads:
            yield (
                f"num_attention_heads={heads} does not divide query_key_dim={keys} and "
                f"hidden_size * v_factor={values}"
            )
        if keys < heads or keys // heads % 2:
            yield f"query_key_dim / num_attention_heads = {keys // heads} must be even (rotary)"
        for name in ("intermediate_k_select_scale", "intermediate_v_select_scale"):
            if not 1 <= getattr(self, name) <= self.hidden_size:
                yield f"{name}={getattr(self, name)} is not in 1..hidden_size={self.hidden_size}"
        if self.retention_form not in get_args(Form):
            yield f"retention_form={self.retention_form!r} is none of {get_args(Form)}"
