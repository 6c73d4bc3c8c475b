"""The authors' published DenseRetNet checkpoints (`model_type` "DenseGauRetNet").

They load through the Auto classes without remote code: a thin configuration and model carry
their `model_type`, two names are mapped, and what the authors store but never read is dropped.
Saving such a model writes a plain `dense_retnet` checkpoint.
"""

from __future__ import annotations

from typing import Any

from retort.errors import ConfigurationError
from retort.models.dense_retnet import DenseRetNetConfig, DenseRetNetForCausalLM

RENAMED = {r"\.to_hidden\.0\.": ".vg_proj.", r"\.to_out\.0\.": ".o_proj."}
"""Authors' names to ours; `to_hidden.0` holds v and the gate, as `vg_proj` does."""

UNREAD = (
    r"retnet_rel_pos\.(angle|decay)$",
    r"layers\.0\.self_attn\.[kv]_(select|norm)\.",
)
"""Stored but never read: two constants, and the fusion of layer 0, which has nothing to fuse."""


class DenseGauRetNetConfig(DenseRetNetConfig):
    """Configuration of a published checkpoint; its keys are ours."""

    model_type = "DenseGauRetNet"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is saved: that of a `dense_retnet` model."""
        names = {
            "model_type": DenseRetNetConfig.model_type,
            "architectures": [DenseRetNetForCausalLM.__name__],
        }
        return super().to_dict() | names


class DenseGauRetNetForCausalLM(DenseRetNetForCausalLM):
    """DenseRetNet from a published checkpoint."""

    config_class = DenseGauRetNetConfig
    _keys_to_ignore_on_load_unexpected = list(UNREAD)  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but a missing or an unknown weight is an error.

        The cache is on whatever the file says: the authors switched it off for training, where
        ours is off by itself, and without it each new token would compute its whole prefix.

        Raises:
            ConfigurationError: the checkpoint lacks weights or holds unknown ones.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["key_mapping"] = RENAMED | (kwargs.get("key_mapping") or {})
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        _complain(str(pretrained_model_name_or_path), info)
        model._weight_conversions = None  # saving keeps our names
        model.config.use_cache = model.generation_config.use_cache = True
        return (model, info) if wants_info else model


def _complain(source: str, info: dict[str, Any]) -> None:
    wrong = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    found = [f"{kind}: {', '.join(keys)}" for kind, keys in wrong.items() if keys]
    if found:
        raise ConfigurationError(f"{source} does not fit its configuration; {'; '.join(found)}")
