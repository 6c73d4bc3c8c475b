"""Which arithmetic a packed model runs on: the native core, or PyTorch's own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from retort.cache.attention import AttentionRowCache
from retort.cache.native import NativeAttentionRowCache, serves
from retort.cache.varlen import VarlenAttentionRowCache
from retort.cache.varlen import serves as varlen_serves
from retort.decode.fusion import FusedLayers, Inference
from retort.decode.stack import FusedStack
from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native.invariant import row_invariant
from retort.ops.packing import PackedLinears, pack_linears

BACKENDS = ("auto", "native", "torch")
STORAGES = ("auto", "float32")


def resolve(cpu_backend: str, model: Any) -> str:
    """``"native"`` or ``"torch"``.

    Raises:
        ConfigurationError: an unknown name, or the native core was asked for and cannot serve.
    """
    if cpu_backend not in BACKENDS:
        raise ConfigurationError(f"cpu_backend={cpu_backend!r} must be one of {BACKENDS}")
    fits = serves(model)
    if cpu_backend == "auto":
        return "native" if fits and native.available() else "torch"
    if cpu_backend == "native" and not fits:
        raise ConfigurationError(
            f"cpu_backend='native' serves float32 models on a CPU, not {model.dtype} on "
            f"{model.device}: use cpu_backend='auto'"
        )
    if cpu_backend == "native" and not native.available():
        raise ConfigurationError(f"cpu_backend='native' is not available: {native.why_not()}")
    return cpu_backend


class Backend:
    """The native core under one model while it decodes; `close` puts its modules back.

    Args:
        weight_storage: "auto" (bf16 where that is exact) or "float32".
        release: drop original weights that only packed layers use, so that memory does not double.
    """

    def __init__(
        self, model: Any, cpu_backend: str, release: bool = False, weight_storage: str = "auto"
    ) -> None:
        if weight_storage not in STORAGES:
            raise ConfigurationError(f"weight_storage={weight_storage!r} must be one of {STORAGES}")
        self.name = resolve(cpu_backend, model)
        self._varlen = varlen_serves(model.device, model.dtype)
        self._linears: PackedLinears | None = None
        self._layers: FusedLayers | None = None
        self._stack: FusedStack | None = None
        if self.name == "native":
            self._linears = pack_linears(model, precision=weight_storage, release=release)

    def arithmetic(self) -> AbstractContextManager:
        """For the time of a pass: element functions whose bits ignore their place."""
        return row_invariant() if self.name == "native" else nullcontext()

    def attention_cache(self) -> AttentionRowCache:
        """An empty attention cache for this arithmetic."""
        if self.name == "native":
            return NativeAttentionRowCache()
        return VarlenAttentionRowCache() if self._varlen else AttentionRowCache()

    def fuse(self, model: Any, inference: Inference) -> None:
        """Run decoder layers that the core knows as one call each; see `retort.decode.fusion`."""
        if self.name == "native":
            self._layers = FusedLayers(model, inference)
            if self._layers.fused:
                self._fuse_stack(model, self._layers, inference)

    def _fuse_stack(self, model: Any, layers: FusedLayers, inference: Inference) -> None:
        try:
            self._stack = FusedStack(model, layers, inference)
        except Exception as error:  # whatever a foreign forward raises, it keeps that forward
            layers.skipped[model.base_model_prefix] = f"{type(error).__name__}: {error}"

    def facts(self) -> dict[str, Any]:
        """What of the model runs natively, and the names of what does not, with the reason."""
        linears, layers = self._linears, self._layers
        return {
            "cpu_backend": self.name,
            "packed_linears": len(linears.packed) if linears else 0,
            "linears_in_torch": dict(linears.skipped) if linears else {},
            "fused_layers": len(layers.fused) if layers else 0,
            "layers_in_torch": dict(layers.skipped) if layers else {},
            "one_call_a_step": self._stack is not None,
        }

    def refresh(self) -> None:
        """Pack the model's present weights again, after a training step."""
        if self._linears is not None:
            self._linears.refresh()
        if self._layers is not None:
            self._layers.refresh()
        if self._stack is not None:
            self._stack.refresh()

    def close(self) -> None:
        """Put the model's own layers back."""
        if self._stack is not None:
            self._stack.restore()
            self._stack = None
        if self._layers is not None:
            self._layers.restore()
            self._layers = None
        if self._linears is not None:
            self._linears.restore()
            self._linears = None
