"""Weights that are in no memory: where each belongs, and how it is read.

    place_of(parameter)        # the Place of a parameter without storage; otherwise None
    whole(parameter)           # its numbers; those of a layer that stays on disk are read

`streamed` reads whole layers, and puts them in these places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

_SIZES = ("in_features", "out_features", "nf", "nx")
"""Attributes in which linears keep their sizes. A change may widen a layer."""


class Reader(Protocol):
    """What reads layers. It numbers them."""

    def weight(self, place: Place) -> Tensor:
        """Return one weight with all changes."""

    def state(self, index: int) -> tuple[int, ...]:
        """Return what differs after a weight of a layer has changed."""


class Absent(nn.Parameter):
    """A parameter without storage.

    Attributes:
        place: Reads its numbers. A copy, or a pickle, gets it from the reader that is copied too.
    """

    place: Place

    def __reduce_ex__(self, protocol: object) -> Any:
        others = {name: x for name, x in vars(self).items() if name != "place"}
        return _absent, (tuple(self.shape), self.dtype, others)

    def __deepcopy__(self, memo: dict[int, object]) -> Absent:
        make, given = self.__reduce_ex__(4)
        memo[id(self)] = copied = make(*given)
        return copied  # type: ignore[no-any-return]


def _absent(shape: Sequence[int], dtype: torch.dtype, others: Mapping[str, Any]) -> Absent:
    absent = Absent(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    vars(absent).update(others)
    return absent


@dataclass(frozen=True, eq=False)
class Place:
    """Where one weight of a streamed layer belongs, and how it is read.

    Attributes:
        streamed: The reader.
        index: Its number for the layer.
        module: The part that holds the weight.
        name: The weight's name in the part.
        fetch: Reads the weight as the file has it, in the dtype of the model.
        device: The device on which the layer runs.
        file: The file. None: the weight is in memory.
        stored: Its name in the file.
    """

    streamed: Reader
    index: int
    module: nn.Module
    name: str
    fetch: Callable[[], Tensor]
    device: torch.device
    file: str | None = None
    stored: str = ""

    def read(self) -> Tensor:
        """Return the weight with all changes. The caller must not write it."""
        return self.streamed.weight(self)

    @property
    def state(self) -> object:
        """What differs after the weight has changed."""
        return self.name, *self.streamed.state(self.index)


class Layer(NamedTuple):
    """A layer, and its weights without storage.

    Attributes:
        module: The layer.
        places: Where its weights belong.
        absent: For each place, the parameter without storage.
        sizes: The sizes of its parts: (part, name, number).
    """

    module: nn.Module
    places: tuple[Place, ...]
    absent: tuple[Absent, ...]
    sizes: tuple[tuple[nn.Module, str, int], ...]

    def put(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put parameters in their places."""
        for place, parameter in zip(self.places, parameters, strict=True):
            place.module._parameters[place.name] = parameter

    def size(self) -> None:
        """Give the parts their sizes."""
        for part, name, number in self.sizes:
            setattr(part, name, number)

    def place_all(self) -> None:
        """Let the parameters without storage know their places."""
        for place, absent in zip(self.places, self.absent, strict=True):
            absent.place = place

    def present(self) -> list[nn.Parameter]:
        """Return the parameters that are in the places."""
        parameters = [place.module._parameters[place.name] for place in self.places]
        return [parameter for parameter in parameters if parameter is not None]


class Fetch(NamedTuple):
    """How a weight is read.

    Attributes:
        read: Returns it as the file has it, in the dtype of the model.
        device: The device that it goes to.
        file: The file. None: it is in memory.
        stored: Its name in the file.
    """

    read: Callable[[], Tensor]
    device: torch.device
    file: str | None = None
    stored: str = ""


def place_of(tensor: Tensor) -> Place | None:
    """Return the place of a weight that is not in memory; None for every other tensor."""
    return tensor.place if isinstance(tensor, Absent) else None


def whole(tensor: Tensor) -> Tensor:
    """Return a parameter's numbers, detached. Those of a streamed layer are read."""
    place = place_of(tensor)
    return tensor.detach() if place is None else place.read()


def device_of(tensor: Tensor) -> torch.device:
    """Return the device on which a parameter is used."""
    place = place_of(tensor)
    return tensor.device if place is None else place.device


def stamp(path: str) -> tuple[int, int]:
    """Return the size of a file and its time of change in nanoseconds; zeros if it is missing."""
    try:
        state = Path(path).stat()
    except OSError:
        return 0, 0
    return state.st_size, state.st_mtime_ns


def absent_like(place: Place, like: nn.Parameter) -> Absent:
    """Return a parameter without storage."""
    others = {name: x for name, x in vars(like).items() if name != "place"}
    absent = _absent(tuple(like.shape), like.dtype, others)
    absent.place = place
    return absent


def sizes_of(places: Sequence[Place]) -> tuple[tuple[nn.Module, str, int], ...]:
    """Return the sizes of the parts that hold weights."""
    parts = dict.fromkeys(place.module for place in places)
    return tuple(
        (part, name, int(vars(part)[name]))
        for part in parts
        for name in _SIZES
        if name in vars(part)
    )
