"""What carries adapters: a class for each kind of server, with the methods of `Carrier`.

carrier.adapters()                              # what the server carries now
adapter = carrier.chosen(making)                # its name in the server
carrier.put(making)                             # there, and not yet announced
carrier.voice(adapter), carrier.base_voice()    # what to ask
carrier.settle(adapter)                         # the proof passed
carrier.withdraw(adapter)                       # it did not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...remote.server import Server
from .expected import Expected
from .proof import Voice


@dataclass(frozen=True)
class Adapter:
    """An adapter that a server carries.

    Attributes:
        name: Its name in the server.
        path: Where the server has read it.
        is_on: Whether requests use it: in vLLM those that name it, in llama.cpp all.
    """

    name: str
    path: str
    is_on: bool


@dataclass(frozen=True)
class Making:
    """An adapter that is to be put into a server.

    Attributes:
        name: The name of the push.
        revision: The id of the revision.
        folder: Where the adapter is written.
        seen_as: The same folder, as the server sees it.
        write: Writes the adapter into a folder that it is given, and returns its rank.
    """

    name: str
    revision: str
    folder: Path
    seen_as: str
    write: Callable[[Path], int]


class Carrier(Protocol):
    """A server as something that carries adapters."""

    server: Server

    def check(self, revisions: Sequence[str]) -> None:
        """Raise an error if the server cannot take adapters of these revisions."""

    def adapters(self) -> list[Adapter]:
        """Return what the server carries, in the order in which it came."""

    def held(self, revisions: Sequence[str]) -> Mapping[str, str]:
        """Return {name of an adapter: the revision that it holds}, of those that hold one of these.

        Args:
            revisions: The ids of the workspace's revisions.
        """

    def chosen(self, making: Making) -> Adapter:
        """Return what the adapter is going to be in the server."""

    def put(self, making: Making) -> None:
        """Make the server carry the adapter. Nobody uses it yet."""

    def base_voice(self) -> Voice:
        """Return what to ask for the answers without patches of factsmith."""

    def voice(self, adapter: Adapter) -> Voice:
        """Return what to ask for the answers with an adapter."""

    def settle(self, adapter: Adapter, expected: Expected) -> None:
        """Let users have an adapter whose proof passed."""

    def withdraw(self, adapter: Adapter) -> None:
        """Take an adapter out of use; raises ServerError if it stays in use."""

    def model_of(self, adapter: Adapter | None) -> str:
        """Return the name of the model that users ask for; of the base model without adapter."""
