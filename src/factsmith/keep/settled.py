"""Verbs of a workbench that a Ctrl-C may interrupt at any moment.

    @settled
    def revert(self, reference): ...

When such a verb begins, it first finishes what an earlier one left unfinished. When it ends in an
exception, it puts the weights back that blocks inside it have lent out. So the model carries what
the ledger says, or does so from the next verb on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def settled(verb: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Return the method of a workbench, so that an interruption leaves model and ledger in step."""

    @functools.wraps(verb)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._carried.begin()
        grad = torch.is_grad_enabled()
        try:
            return verb(self, *args, **kwargs)
        except BaseException:
            torch.set_grad_enabled(grad)  # a Ctrl-C inside a `no_grad` can leave it off
            raise
        finally:
            self._carried.end()

    return run
