"""The executor of this process."""

from __future__ import annotations

from factsmith.core.executor import Local


def test_parts_run_in_order_when_their_results_are_asked_for() -> None:
    began: list[int] = []

    def double(part: int) -> int:
        began.append(part)
        return 2 * part

    results = Local().map(double, [3, 1, 2])
    assert not began
    assert next(results) == 6 and began == [3]
    assert list(results) == [2, 4] and began == [3, 1, 2]
