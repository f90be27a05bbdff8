"""Progress and notes reach whoever asked for them, and nobody else."""

from __future__ import annotations

from factsmith.core.executor import Local
from factsmith.core.progress import note, tell


class Listener:
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int | None]] = []
        self.notes: list[tuple[str, str | None]] = []

    def __call__(self, step: str, done: int, total: int | None) -> None:
        self.steps.append((step, done, total))

    def note(self, text: str, *, argument: str | None = None) -> None:
        self.notes.append((text, argument))


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
    assert steps == [("reading", 1, 2)]


def test_parts_run_in_order_when_their_result_is_asked_for() -> None:
    begun: list[int] = []

    def task(part: int) -> int:
        begun.append(part)
        return part * part

    results = Local().map(task, [3, 1, 2])
    assert next(results) == 9 and begun == [3]
    assert list(results) == [1, 4] and begun == [3, 1, 2]
