"""A studio that runs: its desk, its jobs, and how a verb is asked for.

studio = Studio(desk)
studio.open(tell)
job = studio.submit(TRACE, arguments)
await finished(job, 0.3)
studio.close()
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from ..core.errors import FactsmithError
from ..core.progress import Progress
from ..keep.revision import Revision
from .arguments import Arguments, Source
from .desk import CURRENT, Desk
from .jobs import Job, Jobs, Work
from .rooms import ROOMS, Room
from .verb import Answer, Verb

_OFFERED = 100
"""The newest revisions, which a form offers."""

_SETTLED = 3 * 10**9
"""Nanoseconds since a ledger's file was written, after which the commit can be read. SQLite writes
the file first, and others read the old records until the disk has it."""

_LOOK_AGAIN = 0.01
"""Seconds between two looks at a job that somebody waits for."""


@dataclass(frozen=True)
class Standing:
    """Where the workspace stands.

    Attributes:
        current: The id of the revision that is checked out, or "base".
        head: The id of the newest revision, or "base".
        active: The patches in effect, the oldest first.
    """

    current: str
    head: str
    active: tuple[Revision, ...]

    @property
    def is_newest(self) -> bool:
        """Whether the newest revision is checked out, so that patches can be added."""
        return self.current == self.head


@dataclass
class Studio:
    """A desk and its jobs.

    Attributes:
        desk: The models.
        rooms: What it does, room by room.
        jobs: The work on them.
        closing: Set when the studio ends; streams of events end then.
    """

    desk: Desk
    rooms: tuple[Room, ...] = ROOMS
    jobs: Jobs = field(default_factory=Jobs)
    closing: threading.Event = field(default_factory=threading.Event)
    _standing: tuple[tuple[int, ...], Standing] | None = None

    def open(self, tell: Progress) -> None:
        """Open the workbench and start the workers; errors of opening are raised here."""
        self.jobs.start("workbench", lambda: self.desk.open(tell), self.desk.close)
        self.jobs.start("campaign")

    def close(self) -> None:
        """Cancel the jobs, and close the workbench."""
        self.closing.set()
        self.jobs.close()

    # ── verbs ─────────────────────────────────────────────────────────────────────────────────────

    def submit(self, verb: Verb[Any], arguments: Arguments) -> Job:
        """Put a verb into its worker's queue. A reading that is known is not done again.

        Raises:
            InputError: for a model or a revision that is not there.
            RevisionError: for a revision that is not there.
            BusyError: when too many jobs wait.
        """
        key = None
        if isinstance(arguments, Source):
            self.desk.resolve(arguments.revision, arguments.model)
        if verb.kind == "read" and verb.cached:
            at, more = self.standing, None if verb.depends is None else verb.depends()
            key = (verb.name, arguments.model_dump_json(), at.current, at.head, more)
        return self.jobs.submit(self._work(verb, arguments, key))

    def _work(self, verb: Verb[Any], arguments: Arguments, key: Hashable) -> Work:
        """Return a verb with its arguments as work."""

        def run(tell: Progress) -> Answer:
            if verb.worker == "workbench":
                self.desk.bench.follow()
            return verb.run(self.desk, arguments, tell)

        room = next(room for room in self.rooms if verb in room.verbs)
        address = "" if verb.kind == "write" else room.address(verb, arguments)
        return Work(verb.name, verb.title, run, arguments, address, key, verb.worker)

    async def ask(self, verb: Verb[Any], arguments: Arguments, wait: float | None) -> Job:
        """Return the job of a verb when it is over, or after some time.

        Args:
            verb: The verb.
            arguments: Its arguments.
            wait: The longest time to wait, in seconds. None: until it is over.

        Raises what `submit` raises.
        """
        if verb.kind == "instant":
            return await run_in_threadpool(self._at_once, verb, arguments)
        job = await run_in_threadpool(self.submit, verb, arguments)
        await finished(job, wait)
        return job

    def _at_once(self, verb: Verb[Any], arguments: Arguments) -> Job:
        """Return the job of a verb that needs no model, which is over."""
        job = Job("", self._work(verb, arguments, None))
        job.started = time.time()
        try:
            job.answer = verb.run(self.desk, arguments, lambda *_: None)
            job.state = "done"
        except FactsmithError as error:
            job.error, job.state = error, "failed"
        job.ended = time.time()
        job.over.set()
        return job

    def revision_options(self) -> list[tuple[str, str]]:
        """Return (value, label) of the revisions that a form offers."""
        options = [(CURRENT, "as checked out"), ("base", "base: no patch"), ("latest", "latest")]
        with self.desk.ledger() as ledger:
            revisions = ledger.log()[:_OFFERED]
        return [*options, *((each.id, f"{each.id[:10]}  {each.message}") for each in revisions)]

    # ── the workspace ─────────────────────────────────────────────────────────────────────────────

    @property
    def standing(self) -> Standing:
        """Where the workspace stands now, also when another process has moved it."""
        stamp = self._stamp()
        known = self._standing
        if known is not None and known[0] == stamp and time.time_ns() - max(stamp) > _SETTLED:
            return known[1]
        with self.desk.ledger() as ledger:
            current = ledger.current
            standing = Standing(current, ledger.head, tuple(ledger.active(current)))
        self._standing = (stamp, standing)
        return standing

    def _stamp(self) -> tuple[int, ...]:
        """Return numbers that change whenever the ledger's files do."""
        numbers: list[int] = []
        for name in ("ledger.db", "ledger.db-wal"):
            try:
                status = (self.desk.folder / name).stat()
            except FileNotFoundError:
                numbers += [0, 0]
            else:
                numbers += [status.st_mtime_ns, status.st_size]
        return tuple(numbers)


async def finished(job: Job, wait: float | None) -> None:
    """Wait until a job is over, or for so many seconds."""
    end = None if wait is None else time.monotonic() + wait
    while not job.is_over and (end is None or time.monotonic() < end):
        await asyncio.sleep(_LOOK_AGAIN)
