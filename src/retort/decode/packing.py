"""What engines made of a model's layers, shared by all who decode on it and undone after the last.

Engines on one model share one packing: its weights are not stored twice, no matter which engine
ends first. A user that is dropped without `Lease.close` leaves when Python collects it.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from retort.decode.fusion import FusedLayers, Inference
from retort.decode.stack import FusedStack
from retort.ops.packing import pack_linears
from retort.ops.prepacked import prepack_linears

# Weak keys only: a packing refers to a model's parts and never to the model.
_packings: WeakKeyDictionary[nn.Module, Packing] = WeakKeyDictionary()
_lock = threading.RLock()  # reentrant: a collection may end a lease at any allocation
_passes: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def pass_lock(model: Any) -> Any:
    """Held while a model's parts are changed, which every pass does for its own time.

    Engines in several threads may share a model: their passes take turns.
    """
    with _lock:
        return _passes.setdefault(model, threading.RLock())


class Packing:
    """A model on packed linears, and on the core on fused layers where `fuse` found any.

    Args:
        model: its linear layers change places with packed ones until `restore`.
        native: on the native core's weights; else on those of PyTorch's oneDNN.
        weight_storage, release: as in `retort.ops.packing.pack_linears`.
    """

    def __init__(self, model: Any, native: bool, weight_storage: str, release: bool) -> None:
        self.users = 1
        self.native, self.released = native, release
        if native:
            self.linears = pack_linears(model, precision=weight_storage, release=release)
        else:
            self.linears = prepack_linears(model, release=release)
        self.layers: FusedLayers | None = None
        self.stack: FusedStack | None = None

    def give_to_core(self, model: Any, weight_storage: str) -> None:
        """Go over from oneDNN's weights to the core's: a user came who needs the core's bits."""
        self.linears.restore()
        self.linears = pack_linears(model, precision=weight_storage, release=self.released)
        self.native = True

    def fuse(self, model: Any, inference: Inference) -> None:
        """Run decoder layers that the core knows as one call each; see `retort.decode.fusion`."""
        self.layers = FusedLayers(model, inference)
        if not self.layers.fused:
            return
        try:
            self.stack = FusedStack(model, self.layers, inference)
        except Exception as error:  # whatever a foreign forward raises, it keeps that forward
            self.layers.skipped[model.base_model_prefix] = f"{type(error).__name__}: {error}"

    def refresh(self) -> None:
        """Pack the model's present weights again."""
        for part in (self.linears, self.layers, self.stack):
            if part is not None:
                part.refresh()

    def restore(self) -> None:
        """Put the model's own modules and forwards back."""
        for part in (self.stack, self.layers, self.linears):
            if part is not None:
                part.restore()
        self.stack = self.layers = None


class Lease:
    """One user's hold on the packing of a model; made by the first user, undone with the last.

    What the first user asked for holds for those who come while it is in use, but that one who
    needs the core gets it for all.

    Args:
        model: a model on the CPU.
        native, weight_storage, release: as in `Packing`.

    Attributes:
        packing: what was made of the model.
        shared: whether another user had the same made before.
    """

    def __init__(self, model: Any, native: bool, weight_storage: str, release: bool) -> None:
        with _lock:
            found = _join(model)
            self.packing = found or Packing(model, native, weight_storage, release)
            self.shared = found is not None
            if native and not self.packing.native:
                self._give_to_core(model, weight_storage)
            _packings[model] = self.packing
        self._leave = weakref.finalize(self, _leave, weakref.ref(model), self.packing)
        self._leave.atexit = False  # at the interpreter's end nobody reads the model again

    def _give_to_core(self, model: Any, weight_storage: str) -> None:
        try:
            self.packing.give_to_core(model, weight_storage)
        except BaseException:
            self.packing.users -= 1  # the others stay
            raise
        self.shared = False

    def close(self) -> None:
        """Leave; the last user's leaving restores the model. Again does nothing."""
        self._leave()


def _join(model: Any) -> Packing | None:
    """The packing in use, with one user more."""
    packing = _packings.get(model)
    if packing is not None:
        packing.users += 1  # before the second look: a collection may have ended it in between
    return packing if packing is _packings.get(model) else None


def _leave(model: weakref.ref, packing: Packing) -> None:
    with _lock:
        packing.users -= 1
        if packing.users:
            return
        left = model()
        if left is not None:
            _packings.pop(left, None)
        if left is not None or not packing.released:  # nobody misses a dead model's own weights
            packing.restore()
