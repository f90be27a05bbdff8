"""Jobs: work that waits for its turn, shows how far it is, and can be cancelled.

    jobs = Jobs()
    jobs.start("workbench", lambda: desk.open(tell), desk.close)
    job = jobs.submit(Work("trace", "Trace", run, arguments, key=("trace", ...)))
    job.over.wait()
    job.answer, job.error
    jobs.cancel(job.id)

Each worker is one thread that does one job after the other, so a workbench has one writer. A job
that is cancelled ends at its next report of progress, by an exception that the library takes like
Ctrl-C: model and ledger stay as they were.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ..core.errors import FactsmithError, InputError
from ..core.progress import Pace, Progress, Stage, in_words
from .arguments import Arguments
from .verb import Answer, Worker

State: TypeAlias = Literal["waiting", "running", "done", "failed", "cancelled"]

MOST_WAITING = 50
"""Jobs that may wait for one worker."""

_KEPT = 120
"""Jobs that are remembered after they ended."""

_RUNNING = threading.local()
"""The job that runs in the current thread, as its attribute `job`."""

_log = logging.getLogger(__name__)


class Cancelled(KeyboardInterrupt):
    """The user cancelled the job. The library takes it like Ctrl-C."""


class BusyError(InputError):
    """Too many jobs wait."""


@dataclass(frozen=True)
class Work:
    """What a job does.

    Attributes:
        verb: The name of the verb.
        title: What the job does, in a few words.
        run: Does it.
        arguments: The arguments of the verb.
        address: The page that shows the result. "": the job's own.
        key: Equal work has an equal key, and is done once while it is remembered. None: never.
        worker: Which worker does it.
    """

    verb: str
    title: str
    run: Callable[[Progress], Answer]
    arguments: Arguments
    address: str = ""
    key: Hashable = None
    worker: Worker = "workbench"


@dataclass
class Job:
    """One piece of work and how far it is.

    Attributes:
        id: Names it in addresses.
        work: What it does.
        state: Where it is.
        answer: What a job gave that is done.
        error: Why a job failed.
        created: When it was asked for, in seconds since 1970.
        started: When it began. None: it waits.
        ended: When it ended. None: it has not.
        step: What it does now.
        done: How much of the step is done.
        total: How much the step has to do. None: unknown.
        stage: Which part of the whole work runs. "": the work has one part.
        notes: Sentences for the user that came while it ran.
        wants_cancel: Whether the user has cancelled it.
        version: Grows with every change.
        pace: How fast the present step goes.
        over: Set when the job has ended.
        before: The job that was put into the queue before it, while this one waits.
    """

    id: str
    work: Work
    state: State = "waiting"
    answer: Answer | None = None
    error: Exception | None = None
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    step: str = ""
    done: int = 0
    total: int | None = None
    stage: str = ""
    notes: list[str] = field(default_factory=list)
    wants_cancel: bool = False
    version: int = 0
    pace: Pace = field(default_factory=Pace)
    over: threading.Event = field(default_factory=threading.Event)
    before: Job | None = None

    @property
    def ahead(self) -> list[Job]:
        """The jobs that must end before this one begins, the nearest first."""
        jobs, job = [], self.before
        while job is not None:
            if not job.is_over:
                jobs.append(job)
            job = job.before
        return jobs

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, in whatever way."""
        return self.over.is_set()

    @property
    def is_useful(self) -> bool:
        """Whether it has an answer, or will have one."""
        return self.state not in ("cancelled", "failed") and not self.wants_cancel

    @property
    def share(self) -> float | None:
        """How much of the present step is done, from 0 to 1. None: unknown."""
        return None if not self.total else min(self.done / self.total, 1.0)

    @property
    def seconds(self) -> float:
        """How long it has run, or ran."""
        if self.started is None:
            return 0.0
        return (time.time() if self.ended is None else self.ended) - self.started

    @property
    def left(self) -> str:
        """How long the present step still takes, in words; "" where nobody knows."""
        seconds = self.pace.left() if self.state == "running" else None
        return "" if seconds is None else f"about {in_words(seconds)} left"

    def to_dict(self) -> dict[str, object]:
        """Return how far it is, as plain JSON values."""
        return {
            "id": self.id,
            "verb": self.work.verb,
            "title": self.work.title,
            "state": "cancelling" if self.wants_cancel and not self.is_over else self.state,
            "stage": self.stage,
            "step": self.step,
            "done": self.done,
            "total": self.total,
            "seconds": round(self.seconds, 1),
            "left": self.left,
            "ahead": [job.work.title for job in self.ahead],
            "notes": list(self.notes),
            "address": self.work.address or f"/jobs/{self.id}",
        }


class _Reporter:
    """The progress of a job. It ends a job that was cancelled."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Keep how far the job is.

        Raises:
            Cancelled: when the user has cancelled it.
        """
        job = self.job
        if job.wants_cancel:
            raise Cancelled
        job.pace.report(step, done, total)
        job.step, job.done, job.total = step, done, total
        job.version += 1

    def note(self, text: str, *, argument: str | None = None) -> None:
        """Keep a sentence for the user."""
        if text not in self.job.notes:
            self.job.notes.append(text)
            self.job.version += 1

    def stage(self, name: Stage) -> None:
        """Keep which part of the work runs."""
        self.job.stage = name
        self.job.version += 1


class Jobs:
    """The jobs of a studio, and the threads that do them."""

    def __init__(self) -> None:
        """Begin without workers and without jobs."""
        self._jobs: dict[str, Job] = {}
        self._by_key: dict[Hashable, Job] = {}
        self._last: dict[Worker, Job] = {}
        self._queues: dict[Worker, queue.SimpleQueue[Job | None]] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        self._hearing = warnings.catch_warnings()
        self._hearing.__enter__()
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _hear(message)

    # ── workers ───────────────────────────────────────────────────────────────────────────────────

    def start(
        self,
        worker: Worker,
        begin: Callable[[], object] | None = None,
        end: Callable[[], object] | None = None,
    ) -> None:
        """Start a worker, and return when it has begun.

        Args:
            worker: Its name.
            begin: Called first, in its thread; its error is raised here.
            end: Called last, in its thread.
        """
        began: Future[None] = Future()
        self._queues[worker] = queue.SimpleQueue()
        context = contextvars.copy_context()  # how models are loaded, and how errors are printed
        thread = threading.Thread(
            target=lambda: context.run(self._work, worker, begin, end, began),
            name=f"studio-{worker}",
            daemon=True,
        )
        self._threads.append(thread)
        thread.start()
        began.result()

    def close(self) -> None:
        """Cancel what runs and what waits, and end the workers."""
        self._closed = True
        for job in self.all():
            self.cancel(job.id)
        for waiting in self._queues.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join()
        self._hearing.__exit__(None, None, None)

    def _work(
        self,
        worker: Worker,
        begin: Callable[[], object] | None,
        end: Callable[[], object] | None,
        began: Future[None],
    ) -> None:
        """Do one job after the other, in the worker's thread."""
        try:
            if begin is not None:
                begin()
        except BaseException as error:
            began.set_exception(error)
            return
        began.set_result(None)
        try:
            while (job := self._queues[worker].get()) is not None:
                self._do(job)
        finally:
            if end is not None:
                end()

    def _do(self, job: Job) -> None:
        """Do one job, and keep its answer or its error."""
        with self._lock:
            if job.is_over:  # it was cancelled while it waited
                return
            job.started, job.state, job.before = time.time(), "running", None
            job.version += 1
        _RUNNING.job = job
        try:
            job.answer = job.work.run(_Reporter(job))
            job.state = "done"
        except KeyboardInterrupt:
            job.state = "cancelled"
        except Exception as error:
            if not isinstance(error, FactsmithError):
                _log.exception("the job %r failed", job.work.verb)
            job.error, job.state = error, "failed"
        finally:
            _RUNNING.job = None
            job.ended = time.time()
            job.version += 1
            job.over.set()
            self._forget()

    # ── jobs ──────────────────────────────────────────────────────────────────────────────────────

    def submit(self, work: Work) -> Job:
        """Put work into its worker's queue. Equal work that is remembered is not done again.

        Raises:
            BusyError: when too many jobs wait.
        """
        with self._lock:
            known = None if work.key is None else self._by_key.get(work.key)
            if known is not None and known.is_useful:
                self._jobs[known.id] = self._jobs.pop(known.id)  # used again: forgotten last
                return known
            waiting = [job for job in self._jobs.values() if job.state == "waiting"]
            if len(waiting) >= MOST_WAITING or self._closed:
                raise BusyError(
                    f"{len(waiting)} jobs wait already; cancel some on the page Jobs, or try again "
                    "when they are done"
                )
            job = Job(secrets.token_hex(6), work, before=self._last.get(work.worker))
            self._jobs[job.id] = self._last[work.worker] = job
            if work.key is not None:
                self._by_key[work.key] = job
            self._queues[work.worker].put(job)
            return job

    def get(self, identity: str) -> Job | None:
        """Return a job that is remembered, by its id."""
        return self._jobs.get(identity)

    def all(self) -> list[Job]:
        """Return every job that is remembered, the newest first."""
        return sorted([*self._jobs.values()], key=lambda job: -job.created)

    def cancel(self, identity: str) -> Job | None:
        """Cancel a job that waits or runs, and return it. One that runs ends at its next report."""
        with self._lock:
            job = self._jobs.get(identity)
            if job is not None and not job.is_over:
                job.wants_cancel = True
                if job.state == "waiting":
                    job.state, job.ended = "cancelled", time.time()
                    job.over.set()
                job.version += 1
            return job

    def _forget(self) -> None:
        """Drop the jobs that ended long ago."""
        with self._lock:
            over = [job for job in self._jobs.values() if job.is_over]
            for job in over[: max(len(over) - _KEPT, 0)]:
                del self._jobs[job.id]
                if self._by_key.get(job.work.key) is job:
                    del self._by_key[job.work.key]


def _hear(message: Warning | str) -> None:
    """Give a warning to the job that runs in this thread, or to whom it would go otherwise."""
    job: Job | None = getattr(_RUNNING, "job", None)
    if job is None:
        _log.warning("%s", message)
    elif str(message) not in job.notes:
        job.notes.append(str(message))
        job.version += 1
