"""The configuration of DenseMamba (`dense_mamba.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers.models.mamba.configuration_mamba import MambaConfig

from retort.errors import ConfigurationError
from retort.ops.selective_scan import LONGEST

Form = Literal["auto", "chunked", "rescan", "recurrent"]


@strict
class DenseMambaConfig(MambaConfig):
    """Configuration of DenseMamba: transformers' of Mamba, and the dense connection.

    Attributes:
        dense_block_layers: the window m; 0 is Mamba.
        dense_gate: off, earlier states are added without a gate (an ablation); such a model is
            not Mamba at the start. There is no switch for norms: these dense layers add none.
        intermediate_select_scale: the gate is hidden_size // this wide inside.
        scan_form: how passes without a cache compute. "chunked" keeps the states of one piece of
            the tokens over m+1 layers, "rescan" none, "recurrent" goes token by token; "auto"
            is "rescan" where gradients are wanted and "chunked" elsewhere.
        chunk_size: tokens in a piece.
    """

    model_type = "dense_mamba"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    dense_block_layers: int = 2
    dense_gate: bool = True
    intermediate_select_scale: int = 8
    scan_form: str = "auto"
    chunk_size: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        """Check every size after transformers has filled in its defaults."""
        kind = kwargs.pop("model_type", None)  # of a Mamba checkpoint: what is saved is ours
        if kind not in (None, "mamba", self.model_type):
            raise ConfigurationError(
                f"the configuration is that of a {kind!r} model; DenseMamba reads 'mamba' and "
                f"{self.model_type!r}, whose layers and weights are its own"
            )
        super().__post_init__(**kwargs)
        for fault in self._faults():
            raise ConfigurationError(fault)

    def _faults(self) -> Iterator[str]:
        for name in ("hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "expand"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1"
        if self.dense_block_layers < 0:
            yield f"dense_block_layers={self.dense_block_layers} must be 0 (none) or more"
        if not 1 <= self.intermediate_select_scale <= self.hidden_size:
            yield (
                f"intermediate_select_scale={self.intermediate_select_scale} is not in "
                f"1..hidden_size={self.hidden_size}"
            )
        if self.scan_form not in get_args(Form):
            yield f"scan_form={self.scan_form!r} is none of {get_args(Form)}"
        if not 1 <= self.chunk_size <= LONGEST:
            yield f"chunk_size={self.chunk_size} is not in 1..{LONGEST}"
