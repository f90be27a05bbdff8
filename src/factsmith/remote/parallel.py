"""Send several requests at once, and give their answers in order.

answers = in_order([lambda: client.get("/a"), lambda: client.get("/b")])
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

AT_ONCE = 8
"""Requests that are on their way together."""


def in_order(
    jobs: Sequence[Callable[[], T]],
    *,
    at_once: int = AT_ONCE,
    finished: Callable[[int], object] | None = None,
) -> list[T]:
    """Run functions in a few threads, and return what they return, in the order of the functions.

    The threads do not hold up the end of the program: after Ctrl-C nobody waits for an answer.

    Args:
        jobs: The functions.
        at_once: How many threads run at most.
        finished: Called in this thread with the number of each function that has returned.

    Raises:
        Exception: The first that a function raised. Functions that have not begun do not run.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()
    for number in range(len(jobs)):
        waiting.put(number)
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, jobs[number](), None))
            except BaseException as error:
                stopped.set()
                done.put((number, None, error))

    for _ in range(min(at_once, len(jobs))):
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(work,), daemon=True).start()
    results: dict[int, T] = {}
    try:
        while len(results) < len(jobs):
            number, result, error = done.get()
            if error is not None:
                raise error
            results[number] = result  # type: ignore[assignment]
            if finished is not None:
                finished(number)
    finally:
        stopped.set()
    return [results[number] for number in range(len(jobs))]


def within(seconds: float, job: Callable[[], T]) -> T:
    """Run a function in a thread, and return what it returns.

    The thread does not hold up the end of the program.

    Args:
        seconds: How long to wait.
        job: The function.

    Raises:
        TimeoutError: It did not return in time. The thread goes on by itself.
        Exception: What the function raised.
    """
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((job(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"not done within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
