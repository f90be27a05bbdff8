"""Take turns with a model: many threads may ask it at once, and one may change it.

    with turn(lm): ...                  # ask; the weights stay the same meanwhile
    with turn(lm, changes=True): ...    # change weights; other threads wait

    @asking()                           # the same for a function whose first argument is a model
    def trace(lm, ...): ...

A thread that asks waits while another thread changes the model, and the other way round. A thread
that has a turn gets every further turn at once. Models that share an input embedding share their
turns. While anybody has a turn, the model is in the state that `modes` describes.

A turn that is a `block` runs code of the user. Such code may wait for a thread that waits for the
block. So a wait for a block ends with an error after `PATIENCE` seconds. A wait for factsmith's own
work has no limit. A thread that runs in a copy of the block's context, as `asyncio.to_thread` does,
counts as the block's own thread.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from ..core.errors import ModelError
from ..core.settled import settled
from .modes import Modes

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE = 60.0
"""Seconds to wait for another thread's block before an error is raised."""

_LOOK_AGAIN = 0.2
"""Seconds after which a waiting thread looks again. A turn that a Ctrl-C tore ends silently."""

_BLOCKS: ContextVar[frozenset[int]] = ContextVar("blocks", default=frozenset())
"""Numbers of the blocks that the current code runs in."""

_numbers = itertools.count()


class Turn:
    """One thread's turn with a model, from `__enter__` to `__exit__`.

    Attributes:
        module: The model.
        changes: Whether weights change, so that no other thread may have a turn.
        block: The number of a turn in which the user's code runs, or None. A turn within another
            one has none.
        thread: The thread that has the turn.
    """

    def __init__(self, module: nn.Module, turns: Turns, changes: bool, block: bool) -> None:
        self.module, self.turns, self.changes = module, turns, changes
        self.block = next(_numbers) if block else None
        self.thread = threading.get_ident()

    def __enter__(self) -> None:
        self.turns.take(self)
        if self.block is not None:
            _BLOCKS.set(_BLOCKS.get() | {self.block})

    def __exit__(self, *_: object) -> None:
        if self.block is not None:
            _BLOCKS.set(_BLOCKS.get() - {self.block})
        self.turns.give(self)


class Turns:
    """Whose turn it is with one model.

    Attributes:
        held: The turns that threads have. A turn whose `with` statement is gone leaves by itself.
        queue: The turns to change the model that threads wait for.
        modes: The state of the model while anybody has a turn.
    """

    def __init__(self) -> None:
        self.free = threading.Condition(threading.RLock())
        self.held: weakref.WeakSet[Turn] = weakref.WeakSet()
        self.queue: list[Turn] = []
        self.modes = Modes()

    def take(self, turn: Turn) -> None:
        """Wait until a turn can begin, and begin it.

        Raises:
            ModelError: Another thread's block did not end in time, or two threads would wait for
                each other.
        """
        with self.free:
            mine = self._mine(turn)
            if mine:  # the outermost turn decides what others wait for
                turn.block = None
            if not mine or (turn.changes and not any(other.changes for other in mine)):
                self._wait(turn, mine)
            self.modes.settle(turn.module)
            self.held.add(turn)

    def give(self, turn: Turn) -> None:
        """End a turn. The last one gives the model its own state back."""
        with self.free:
            self.held.discard(turn)
            if not self.held:
                self.modes.restore()
            self.free.notify_all()

    def _mine(self, turn: Turn) -> list[Turn]:
        """Return the turns that the current thread has, or in whose block it runs."""
        blocks = _BLOCKS.get()
        return [t for t in self.held if t.thread == turn.thread or t.block in blocks]

    def _wait(self, turn: Turn, mine: list[Turn]) -> None:
        """Wait until no other thread's turn is in the way."""
        start = time.monotonic()
        if turn.changes:
            self.queue.append(turn)
        try:
            while self._must_wait(turn, mine, time.monotonic() - start):
                self.free.wait(_LOOK_AGAIN)
        finally:
            if turn.changes:
                self.queue.remove(turn)
                self.free.notify_all()

    def _must_wait(self, turn: Turn, mine: list[Turn], waited: float) -> bool:
        """Return whether another thread's turn is in the way.

        This is a function of its own because a reference to a turn would keep it alive.
        """
        others = [t for t in self.held if t not in mine]
        # Those who want to change the model go before those who ask. Otherwise they would never.
        if not (others if turn.changes else [t for t in (*others, *self.queue) if t.changes]):
            return False
        if turn.changes and mine:
            self._check_upgrade(turn, others)
        if waited > PATIENCE and any(t.block is not None for t in others):
            raise ModelError(
                f"another thread has had a block that changes this model open for {PATIENCE:g} "
                "seconds; end that block, run this call inside it in a copy of its context "
                "(asyncio.to_thread, or contextvars.copy_context().run), or give each thread a "
                "model of its own"
            )
        return True

    def _check_upgrade(self, turn: Turn, others: list[Turn]) -> None:
        """Raise ModelError if a thread that asks waits, as this one does, to change the model."""
        asking = {t.thread for t in others}
        if any(t is not turn and t.thread in asking for t in self.queue):
            raise ModelError(
                "two threads ask this model, and both want to change its weights, so each waits "
                "for the other; run one after the other, or give each thread a model of its own"
            )

    def forget_other_threads(self) -> None:
        """Drop what only the parent process has: its lock and its other threads' turns."""
        me = threading.get_ident()
        self.free = threading.Condition(threading.RLock())
        self.queue.clear()
        for turn in [t for t in self.held if t.thread != me]:
            self.held.discard(turn)
        if not self.held:
            self.modes.restore()


_TURNS: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _turns_of(lm: Any) -> Turns:
    """Return the turns of a model: those of its input embedding."""
    turns = _TURNS.get(lm.embedding)
    if turns is None:
        with _making:
            turns = _TURNS.setdefault(lm.embedding, Turns())
    return turns


def turn(lm: Any, *, changes: bool = False, block: bool = False) -> Turn:
    """Return a turn with a model, for a `with` statement.

    Args:
        lm: The LanguageModel.
        changes: Whether weights change meanwhile.
        block: Whether the user's code runs meanwhile.
    """
    return Turn(lm.module, _turns_of(lm), changes, block)


def _turn_with(first: Any, changes: bool) -> AbstractContextManager[None]:
    """Return a turn with the model that an argument is or carries; without a model, nothing."""
    lm = getattr(first, "lm", first)
    if hasattr(lm, "embedding") and isinstance(getattr(lm, "module", None), nn.Module):
        return turn(lm, changes=changes)
    return nullcontext()


def asking(
    *, grad: bool = False, changes: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a function a turn with the model that is, or is carried by, its first argument.

    It runs under known switches of torch (`core.settled`).

    Args:
        grad: Whether gradients are recorded.
        changes: Whether weights change meanwhile.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            first = args[0] if args else kwargs.get("lm", kwargs.get("bench"))
            with settled(grad=grad), _turn_with(first, changes):
                return function(*args, **kwargs)

        return run

    return decorate


def _after_fork() -> None:
    """A child process has one thread only, and locks of other threads stay locked in it."""
    global _making
    _making = threading.Lock()
    for turns in list(_TURNS.values()):
        turns.forget_other_threads()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
