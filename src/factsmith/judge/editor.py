"""Editors, which write facts into a model, and changes that are made already: both can be judged.

    @contextmanager
    def write(facts):
        ...                                  # put the facts into the model
        yield {"seconds": 1.5}
        ...                                  # take them out

    evaluate(lm, suite, {"mine": write})
    evaluate(lm, suite, delta=Delta.load("my-delta"))

This module knows no method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ..core.checks import check_items
from ..core.errors import FactsmithError, InputError, LedgerError, NumericsError
from ..core.fact import Fact
from ..model.language_model import LanguageModel
from .rows import BASE


class Editor(Protocol):
    """A function that writes facts into a model for the length of a `with` block.

    If the block yields {name: number}, such as seconds and norms, the numbers are noted. An editor
    may have a `description`: its settings in words. A run then goes on only with the same
    description.
    """

    def __call__(self, facts: Sequence[Fact], /) -> AbstractContextManager[Any]:
        """Return a `with` block inside which the model carries the facts, on top of all that it
        carried before.

        An error of factsmith, such as an `InputError`, is noted as the failure of this edit. Other
        exceptions end the run.
        """


class NotAnEditorError(InputError):
    """A function that should be an editor does not do what editors do."""


class Change(Protocol):
    """A change of a model that is made already, such as a Delta."""

    @property
    def facts(self) -> Sequence[Fact]:
        """The facts that it writes."""

    @property
    def digest(self) -> str:
        """A digest that differs between changes."""

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model that it was made on."""

    def inside(self, lm: LanguageModel) -> AbstractContextManager[Any]:
        """Return a `with` block in which a model carries the change."""


@dataclass(frozen=True)
class MadeChanges:
    """An editor that puts changes into the model that are made already, whatever facts it gets.

    Attributes:
        lm: The model.
        changes: The changes, each on top of the ones before.
    """

    lm: LanguageModel
    changes: tuple[Change, ...]

    @property
    def description(self) -> str:
        """The digests of the changes."""
        return " + ".join(change.digest for change in self.changes)

    @contextmanager
    def __call__(self, facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        with ExitStack() as stack:
            for change in self.changes:
                stack.enter_context(change.inside(self.lm))
            yield {}


def apart_from_others(editor: Editor) -> Editor:
    """Return an editor whose edits do not depend on the order in which edits are made.

    An editor whose edits share something, such as targets that were searched before, has a method
    `apart` that returns such an editor. Any other editor is returned as given.
    """
    apart: Callable[[], Editor] | None = getattr(editor, "apart", None)
    return editor if apart is None else apart()


def description_of(editor: object) -> str:
    """Return the settings of an editor or a probe in words; "" if it does not say them."""
    return str(getattr(editor, "description", ""))


def enter(stack: ExitStack, editor: Editor, facts: Sequence[Fact]) -> tuple[object, str]:
    """Let an editor write facts until a stack is closed.

    Returns:
        What the block yields, and "". If the edit could not be made: {} and the reason.

    Raises:
        InputError: when the editor returns no `with` block.
        FactsmithError: when changes that are made already cannot be put into the model.
        LedgerError: when the editor cannot use its files, or they belong to another model.
    """
    try:
        block = editor(facts)
    except FactsmithError as error:
        return {}, _reason(editor, error)
    if not isinstance(block, AbstractContextManager):
        raise NotAnEditorError(
            f"an editor returned a {type(block).__name__}; it must return a `with` block "
            "inside which the model carries the facts"
        )
    try:
        return stack.enter_context(block), ""
    except FactsmithError as error:
        return {}, _reason(editor, error)


def _reason(editor: Editor, error: FactsmithError) -> str:
    """Return why an edit could not be made; raise an error that is not about the edit's facts."""
    is_numeric = isinstance(error, NumericsError)
    is_of_facts = not isinstance(error, (LedgerError, NotAnEditorError))
    if not is_of_facts or (isinstance(editor, MadeChanges) and not is_numeric):
        raise error
    return str(error) or type(error).__name__


def check_changes(delta: Change | Iterable[Change]) -> tuple[Change, ...]:
    """Return one change or several as a tuple.

    Raises:
        InputError: when there is none, or an item is no change.
    """
    changes = (
        (delta,)
        if hasattr(delta, "inside")
        else tuple(check_items(delta, "delta", "deltas", also="one Delta"))
    )
    if not changes or not all(hasattr(change, "inside") for change in changes):
        raise InputError(
            f"delta is {[type(change).__name__ for change in changes]}; give a Delta, as an editor "
            "such as `memit` returns it, or several to put on top of one another",
            argument="delta",
        )
    return changes


def check_editors(editors: object) -> Mapping[str, Editor]:
    """Return {name: editor}, with at least one editor and none called "base".

    Raises:
        InputError: when it is something else.
    """
    if isinstance(editors, Mapping) and editors and BASE not in editors:
        pairs = editors.items()
        are_named = all(isinstance(name, str) and callable(editor) for name, editor in pairs)
        if are_named:
            return editors
    got = list(editors) if isinstance(editors, Mapping) else f"a {type(editors).__name__}"
    raise InputError(
        f"editors is {got}; give {{name: editor}} with at least one editor, each a function of "
        f'facts, and none called "{BASE}"',
        argument="editors",
    )
