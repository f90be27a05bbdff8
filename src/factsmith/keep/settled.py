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
from typing import Any, TypeVar, cast

import torch

Verb = TypeVar("Verb", bound=Callable[..., Any])


def settled(verb: Verb) -> Verb:
    """Return the method of a workbench, so that an interruption leaves model and ledger in step."""

    @functools.wraps(verb)
    def run(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._carried.begin()
        grad = torch.is_grad_enabled()
        try:
            return verb(self, *args, **kwargs)
        except BaseException:
            torch.set_grad_enabled(grad)  # a Ctrl-C inside a `no_grad` can leave it off
            raise
        finally:
            self._carried.end()

    return cast(Verb, run)
