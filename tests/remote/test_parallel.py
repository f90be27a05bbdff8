"""Several functions at once: order, errors, and how many run together."""

from __future__ import annotations

import threading
import time

import pytest

from factsmith.remote.parallel import in_order


def test_results_come_in_order_and_several_run_at_once() -> None:
    meeting = threading.Barrier(4)

    def job(n: int) -> int:
        if n < 4:
            meeting.wait(10)  # fails unless four run at once
        time.sleep(0.02 * (8 - n))
        return n

    counted: list[int] = []
    jobs = [lambda n=n: job(n) for n in range(8)]
    assert in_order(jobs, at_once=4, finished=counted.append) == list(range(8))
    assert sorted(counted) == list(range(8))


def test_no_more_run_than_allowed() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    in_order([job] * 12, at_once=3)
    assert most == 3


def test_the_first_error_ends_it() -> None:
    ran: list[int] = []

    def job(n: int) -> None:
        ran.append(n)
        if n == 1:
            raise ValueError("the second")

    with pytest.raises(ValueError, match="the second"):
        in_order([lambda n=n: job(n) for n in range(100)], at_once=1)
    assert ran == [0, 1]


def test_nothing_to_do() -> None:
    assert in_order([]) == []
