"""Jobs: one after the other in one thread, with progress, cancelling and errors."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest

from factsmith.core.errors import InputError
from factsmith.core.progress import Progress, note, stage
from factsmith.studio import jobs as module
from factsmith.studio.arguments import Arguments
from factsmith.studio.jobs import BusyError, Job, Jobs, Work
from factsmith.studio.verb import Answer

PATIENCE = 20.0


def work(run: Callable[[Progress], Any], key: Hashable = None, **options: Any) -> Work:
    def do(tell: Progress) -> Answer:
        return Answer({"gave": run(tell)})

    return Work("test", "Test", do, Arguments(), key=key, **options)


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs()
    made.start("workbench")
    yield made
    made.close()


def ended(job: Job) -> Job:
    assert job.over.wait(PATIENCE)
    return job


def gave(job: Job) -> Any:
    answer = ended(job).answer
    assert answer is not None, job.error
    return answer.result["gave"]


class Gate:
    """Work that begins, reports, and goes on when it may."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.settled = False

    def __call__(self, tell: Progress) -> str:
        try:
            tell("holding", 0, 10)
            self.begun.set()
            while not self.may_end.wait(0.005):
                tell("holding", 1, 10)
        finally:
            self.settled = True
        return "held"


def test_one_thread_does_all_of_it_in_order(jobs: Jobs) -> None:
    done: list[tuple[int, int]] = []

    def step(number: int) -> Callable[[Progress], None]:
        return lambda _: done.append((number, threading.get_ident()))

    asked = [jobs.submit(work(step(number))) for number in range(20)]
    for job in asked:
        assert ended(job).state == "done"
    assert [number for number, _ in done] == list(range(20))
    assert len({thread for _, thread in done}) == 1
    assert done[0][1] != threading.get_ident()


def test_an_error_is_kept_and_the_worker_goes_on(jobs: Jobs) -> None:
    def fail(_: Progress) -> None:
        raise InputError("no such thing", argument="thing")

    job = ended(jobs.submit(work(fail)))
    assert (job.state, job.answer) == ("failed", None)
    assert isinstance(job.error, InputError)
    assert gave(jobs.submit(work(lambda _: 7))) == 7


def test_cancelling_ends_a_job_at_its_next_report(jobs: Jobs) -> None:
    gate = Gate()
    job, waiting = jobs.submit(work(gate)), jobs.submit(work(lambda _: 1))
    assert gate.begun.wait(PATIENCE)
    jobs.cancel(waiting.id)
    assert waiting.state == "cancelled" and waiting.is_over
    assert job.state == "running"
    jobs.cancel(job.id)
    assert ended(job).state == "cancelled"
    assert gate.settled, "the library's own clean-up ran"
    assert not gate.may_end.is_set()
    assert gave(jobs.submit(work(lambda _: 2))) == 2
    assert waiting.started is None, "what was cancelled while it waited never ran"


def test_a_job_that_ended_cannot_be_cancelled(jobs: Jobs) -> None:
    job = ended(jobs.submit(work(lambda _: 1)))
    jobs.cancel(job.id)
    assert job.state == "done"


def test_equal_work_is_done_once_while_it_has_an_answer(jobs: Jobs) -> None:
    times: list[int] = []
    first = jobs.submit(work(times.append, key="a"))
    ended(first)
    assert jobs.submit(work(times.append, key="a")) is first
    assert jobs.submit(work(times.append, key="b")) is not first
    assert ended(jobs.submit(work(times.append))).state == "done"
    assert len(times) == 3


def test_failed_work_is_done_again(jobs: Jobs) -> None:
    def fail(_: Progress) -> None:
        raise InputError("not yet")

    first = ended(jobs.submit(work(fail, key="a")))
    assert jobs.submit(work(lambda _: 1, key="a")) is not first


def test_progress_notes_and_warnings_reach_the_job(jobs: Jobs) -> None:
    gate = Gate()

    def run(tell: Progress) -> str:
        stage(tell, "solving")
        note(tell, "layer 3 was chosen")
        note(tell, "layer 3 was chosen")
        warnings.warn("text is short", UserWarning, stacklevel=1)
        return gate(tell)

    job = jobs.submit(work(run))
    assert gate.begun.wait(PATIENCE)
    plain = job.to_dict()
    assert (plain["state"], plain["stage"], plain["step"]) == ("running", "solving", "holding")
    assert plain["total"] == 10 and job.share in (0.0, 0.1)
    gate.may_end.set()
    assert gave(job) == "held"
    assert job.notes == ["layer 3 was chosen", "text is short"]


def test_every_change_raises_the_version(jobs: Jobs) -> None:
    gate = Gate()
    job = jobs.submit(work(gate))
    assert gate.begun.wait(PATIENCE)
    first = job.version
    time.sleep(0.05)
    assert job.version > first
    gate.may_end.set()
    ended(job)
    last = job.version
    time.sleep(0.05)
    assert job.version == last


def test_a_queue_that_is_full_says_so(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    gate = Gate()
    jobs.submit(work(gate))
    assert gate.begun.wait(PATIENCE)
    waiting = [jobs.submit(work(lambda _: 1)) for _ in range(2)]
    with pytest.raises(BusyError, match="2 jobs wait already"):
        jobs.submit(work(lambda _: 1))
    gate.may_end.set()
    assert [gave(job) for job in waiting] == [1, 1]


def test_old_jobs_are_forgotten_and_those_used_again_stay(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT", 5)
    kept = ended(jobs.submit(work(lambda _: 0, key=0)))
    for number in range(1, 12):
        ended(jobs.submit(work(lambda _: 0, key=number)))
        assert jobs.submit(work(lambda _: 0, key=0)) is kept
    deadline = time.monotonic() + PATIENCE
    while len(jobs.all()) > 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(jobs.all()) == 5 and kept in jobs.all()


def test_a_job_knows_what_it_waits_for(jobs: Jobs) -> None:
    gate = Gate()
    first, second, third = (jobs.submit(work(run)) for run in (gate, gate, lambda _: 1))
    assert gate.begun.wait(PATIENCE)
    assert third.ahead == [second, first] and first.ahead == []
    assert third.to_dict()["ahead"] == ["Test", "Test"]
    jobs.cancel(second.id)
    assert third.ahead == [first]
    gate.may_end.set()
    assert gave(third) == 1
    assert third.ahead == [] and third.before is None


def test_an_error_of_the_beginning_is_raised_by_start() -> None:
    made = Jobs()

    def begin() -> None:
        raise InputError("no model")

    with pytest.raises(InputError, match="no model"):
        made.start("workbench", begin)
    made.close()


def test_closing_cancels_what_runs_and_ends_the_worker_in_its_thread() -> None:
    made, gate, ends = Jobs(), Gate(), []
    made.start("workbench", None, lambda: ends.append(threading.get_ident()))
    running, waiting = made.submit(work(gate)), made.submit(work(lambda _: 1))
    assert gate.begun.wait(PATIENCE)
    made.close()
    assert (running.state, waiting.state) == ("cancelled", "cancelled")
    assert len(ends) == 1 and ends[0] != threading.get_ident()


def test_two_workers_do_not_wait_for_each_other(jobs: Jobs) -> None:
    jobs.start("campaign")
    gate = Gate()
    jobs.submit(work(gate, worker="campaign"))
    assert gate.begun.wait(PATIENCE)
    assert gave(jobs.submit(work(lambda _: "free"))) == "free"
    gate.may_end.set()
