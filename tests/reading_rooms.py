"""A studio for tests of the verbs that read: its model says euro, and the base says lev."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.progress import Progress
from factsmith.read.index_store import find_index
from factsmith.studio.arguments import Arguments
from factsmith.studio.desk import Desk
from factsmith.studio.rooms import ROOMS, Room
from factsmith.studio.session import Studio
from factsmith.studio.verb import Answer, Verb
from studios import FACT, studio_in

PATIENCE = 100.0
"""Seconds that a job may take on a machine that does other things, too."""


TOKENS = 300
"""Tokens of an index."""


def prepare(desk: Desk, arguments: Arguments, tell: Progress) -> Answer:
    """Write a fact, and make small indices of the model before and after."""
    find_index(desk.lm, max_tokens=TOKENS)
    outcome = desk.bench.apply(FACT, force=True)
    find_index(desk.lm, max_tokens=TOKENS)
    return Answer({"revision": outcome.revision and outcome.revision.id})


PREPARE: Verb[Arguments] = Verb(
    "prepare",
    "Prepare",
    "Write a fact.",
    Arguments,
    prepare,
    lambda arguments, place: "",
    lambda arguments, place: [],
)


@contextmanager
def patched_studio(folder: Path, cache: Path) -> Iterator[Studio]:
    """A block with a studio whose workspace has one patch; its indices are in the cache."""
    rooms = (*ROOMS, Room("prepare", "Prepare", "For tests.", (PREPARE,)))
    with studio_in(folder, rooms) as studio, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACTSMITH_CACHE", str(cache))
        run(studio, PREPARE)
        yield studio


def run(studio: Studio, verb: Verb[Any], **values: Any) -> Answer:
    """Do a verb in the worker, and return its answer or raise its error."""
    job = studio.submit(verb, verb.arguments.of(values))
    assert job.over.wait(PATIENCE)
    if job.error is not None:
        raise job.error
    assert job.answer is not None
    return job.answer
