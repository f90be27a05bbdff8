"""Models that do not fit into memory: each layer is read from its file when it runs.

    lm = load(folder, device_map="disk")     # embeddings, final norm and unembedding are in memory
    lm.answer(["Paris is the capital of"])   # at most two layers are in memory at any time
    with in_memory(lm.layers[3]): ...        # its weights are there for the length of a block

A layer's parameters are tensors without storage ("meta"). When the layer is called, its weights are
read and put in place. The layer that is likely to follow is read meanwhile by a thread. Those are
the two. A backward pass gets each weight from the file again, because autograd keeps the place of a
weight, and not the weight.

A change of a layer, such as a delta, is kept as a function. It is applied to the weights each time
after they were read, so no file changes.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ..core.errors import ModelError, first_line
from .absent import Fetch, Layer, Place, absent_like, sizes_of, stamp
from .room import Room

_READER = "factsmith_streamed"
"""Attribute of a streamed layer, and of its model: what reads it."""

_numbers = itertools.count(1)


@dataclass(eq=False)
class _Loaded:
    """The weights of a layer in memory.

    Attributes:
        index: The layer.
        parameters: One for each place.
        changes: The numbers of the changes that they contain.
    """

    index: int
    parameters: list[nn.Parameter]
    changes: tuple[int, ...] = ()


class _Reading(threading.Thread):
    """Reads a layer in the background."""

    def __init__(self, streamed: Streamed, index: int) -> None:
        super().__init__(name=f"factsmith-layer-{index}")  # a daemon could be torn at the exit
        self.streamed, self.index = streamed, index
        self.wanted, self.loaded = True, None

    loaded: _Loaded | None

    def run(self) -> None:
        # An error is raised by the reading in the foreground that follows.
        try:
            self.loaded = self.streamed.read_base(self.index, lambda: self.wanted)
        except Exception:
            self.loaded = None

    def end(self, *, wanted: bool) -> _Loaded | None:
        """Wait for the end, and return the layer; None if it was not read."""
        self.wanted = wanted
        self.join()
        loaded, self.loaded = self.loaded, None
        return loaded if wanted else None


class _Saved(NamedTuple):
    """What autograd keeps instead of a weight: where the weight is, and the view of it."""

    layer: int
    number: int
    changes: tuple[int, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Streamed:
    """Reads the layers of one model, and lets them go. Several threads may use it.

    Attributes:
        files: The files that are read, each with its size and its time of change.
        n_read: How many layers were read up to now.
        most_bytes: The most bytes of weights of layers that were in memory at any time.
        watch: Called whenever another layer is in memory. None: nobody watches.
    """

    def __init__(self, files: Mapping[str, tuple[int, int]]) -> None:
        self.files = dict(files)
        self.n_read = self.most_bytes = 0
        self._layers: list[Layer] = []
        self._changes: list[list[tuple[int, Callable[[], object], Layer]]] = []
        self._lock, self._counting = threading.RLock(), threading.Lock()
        self._current: _Loaded | None = None
        self._coming: _Reading | None = None
        self._inside: dict[int, int] = {}
        self._last: tuple[int | None, int] | None = None
        self._followers: dict[tuple[int | None, int], int] = {}
        self._room = Room()
        self.watch: Callable[[], object] | None = None
        self._held: list[tuple[Any, int]] = []
        _ALL.add(self)

    def add(self, layer: nn.Module, fetches: Mapping[tuple[nn.Module, str], Fetch]) -> None:
        """Stream one more layer. Its weights are taken out of it.

        Args:
            layer: The layer.
            fetches: For each weight, how it is read.
        """
        index = len(self._layers)
        places = tuple(
            Place(self, index, part, name, fetch.read, *fetch[1:])
            for (part, name), fetch in fetches.items()
        )
        stored = [part._parameters[name] for part, name in fetches]
        absent = tuple(
            absent_like(place, parameter)
            for place, parameter in zip(places, stored, strict=True)
            if parameter is not None
        )
        self._layers.append(Layer(layer, places, absent, sizes_of(places)))
        self._changes.append([])
        self._layers[index].put(absent)
        vars(layer)[_READER] = self
        layer.forward = _Forward(self, index, layer)

    @property
    def layers(self) -> list[nn.Module]:
        """The streamed layers, in order."""
        return [layer.module for layer in self._layers]

    @property
    def layer_bytes(self) -> list[int]:
        """The bytes of each layer's weights in memory."""
        return [sum(x.numel() * x.element_size() for x in layer.absent) for layer in self._layers]

    def held_bytes(self) -> int:
        """Return the bytes of weights of layers that are in memory now, whoever holds them."""
        with self._counting:
            self._held = [(storage, n) for storage, n in self._held if not _is_free(storage)]
            return sum(n for _, n in self._held)

    def state(self, index: int) -> tuple[int, ...]:
        """Return what differs after a weight of a layer has changed."""
        return tuple(number for number, _, _ in self._changes[index])

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    def read_base(self, index: int, wanted: Callable[[], bool] = lambda: True) -> _Loaded | None:
        """Read a layer as its files have it.

        Args:
            index: The layer.
            wanted: Asked before each weight. If it says no, the reading ends.

        Raises:
            ModelError: A file cannot be read, or has changed.
        """
        parameters = []
        for place in self._layers[index].places:
            if not wanted():
                return None
            parameters.append(nn.Parameter(self._fetched(place), requires_grad=False))
        self.n_read += 1
        return _Loaded(index, parameters)

    def _fetched(self, place: Place) -> Tensor:
        """Return a copy of one weight, as its file has it."""
        with torch.inference_mode(False), torch.no_grad():
            try:
                stored = place.fetch()
                tensor = self._room.like(stored, place.device).copy_(stored)
            except Exception as error:  # safetensors and the system raise all kinds of errors
                self.check_files()
                raise ModelError(
                    f"a layer cannot be read from its file ({first_line(error)}); copy or download "
                    "the model again"
                ) from error
        n_bytes = tensor.numel() * tensor.element_size()
        with self._counting:
            storage: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self._held.append((storage, n_bytes))
        self.most_bytes = max(self.most_bytes, self.held_bytes())
        return tensor

    def check_files(self) -> None:
        """Check that the files are those that the model was loaded from.

        Raises:
            ModelError: A file was removed or changed.
        """
        for path, known in self.files.items():
            if stamp(path) != known:
                raise ModelError(
                    f"the file {path} has changed since the model was loaded, and layers are read "
                    "from it; load the model again"
                )

    def weight(self, place: Place) -> Tensor:
        """Return one weight with all changes."""
        with self._lock:
            loaded, number = self._current, self._layers[place.index].places.index(place)
            if self._changes[place.index]:
                loaded = self._obtain(place.index)
            if loaded is not None and loaded.index == place.index:
                return loaded.parameters[number].detach()
            self._let_go()  # the weight, and not another layer, is in memory with the present one
            self.check_files()
            return self._fetched(place)

    def _obtain(self, index: int) -> _Loaded:
        """Return a layer in memory with all changes, and begin to read the one that follows."""
        wanted = self.state(index)
        loaded = self._current
        if loaded is None or loaded.index != index or loaded.changes != wanted:
            loaded, self._current = None, None  # let go before the next one is read
            if self._coming is not None and self._coming.index == index:
                loaded, self._coming = self._coming.end(wanted=True), None
            self._let_go()
            self.check_files()
            if loaded is None:
                loaded = self.read_base(index)
            assert loaded is not None
            self._with_changes(loaded)
            self._current = loaded
            if self.watch is not None:
                self.watch()
            self._foresee(index)
        return loaded

    def _with_changes(self, loaded: _Loaded) -> None:
        """Apply a layer's changes to its weights, in their order."""
        changes = self._changes[loaded.index]
        if not changes:
            return
        layer, (_, _, base) = self._layers[loaded.index], changes[0]
        base.size()
        layer.put(loaded.parameters)
        try:
            for _, change, _ in changes:
                change()
            loaded.parameters = layer.present()
            loaded.changes = self.state(loaded.index)
        finally:
            layer.size()
            layer.put(layer.absent)

    def _foresee(self, index: int) -> None:
        """Begin to read the layer that followed after the last two the last time."""
        before = None
        if self._last is not None:
            self._followers[self._last], before = index, self._last[1]
        self._last = (before, index)
        following = self._followers.get(self._last, index - 1 if before == index + 1 else index + 1)
        if 0 <= following < len(self._layers) and following != index:
            self._coming = _Reading(self, following)
            self._coming.start()

    def _let_go(self) -> None:
        """Forget the layer that is read in the background."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.end(wanted=False)

    def release(self) -> None:
        """Let every layer go."""
        with self._lock:
            self._let_go()
            self._current = None
            self._room = Room()

    # ── running ───────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def resident(self, index: int) -> Generator[_Loaded, None, None]:
        """Put a layer's weights in place for the length of a block. Other threads wait."""
        with self._lock:
            loaded, layer = self._obtain(index), self._layers[index]
            self._inside[index] = self._inside.get(index, 0) + 1
            try:
                layer.put(loaded.parameters)
                yield loaded
            finally:
                self._inside[index] -= 1
                if not self._inside[index]:
                    layer = self._layers[index]  # a change may have put another one in its place
                    layer.put(layer.absent)

    def run(self, index: int, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer on its weights.

        Args:
            index: The layer.
            plain: The layer's own forward.
            args: Its arguments.
            kwargs: Its arguments by name.
        """
        with self.resident(index) as loaded:
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            numbers = {
                (x.untyped_storage().data_ptr(), x.dtype): number
                for number, x in enumerate(loaded.parameters)
            }
            changes = loaded.changes

            def pack(tensor: Tensor) -> Tensor | _Saved:
                number = numbers.get((tensor.untyped_storage().data_ptr(), tensor.dtype))
                if number is None:
                    return tensor
                view = (tensor.size(), tensor.stride(), int(tensor.storage_offset()))
                return _Saved(index, number, changes, *view)

            with saved_tensors_hooks(pack, self._unpack):
                return plain(*args, **kwargs)

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        """Return a weight to a backward pass."""
        if isinstance(saved, Tensor):
            return saved
        if saved.changes != self.state(saved.layer):
            raise RuntimeError("a layer has changed between a forward pass and its backward pass")
        with self._lock, torch.no_grad():
            weight = self._obtain(saved.layer).parameters[saved.number].detach()
            return weight.as_strided(saved.size, saved.stride, saved.offset)

    # ── changes ───────────────────────────────────────────────────────────────────────────────────

    def change(self, layer: nn.Module, apply: Callable[[], object]) -> None:
        """Change a layer until `undo`.

        Args:
            layer: The layer.
            apply: Changes the weights that are in place, or puts others there. It is called now,
                and each time after the layer was read. It must do the same each time.
        """
        index = self.index(layer)
        with self._lock:
            before = self._layers[index]
            try:
                with self.resident(index) as loaded:
                    apply()
                    loaded.parameters = before.present()
                    absent = tuple(map(absent_like, before.places, loaded.parameters))
                    after = before._replace(absent=absent, sizes=sizes_of(before.places))
                    self._layers[index] = after
                    self._changes[index].append((next(_numbers), apply, before))
                    loaded.changes = self.state(index)
            except BaseException:
                self._current = None  # it may be half changed
                before.size()
                raise

    def n_changes(self, layer: nn.Module) -> int:
        """Return how many changes a layer has."""
        return len(self._changes[self.index(layer)])

    def undo(self, layer: nn.Module, n: int) -> None:
        """Take back a layer's changes except the first n."""
        index = self.index(layer)
        with self._lock:
            if len(self._changes[index]) <= n:
                return
            _, _, before = self._changes[index][n]
            del self._changes[index][n:]
            self._layers[index] = before
            before.size()
            before.put(before.absent)
            if self._current is not None and self._current.index == index:
                self._current = None

    def adopted_by(self, module: nn.Module) -> None:
        """Note that a model has these layers."""
        vars(module)[_READER] = self

    def index(self, layer: nn.Module) -> int:
        """Return the number of a layer."""
        return next(i for i, each in enumerate(self._layers) if each.module is layer)

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: how layers are read, and their changes."""
        return {"files": self.files, "layers": self._layers, "changes": self._changes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["files"])  # type: ignore[misc]
        self._layers, self._changes = state["layers"], state["changes"]
        changed = [before for changes in self._changes for _, _, before in changes]
        for layer in (*self._layers, *changed):
            layer.place_all()

    def after_fork(self) -> None:
        """Drop what only the parent process has: its lock and its threads."""
        self._lock, self._counting = threading.RLock(), threading.Lock()
        self._coming = None


class _Forward:
    """What a streamed layer runs instead of its own forward."""

    def __init__(self, streamed: Streamed, index: int, layer: nn.Module) -> None:
        self.streamed, self.index, self.layer = streamed, index, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = partial(type(self.layer).forward, self.layer)
        return self.streamed.run(self.index, plain, *args, **kwargs)


def in_memory(layer: nn.Module) -> AbstractContextManager[object]:
    """Return a block in which the weights of a layer are in memory.

    Parts of a streamed layer can be called alone only inside such a block. For a layer that is in
    memory anyway the block does nothing.
    """
    streamed = streamed_of(layer)
    return nullcontext() if streamed is None else streamed.resident(streamed.index(layer))


def streamed_of(module: nn.Module) -> Streamed | None:
    """Return what reads a layer from its file, or the layers of a model.

    None: everything is in memory.
    """
    streamed = vars(module).get(_READER)
    return streamed if isinstance(streamed, Streamed) else None


def _is_free(storage: Any) -> bool:
    return bool(storage.expired())


_ALL: weakref.WeakSet[Streamed] = weakref.WeakSet()


def _after_fork() -> None:
    for streamed in list(_ALL):
        streamed.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
