"""Progress and notes reach whoever asked for them, and nobody else."""

from __future__ import annotations

import pytest

from clocks import Clock
from factsmith.core.executor import Local
from factsmith.core.progress import Pace, Tally, note, stage, tell


class Listener:
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int | None]] = []
        self.notes: list[tuple[str, str | None]] = []
        self.stages: list[str] = []

    def __call__(self, step: str, done: int, total: int | None) -> None:
        self.steps.append((step, done, total))

    def note(self, text: str, *, argument: str | None = None) -> None:
        self.notes.append((text, argument))

    def stage(self, name: str) -> None:
        self.stages.append(name)


class Timed:
    """A pace, and the clock that it reads."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.pace = Pace(self.clock)

    def after(self, seconds: float, step: str, done: int, total: int | None) -> float | None:
        self.clock.now += seconds
        self.pace.report(step, done, total)
        return self.pace.left()


def test_steps_and_notes_arrive() -> None:
    listener = Listener()
    tell(listener, "reading", 1, None)
    note(listener, "It takes long.", argument="max_tokens")
    assert listener.steps == [("reading", 1, None)]
    assert listener.notes == [("It takes long.", "max_tokens")]


def test_nobody_and_a_plain_function_get_no_note() -> None:
    steps: list[tuple[str, int, int | None]] = []
    for progress in (None, lambda *step: steps.append(step)):
        tell(progress, "reading", 1, 2)
        note(progress, "It takes long.")
        stage(progress, "solving")
    assert steps == [("reading", 1, 2)]


def test_a_stage_arrives() -> None:
    listener = Listener()
    stage(listener, "solving")
    assert listener.stages == ["solving"] and not listener.steps


def test_the_pace_says_how_long_the_rest_takes() -> None:
    timed = Timed()
    assert timed.after(0, "tracing", 0, 40) is None, "nothing was finished"
    assert timed.after(1, "tracing", 1, 40) is None, "one second shows little"
    assert timed.after(9, "tracing", 10, 40) == pytest.approx(30)
    timed.clock.now += 0.5
    assert timed.pace.left() == pytest.approx(29.5), "it counts down between two reports"
    assert timed.after(0.5, "tracing", 10, 40) == pytest.approx(29), "so does a report of no news"
    assert timed.after(5, "tracing", 40, 40) is None, "nothing is left"


def test_another_step_has_a_pace_of_its_own() -> None:
    timed = Timed()
    timed.after(0, "loading", 0, None)
    timed.after(100, "tracing", 0, 4)
    assert timed.after(10, "tracing", 1, 4) == pytest.approx(30), "loading does not count"
    assert timed.after(5, "tracing", 0, 4) is None, "it began again"
    assert timed.after(20, "tracing", 2, 4) == pytest.approx(20)


def test_what_was_done_before_does_not_count() -> None:
    timed = Timed()
    timed.after(0, "second moments", 900, 1000)  # a run that goes on where it stopped
    assert timed.after(10, "second moments", 910, 1000) == pytest.approx(90)


def test_a_piece_that_takes_longer_slows_the_pace() -> None:
    timed = Timed()
    timed.after(0, "batches", 0, 3)
    assert timed.after(4, "batches", 1, 3) == pytest.approx(8)
    timed.clock.now += 12  # the second of three takes three times as long, and is not done
    assert timed.pace.left() == pytest.approx(16)


@pytest.mark.parametrize("total", [None, 0])
def test_without_a_total_there_is_no_guess(total: int | None) -> None:
    timed = Timed()
    timed.after(0, "scanning", 0, total)
    assert timed.after(50, "scanning", 500, total) is None


def test_a_tally_adds_up_the_parts_of_a_step() -> None:
    listener = Listener()
    tally = Tally(listener, "verifying", 20)
    first, second = tally.part(10), tally.part(2, weight=5)
    for done in (0, 4, 4, 10, 12):  # no news is no report, and a part has an end
        first(done)
    second(1)
    second(2)
    assert [done for _, done, _ in listener.steps] == [0, 4, 10, 15, 20]
    assert {(step, total) for step, _, total in listener.steps} == {("verifying", 20)}


def test_parts_run_in_order_when_their_result_is_asked_for() -> None:
    begun: list[int] = []

    def task(part: int) -> int:
        begun.append(part)
        return part * part

    results = Local().map(task, [3, 1, 2])
    assert next(results) == 9 and begun == [3]
    assert list(results) == [1, 4] and begun == [3, 1, 2]
