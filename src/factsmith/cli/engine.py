"""Workers of a Ray cluster for commands that pass corpora, or try many edits.

    @on_workers                                   # the command also takes --ray and --workers
    def find(...):
        with progress() as tell, engine(tell), opened(...) as (lm, _):
            ...                                   # what can be cut into parts runs on the workers

The value of --ray may be left out, which Typer does not know. `with_ray_value` writes it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from ..core.documents import document, error_fields
from ..core.errors import ClusterError, InputError
from ..core.progress import Progress, tell
from .options import Ray, Workers
from .printing import as_json_text, manner

LOCAL = "local"
"""The value of --ray that asks for a cluster of this machine."""

_ENDED = (
    "the command ended while it used Ray. When the head of a cluster dies, Ray ends every program "
    "that is connected to it. Run the command again; what kept a checkpoint goes on from there"
)

_ADDRESS = re.compile(r"auto|local|\w+://\S*|[^\s/\\=]+:\d+")
"""A word after --ray that is its value. Any other word is an argument of the command."""


class _Wanted(NamedTuple):
    """The workers that the user asks for.

    Attributes:
        ray: The address, or "local". None: no workers.
        workers: How many. None: as many as there is room for.
    """

    ray: str | None = None
    workers: int | None = None


_wanted: ContextVar[_Wanted] = ContextVar("workers", default=_Wanted())  # noqa: B039 (frozen)


def on_workers(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that also takes --ray and --workers."""

    @functools.wraps(command)
    def run(*, ray: str | None, workers: int | None, **given: Any) -> None:
        if workers is not None and ray is None:
            raise InputError(
                f"--workers is {workers}, and --ray is not given; add --ray for workers of this "
                "machine, or --ray ADDRESS for those of a cluster"
            )
        token = _wanted.set(_Wanted(ray, workers))
        try:
            command(**given)
        finally:
            _wanted.reset(token)

    signature = inspect.signature(command, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        *signature.parameters.values(),
        inspect.Parameter("ray", keyword, default=None, annotation=Ray),
        inspect.Parameter("workers", keyword, default=None, annotation=Workers),
    ]
    vars(run)["__signature__"] = signature.replace(parameters=parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@contextmanager
def engine(progress: Progress) -> Iterator[None]:
    """A block that runs on the workers the user asks for, or in this process without --ray.

    Raises:
        ClusterError: Ray is not installed, or there is no such cluster.
    """
    ray, workers = _wanted.get()
    if ray is None:
        yield
        return
    tell(progress, "loading Ray", 0, None)
    from ..cluster.engine import Ray as Engine

    address = None if ray == LOCAL else ray
    with ExitStack() as block:
        block.enter_context(last_words(_ENDED))
        try:
            block.enter_context(Engine(address, workers=workers, progress=progress))
        except ClusterError as error:
            if error.argument == "address":
                error.argument = "ray"
            raise
        yield


@contextmanager
def last_words(text: str) -> Iterator[None]:
    """A block. If the process ends inside it, without a way to say so, an error is printed.

    A shell waits for a line that the process writes after the block. At the end of a process the
    line does not come.
    """
    if os.name != "posix":
        yield
        return
    fields = error_fields(ClusterError, ClusterError.exit_code, None, None)
    said = as_json_text(document({"error": {"message": text, **fields}}))
    words = said if manner.get().json else f"error: {text}"
    script = 'read -r line || printf "%s\\n" "$0" >&2'
    with subprocess.Popen(["sh", "-c", script, words], stdin=subprocess.PIPE) as shell:
        try:
            yield
        finally:
            shell.communicate(b"done\n")


def with_ray_value(words: Sequence[str]) -> list[str]:
    """Return the words of a command, with --ray and its value as one word.

    A word after --ray is its value if it can be an address. Otherwise the value is "local".
    """
    head = list(itertools.takewhile(lambda word: word != "--", words))
    written: list[str] = []
    rest = iter(range(len(head)))
    for i in rest:
        if head[i] != "--ray":
            written.append(head[i])
        elif i + 1 < len(head) and _ADDRESS.fullmatch(head[i + 1]):
            written.append(f"--ray={head[next(rest)]}")
        else:
            written.append(f"--ray={LOCAL}")
    return [*written, *words[len(head) :]]
