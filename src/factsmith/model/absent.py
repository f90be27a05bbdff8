"""Weights that are in no memory: where each belongs, and how it is read.

    place_of(parameter)        # the Place of a parameter without storage; otherwise None
    whole(parameter)           # its numbers; those of a layer that stays on disk are read

`streamed` reads whole layers, and puts them in these places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

_PLACE = "factsmith_place"
"""Attribute of a parameter without storage: the Place that reads it."""

_SIZES = ("in_features", "out_features", "nf", "nx")
"""Attributes in which linears keep their sizes. A change may widen a layer."""


class Reader(Protocol):
    """What reads layers. It numbers them."""

    def weight(self, place: Place) -> Tensor:
        """Return one weight with all changes."""

    def state(self, index: int) -> tuple[int, ...]:
        """Return what differs after a weight of a layer has changed."""


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
    """

    streamed: Reader
    index: int
    module: nn.Module
    name: str
    fetch: Callable[[], Tensor]
    device: torch.device

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
    absent: tuple[nn.Parameter, ...]
    sizes: tuple[tuple[nn.Module, str, int], ...]

    def put(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put parameters in their places."""
        for place, parameter in zip(self.places, parameters, strict=True):
            place.module._parameters[place.name] = parameter

    def size(self) -> None:
        """Give the parts their sizes."""
        for part, name, number in self.sizes:
            setattr(part, name, number)

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
    """

    read: Callable[[], Tensor]
    device: torch.device
    file: str | None


def place_of(tensor: Tensor) -> Place | None:
    """Return the place of a weight that is not in memory; None for every other tensor."""
    return getattr(tensor, _PLACE, None)


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


def absent_like(place: Place, like: nn.Parameter) -> nn.Parameter:
    """Return a parameter without storage."""
    absent = nn.Parameter(torch.empty_like(like, device="meta"), requires_grad=False)
    vars(absent).update(vars(like))
    setattr(absent, _PLACE, place)
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
