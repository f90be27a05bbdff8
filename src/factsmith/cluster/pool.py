"""Workers of one engine: they are started, given parts, watched, and replaced when they die.

    pool = Pool(start, n=4)                 # start() makes an actor
    pool.wait(seconds)                      # until something happened
    pool.idle()                             # seats that can take a part

Nothing here knows what a part is.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import ClusterError
from ..core.progress import Progress, note
from .installed import need_ray, why
from .worker import VERSIONS, Hello

PATIENCE = 90.0
"""Seconds that pass without any worker, while there is work, before an error is raised."""


HEAD_SECONDS = 5.0
"""Seconds between two looks at the head while nothing happens."""

STILLBORN = 3
"""Workers that may die in a row before they say anything, for each place."""


@dataclass(eq=False)
class Seat:
    """The place of one worker.

    Attributes:
        actor: The worker.
        greeting: A reference to what it says first. None: it said it.
        hello: What it said.
        owner: The run whose part it does. None: it is idle, or nobody waits for what it does.
        number: The number of that part.
        part_id: The name of the part, by which the worker knows it.
        answer: A reference to what the part gives. None: it is idle.
        began: When the part was given to it.
        asked: A reference to how much of the part is done. None: it was not asked.
        done: How much of the part was done when it was last asked.
    """

    actor: Any
    greeting: Any
    hello: Hello | None = None
    owner: Any = None
    number: int = 0
    part_id: str = ""
    answer: Any = None
    began: float = 0.0
    asked: Any = None
    done: int = 0


@dataclass
class Pool:
    """The workers.

    Attributes:
        start: Starts a worker and returns it.
        n: How many there shall be.
        wants: What a worker takes, in words, for errors.
        head: The host and port of the head of the cluster. None: it is not looked at.
        progress: Gets notes.
        seats: Their places.
        lost: How many died.
        stillborn: How many died in a row before they said anything.
        closed: Whether the workers were stopped.
        lock: Held while parts are handed out and answers collected, since runs may share workers.
    """

    start: Callable[[], Any]
    n: int
    wants: str
    head: tuple[str, int] | None = None
    progress: Progress | None = None
    seats: list[Seat] = field(default_factory=list)
    lost: int = 0
    stillborn: int = 0
    closed: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    _head_seen: float = field(default_factory=time.monotonic)
    _alone_since: float = field(default_factory=time.monotonic)

    def fill(self) -> None:
        """Start as many workers as are missing."""
        while len(self.seats) < self.n:
            actor = self.start()
            self.seats.append(Seat(actor, actor.hello.remote()))

    def idle(self) -> list[Seat]:
        """Return the places of workers that can take a part."""
        return [seat for seat in self.seats if seat.hello is not None and seat.answer is None]

    @property
    def n_ready(self) -> int:
        """Number of workers that are there."""
        return sum(seat.hello is not None for seat in self.seats)

    def wait(self, seconds: float) -> list[tuple[Seat, Any]]:
        """Wait until a worker is there or a part is done, and return the parts that are.

        A worker that died is replaced, and its part comes back with the error.

        Args:
            seconds: How long to wait at most.

        Returns:
            [(the place, what the part gave)]. What it gave is an error of Ray if the worker died.

        Raises:
            ClusterError: There has been no worker for a long time, or one has other versions.
        """
        ray = need_ray()
        waited = {seat.greeting or seat.answer: seat for seat in self.seats}
        waited.pop(None, None)
        ready, _ = ray.wait(list(waited), num_returns=len(waited), timeout=0) if waited else ([], 0)
        if waited and not ready:
            ready, _ = ray.wait(list(waited), num_returns=1, timeout=seconds)
        if not ready:
            self._check_head()
        finished = []
        for reference in ready:
            seat = waited[reference]
            try:
                value = ray.get(reference)
            except ray.exceptions.RayError as error:
                value = error
                self._replace(seat, error)
            if seat.greeting is not None:
                seat.greeting = None
                if isinstance(value, Hello):
                    seat.hello, self.stillborn = value, 0
                    _check_versions(value)
                continue
            finished.append((seat, value))
            seat.answer = None
        self._check_any()
        return finished

    def ask_how_far(self) -> None:
        """Ask busy workers how much of their part is done, and note what they said before."""
        ray = need_ray()
        for seat in self.seats:
            if seat.asked is not None:
                ready, _ = ray.wait([seat.asked], timeout=0)
                if not ready:
                    continue
                try:
                    part_id, done = ray.get(seat.asked)
                except ray.exceptions.RayError:
                    continue  # it died, which `wait` notices
                finally:
                    seat.asked = None
                if part_id == seat.part_id:  # else it speaks of the part before
                    seat.done = done
            if seat.owner is not None:
                seat.asked = seat.actor.done.remote()

    def close(self) -> None:
        """Stop all workers."""
        ray = need_ray()
        self.closed = True
        for seat in self.seats:
            ray.kill(seat.actor)
        self.seats.clear()

    def _replace(self, seat: Seat, error: Exception) -> None:
        """Start another worker in the place of one that died."""
        self.seats.remove(seat)
        self.lost += 1
        need_ray().kill(seat.actor)
        if seat.hello is None:
            self.stillborn += 1
            if self.stillborn >= STILLBORN * self.n:
                raise ClusterError(
                    f"workers cannot start. Ray says of the last: {why(error)}. The folder logs "
                    "of Ray's session holds what it printed"
                ) from error
        where = "" if seat.hello is None else f" (process {seat.hello.pid})"
        note(self.progress, f"a worker died{where}; another one takes its place")
        self.fill()

    def _check_head(self) -> None:
        """Check now and then that the head of the cluster is there.

        Ray itself waits a minute for it, and then ends the program without a word.
        """
        now = time.monotonic()
        if self.head is None or now - self._head_seen < HEAD_SECONDS:
            return
        try:
            socket.create_connection(self.head, HEAD_SECONDS).close()
        except OSError as error:
            self.closed = True
            raise ClusterError(
                f"the head of the cluster at {self.head[0]}:{self.head[1]} is gone ({error}). Start"
                " it again, and run this again; what kept a checkpoint goes on from there"
            ) from None
        self._head_seen = now

    def _check_any(self) -> None:
        now = time.monotonic()
        if self.n_ready:
            self._alone_since = now
        elif now - self._alone_since > PATIENCE:
            ray = need_ray()
            raise ClusterError(
                f"no worker could be started in {PATIENCE:.0f} seconds. A worker wants "
                f"{self.wants}; the cluster has {_in_words(ray.available_resources())} free of "
                f"{_in_words(ray.cluster_resources())}. Ask for less, or add machines"
            )


def _in_words(resources: dict[str, float]) -> str:
    """Return CPUs, GPUs and custom resources in words."""
    left_out = ("node:", "memory", "object_store_memory", "accelerator_type:")
    amounts = {name: n for name, n in sorted(resources.items()) if not name.startswith(left_out)}
    return ", ".join(f"{n:g} {name}" for name, n in amounts.items()) or "nothing"


def _check_versions(hello: Hello) -> None:
    """Raise a ClusterError if a worker has other versions than this process."""
    wrong = {k: v for k, v in hello.versions.items() if v != VERSIONS[k]}
    if wrong:
        theirs = ", ".join(f"{name} {version}" for name, version in wrong.items())
        ours = ", ".join(f"{name} {VERSIONS[name]}" for name in wrong)
        raise ClusterError(
            f"a worker has {theirs}; this process has {ours}. Install the same versions on all "
            "machines"
        )
