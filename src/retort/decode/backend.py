"""Which arithmetic a packed model runs on: the native core, or PyTorch's own."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from retort.cache.attention import AttentionRowCache
from retort.cache.native import NativeAttentionRowCache, serves
from retort.cache.varlen import VarlenAttentionRowCache
from retort.cache.varlen import serves as varlen_serves
from retort.decode.fusion import Inference
from retort.decode.packing import Lease, Packing
from retort.errors import ConfigurationError
from retort.ops import native, prepacked
from retort.ops.native.build import digest
from retort.ops.native.invariant import row_invariant

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
    """The arithmetic under one model while it decodes; `close` puts the model's modules back.

    Backends on one model share its packed weights, made as the first of them asked.

    Args:
        weight_storage: "auto" (bf16 where that is exact) or "float32".
        release: drop original weights that only packed layers use, so that memory does not double.
        prepack: on PyTorch's arithmetic, pack float32 weights once for its oneDNN.
    """

    def __init__(
        self,
        model: Any,
        cpu_backend: str,
        release: bool = False,
        weight_storage: str = "auto",
        prepack: bool = True,
    ) -> None:
        if weight_storage not in STORAGES:
            raise ConfigurationError(f"weight_storage={weight_storage!r} must be one of {STORAGES}")
        self.name = resolve(cpu_backend, model)
        self._varlen = varlen_serves(model.device, model.dtype)
        self._lease: Lease | None = None
        self._model = weakref.ref(model)
        core = self.name == "native"
        if core or (prepack and serves(model) and prepacked.available()):
            self._lease = Lease(model, core, weight_storage, release)

    @property
    def key(self) -> list[Any]:
        """What decides how fast passes are, for things that are kept by it."""
        if self.packing is None:
            return [self.name]
        if not self.packing.native:
            return [self.name, "prepacked", self.packing.linears.nbytes]
        fused = [self.packing.layers is not None, self.packing.stack is not None]
        return [self.name, digest(), native.isa(), self.packing.linears.nbytes, *fused]

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
        if self._lease is not None and not self._lease.shared:
            self._lease.packing.fuse(model, inference)

    @property
    def packing(self) -> Packing | None:
        """What was made of the model's layers; None where they are as they were."""
        return self._lease.packing if self._lease is not None else None

    def facts(self) -> dict[str, Any]:
        """What of the model runs packed or natively, what does not by name, and the reason."""
        linears = self.packing.linears if self.packing else None
        layers = self.packing.layers if self.packing else None
        return {
            "cpu_backend": self.name,
            "packed_linears": len(linears.packed) if linears else 0,
            "linears_in_torch": dict(linears.skipped) if linears else {},
            "fused_layers": len(layers.fused) if layers else 0,
            "layers_in_torch": dict(layers.skipped) if layers else {},
            "one_call_a_step": self._is_one_call(),
        }

    def _is_one_call(self) -> bool:
        """Whether a step runs all layers in one native call; our recurrent models know."""
        if self.packing is None or not self.packing.native:
            return False
        runs_as_one_call = getattr(self._model(), "runs_as_one_call", None)
        return self.packing.stack is not None or bool(runs_as_one_call and runs_as_one_call())

    def refresh(self) -> None:
        """Pack the model's present weights again, after a training step."""
        if self.packing is not None:
            self.packing.refresh()

    def close(self) -> None:
        """Put the model's own layers back, unless another user of the model still needs them.

        A backend that is dropped without it does so when Python collects it.
        """
        if self._lease is not None:
            self._lease.close()
            self._lease = None
