"""The desk: the workbench of a studio, and other models next to it.

    desk = Desk(folder, opening, load_model, ["atlas", "atlas-llama"])
    desk.open(tell)                            # in the worker that has the workbench
    with desk.reading(arguments, tell) as lm:
        lm.answer([prompt])

A desk is the only part of studio that touches a model. The workbench belongs to the thread that
opened it. `ledger` gives any other thread a ledger of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import InputError, WorkspaceError
from ..core.explain import short
from ..core.progress import Progress
from ..keep.ledger import BASE, Ledger
from ..keep.workbench import Workbench
from ..model.language_model import LanguageModel
from .arguments import Source

CURRENT = ""
"""The reference of the revision that is checked out."""


@dataclass(frozen=True)
class Place:
    """Where a studio works, as code and commands name it.

    Attributes:
        model: The name of the workspace's model.
        workspace: The full path of the workspace, so that programs find it from any folder.
    """

    model: str
    workspace: str


class Desk:
    """The models that a studio works on.

    Attributes:
        folder: The folder of the workspace.
        place: The names of model and workspace, for code and commands.
        kept: What one job leaves for a later one, such as a patch that was only tried. Only jobs of
            the workbench write to it.
    """

    place: Place

    def __init__(
        self,
        folder: Path,
        opening: Callable[[Progress], AbstractContextManager[Workbench]],
        load_model: Callable[[str, Progress], LanguageModel],
        others: Sequence[str] = (),
    ) -> None:
        """Prepare a desk; `open` opens it.

        Args:
            folder: The folder of the workspace.
            opening: Opens the workbench. Called once, in the worker's thread.
            load_model: Loads another model by its name.
            others: Names of the models that may be read next to the workspace's.
        """
        self.folder = folder
        self._opening, self._load_model = opening, load_model
        self._others = tuple(others)
        self._loaded: dict[str, LanguageModel] = {}
        self.kept: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        self._bench: Workbench | None = None

    # ── the workbench ─────────────────────────────────────────────────────────────────────────────

    def open(self, tell: Progress) -> None:
        """Open the workbench in the thread that calls, which has it from then on."""
        self._bench = self._stack.enter_context(self._opening(tell))
        self.place = Place(self._bench.ledger.model, str(self.folder.resolve()))

    def close(self) -> None:
        """Close the workbench; the model gets its base weights back."""
        self._bench = None
        self._loaded.clear()
        self.kept.clear()
        self._stack.close()

    @property
    def bench(self) -> Workbench:
        """The workbench, for the worker's thread only."""
        if self._bench is None:
            raise WorkspaceError("the workbench is closed; start studio again")
        return self._bench

    @property
    def lm(self) -> LanguageModel:
        """The workspace's model. Its weights and answers are the worker's business; its name, its
        sizes and its tokenizer may be read by any thread.
        """
        return self.bench.lm

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """A block with a ledger of its own, for any thread."""
        with Ledger(self.folder) as ledger:
            yield ledger

    # ── models and weights ────────────────────────────────────────────────────────────────────────

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models that may be read: the workspace's first."""
        others = (name for name in self._others if name != self.place.model)
        return (self.place.model, *others)

    @property
    def model_options(self) -> list[tuple[str, str]]:
        """(value, label) of the models that a form offers."""
        first, *others = self.models
        return [
            ("", f"{first}, the workspace's"),
            *((name, f"{name}, no patches") for name in others),
        ]

    def is_own(self, model: str) -> bool:
        """Whether a name means the workspace's model."""
        return model in ("", self.place.model)

    def resolve(self, revision: str, model: str = "") -> str:
        """Return the full id of a revision, or "base"; any thread may ask.

        Args:
            revision: An id, a unique prefix, "base" or "latest". "": the one checked out.
            model: The model. Others than the workspace's carry no patch.

        Raises:
            InputError: when the model is not among `models`, or another model is to carry patches.
            RevisionError: when there is no such revision.
        """
        if model and model not in self.models:
            raise InputError(
                f"model is {short(model)}; this studio reads {', '.join(self.models)}. To read "
                "another one, too, start studio again and name it after --with",
                argument="model",
            )
        if not self.is_own(model):
            if revision not in (CURRENT, BASE):
                raise InputError(
                    f"revision is {short(revision)}, and {model} is not the workspace's model, so "
                    "it carries no patch; leave the revision out",
                    argument="revision",
                )
            return BASE
        with self.ledger() as ledger:
            return ledger.current if revision == CURRENT else ledger.resolve(revision)

    @contextlib.contextmanager
    def reading(self, source: Source, tell: Progress) -> Iterator[LanguageModel]:
        """A block with the model and the weights that a source names, in a worker."""
        with self.carrying(source.model, source.revision, tell) as lm:
            yield lm

    @contextlib.contextmanager
    def carrying(self, model: str, revision: str, tell: Progress) -> Iterator[LanguageModel]:
        """A block with a model that carries the patches of a revision, in a worker.

        Args:
            model: The model; "" for the workspace's.
            revision: The revision; "" for the one checked out.
            tell: Gets the progress of loading.
        """
        identity = self.resolve(revision, model)
        if not self.is_own(model):
            yield self._other(model, tell)
            return
        bench = self.bench
        if identity == bench.at:
            yield bench.lm
            return
        with bench.carrying_exactly(bench.deltas_at(identity).values()):
            yield bench.lm

    def load(self, model: str, tell: Progress) -> LanguageModel:
        """Return a model of its own for a long job, which may change its weights.

        Args:
            model: The model; "" for the workspace's.
            tell: Gets the progress of loading.
        """
        return self._load_model(model or self.place.model, tell)

    def _other(self, model: str, tell: Progress) -> LanguageModel:
        """Return another model, which is loaded once."""
        if model not in self._loaded:
            self._loaded[model] = self._load_model(model, tell)
        return self._loaded[model]
