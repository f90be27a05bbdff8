"""The executor of this process."""

from __future__ import annotations

import pytest

from factsmith.core.errors import InputError
from factsmith.core.executor import Local, executor_in_use, report_done, running_on


def test_parts_run_in_order_when_their_results_are_asked_for() -> None:
    began: list[int] = []

    def double(part: int) -> int:
        began.append(part)
        return 2 * part

    results = Local().map(double, [3, 1, 2])
    assert not began
    assert next(results) == 6 and began == [3]
    assert list(results) == [2, 4] and began == [3, 1, 2]


def test_reports_of_the_parts_are_added_up() -> None:
    def count(part: int) -> int:
        for n in range(1, part + 1):
            report_done(n)
        return part

    reports: list[int] = []
    assert list(Local().map(count, [2, 0, 3], progress=reports.append)) == [2, 0, 3]
    assert reports == [1, 2, 3, 4, 5]
    report_done(7)
    assert reports == [1, 2, 3, 4, 5], "nobody listens outside a part"


def test_a_block_says_where_parts_run_and_ends_with_an_error() -> None:
    inner, outer = Local(cuts=True), Local(cuts=True, part_tokens=5)
    with pytest.raises(ZeroDivisionError), running_on(outer):
        with running_on(inner):
            assert executor_in_use() is inner
        assert executor_in_use() is outer
        raise ZeroDivisionError
    assert executor_in_use() is not outer and not executor_in_use().cuts


@pytest.mark.parametrize("part_tokens", [0, -1, 2.5, "many", True])
def test_a_part_has_tokens(part_tokens: object) -> None:
    with pytest.raises(InputError, match="part_tokens"):
        Local(part_tokens=part_tokens)  # type: ignore[arg-type]


def test_a_part_may_report_what_its_own_parts_did() -> None:
    """A task that maps in turn passes on its progress, which is no progress of the inner part."""

    def inner(part: int) -> int:
        report_done(1)
        return part

    def outer(part: int) -> list[int]:
        return list(Local().map(inner, range(part), progress=report_done))

    seen: list[int] = []
    assert list(Local(cuts=True).map(outer, [2, 3], progress=seen.append)) == [[0, 1], [0, 1, 2]]
    assert seen == [1, 2, 3, 4, 5]
