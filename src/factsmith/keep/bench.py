"""What a workspace knows of its model: a `patch.Bench` whose deltas stand in a ledger.

    bench = LedgerBench(lm, "my-workspace")
    bench.beneath, bench.asked_again
    with bench.on_base():
        lm.answer([prompt])

`Workbench` adds the verbs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from .. import atlas
from ..core.errors import FingerprintError
from ..core.fact import Fact
from ..core.progress import Progress
from ..corpus.moments import SecondMoment
from ..corpus.moments_store import find_moments, kept_moments
from ..corpus.scan import Site
from ..edit.delta import Delta
from ..edit.lending import check_in_memory
from ..model.address import check_dense
from ..model.language_model import LanguageModel
from ..patch.duration import seconds_to_solve
from ..patch.layer_choice import LayerChoice, first_choice
from ..patch.layers import measure_layers, published_choice
from ..patch.plan import Plan
from ..patch.proof import ask
from ..patch.recipe import Sources
from ..patch.verification import Verification
from .asked import Asked, compare, held_when_kept
from .base_file import read_base_file, write_base_file
from .carried import Carried, give_back, newest_facts
from .export.dtypes import dtype_name
from .export.record import Export
from .exporting import export_state, export_states
from .layers_file import read_layers, write_layers
from .ledger import Ledger
from .revision import Revision, Status
from .settled import settled

_ASKED_AGAIN = 100
"""Earlier facts asked again with every new patch: the newest ones. `Workbench.verify` asks all."""


def create(lm: LanguageModel, folder: str | os.PathLike[str]) -> Ledger:
    """Make a workspace for a model and return its ledger, open.

    Raises:
        WorkspaceError: The folder is a workspace already, or cannot be written.
    """
    # A path is kept whole, so that the workspace finds its model from anywhere.
    is_path = lm.name not in atlas.names() and (lm.gguf is not None or Path(lm.name).is_dir())
    name = str(Path(lm.name).resolve()) if is_path else lm.name
    dtype = dtype_name(lm.dtype)
    ledger = Ledger.create(folder, model=name, fingerprint=lm.fingerprint, dtype=dtype)
    write_base_file(Path(folder), lm.gguf)
    return ledger


def _changed_file(lm: LanguageModel, folder: Path) -> str:
    """Say that a GGUF file is not the one that a workspace was made from."""
    file = read_base_file(folder)
    if file is None or lm.gguf is None or lm.gguf.sha256 == file.sha256:
        return ""
    return f", from a file of sha256 {lm.gguf.sha256[:10]} instead of {file.sha256[:10]}"


class LedgerBench:
    """A model and a workspace; a context manager that leaves the model at its base weights.

    Attributes:
        lm: The model; its weights are base + Σ active deltas.
        ledger: The records.
        asked: What the facts in effect were answered after the newest checkout. None: there was
            none yet.

    Raises:
        FingerprintError: The workspace was made for another model.
        DamagedError: A delta is not whole.
    """

    asked: Asked | None = None

    def __init__(self, lm: LanguageModel, folder: str | os.PathLike[str]) -> None:
        check_in_memory(lm, range(lm.n_layers), "a workspace")
        self.lm = lm
        give_back(lm)
        is_workspace = (Path(folder) / "ledger.db").is_file()
        self.ledger = Ledger(folder) if is_workspace else create(lm, folder)
        try:
            lm.fresh_fingerprint()
            self._carried = Carried(lm, self.ledger)
            if not lm.has_fingerprint(self.ledger.fingerprint):
                raise FingerprintError(
                    f"{folder} was made for {self.ledger.model!r} in {self.ledger.dtype}, "
                    f"fingerprint {self.ledger.fingerprint[:10]}; "
                    f"got {lm.name!r} in {dtype_name(lm.dtype)} with "
                    f"{lm.fingerprint[:10]}{_changed_file(lm, Path(folder))}. Load that model "
                    "without patches (close another workbench that holds it), or make a workspace "
                    "for this one"
                )
            self._carried.go_to(self.ledger.current)  # opening writes nothing
        except BaseException:
            if hasattr(self, "_carried"):
                self._carried.release()
            self.ledger.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put the base weights back, bit for bit, and close the ledger; the records stay."""
        self._carried.release()
        self.ledger.close()

    def log(self) -> list[Revision]:
        """Return every revision, newest first."""
        return self.ledger.log()

    def show(self, reference: str) -> Revision:
        """Return the revision with this id, unique prefix, or "latest"; raises RevisionError."""
        return self.ledger.show(reference)

    def status(self) -> Status:
        """Return where the workspace stands, after checking every record and every delta's sha256;
        raises DamagedError.
        """
        return self.ledger.status()

    @property
    def at(self) -> str:
        """The id of the revision whose weights the model has, or "base"."""
        return self._carried.at

    @settled
    def follow(self) -> bool:
        """Give the model the weights of the revision that is checked out now, and say whether it
        had others: another process may have moved the workspace.

        Raises:
            DamagedError: A delta is not whole.
        """
        if (current := self.ledger.current) == self.at:
            return False
        self._carried.check_weights()
        self._carried.go_to(current)
        return True

    @property
    def base_fingerprint(self) -> str:
        """The fingerprint of the model without patches."""
        return self.ledger.fingerprint

    @property
    def beneath(self) -> tuple[Delta, ...]:
        """The deltas that the model carries, in order; the first counts as made on the base."""
        return self._carried.on_base(self._carried.deltas.values())

    @property
    def facts_in_effect(self) -> list[tuple[str, Fact]]:
        """The facts in effect, each after words that say which revision has it; of those with one
        prompt the newest.
        """
        newest: dict[str, tuple[str, Fact]] = {}
        for revision in self.ledger.active(self._carried.at):
            for fact in revision.in_effect:
                newest.pop(fact.asked, None)
                newest[fact.asked] = (f"{revision.id[:10]} has", fact)
        return list(newest.values())

    @property
    def asked_again(self) -> list[Fact]:
        """The newest facts in effect, which must still hold after a new patch."""
        return newest_facts(self._carried.deltas.values())[-_ASKED_AGAIN:]

    def seconds_for(self, decided: Plan) -> float:
        """Return about how long writing takes: by the newest patches of the method, or else by how
        long a forward pass takes.
        """
        revisions = [
            r for r in self.ledger.log() if r.method == decided.method and "seconds" in r.report
        ][:5]
        taken = [r.report["seconds"] for r in revisions]
        if taken and all(isinstance(seconds, (int, float)) for seconds in taken):
            n_facts = sum(len(revision.facts) for revision in revisions)
            return len(decided.new) * sum(map(float, taken)) / n_facts
        return seconds_to_solve(self.lm, decided.config, decided.new)

    def ask_facts(self, *, progress: Progress | None = None) -> Asked:
        """Ask the prompt of every fact in effect, in one batch, and compare the answers with the
        records.
        """
        return self.compared(ask(self.lm, newest_facts(self._carried.deltas.values()), progress))

    def compared(self, proof: Verification) -> Asked:
        """Return which facts of a proof were lost since they were kept, by the records."""
        return compare(proof, held_when_kept(self.ledger.log()))

    def deltas_at(self, reference: str) -> dict[str, Delta]:
        """Return {revision id: its delta} as of a revision, in ledger order; the checkout stays.

        Args:
            reference: The revision: an id, a unique prefix, "latest" or "base".

        Raises:
            RevisionError: when there is no such revision.
            DamagedError: when the files of a delta are not whole.
        """
        active = self.ledger.active(self.ledger.resolve(reference))
        return {revision.id: self._carried.delta_of(revision) for revision in active}

    def carrying_exactly(self, deltas: Collection[Delta]) -> AbstractContextManager[None]:
        """A block in which the model carries these deltas, and no others."""
        return self._carried.exactly(deltas)

    def on_base(self) -> AbstractContextManager[None]:
        """A block in which the model has its base weights."""
        return self._carried.exactly([])

    def carrying(self, *deltas: Delta) -> AbstractContextManager[None]:
        """A block in which the model carries these deltas on top of the active ones."""
        return self._carried.exactly([*self._carried.deltas.values(), *deltas])

    @settled
    def export(
        self,
        folder: str | os.PathLike[str],
        format: str = "checkpoint",
        *,
        revision: str | None = None,
        **options: Any,
    ) -> Export:
        """Write the model with its patches as a "checkpoint", an "adapter", a "gguf" file or a
        "gguf-adapter", or the patches alone as a "patch".

        `revision` exports the state at another revision; the checkout stays. Options and errors
        are those of the `export_...` functions in `keep.export`.
        """
        self._carried.check_weights()
        return export_state(self._carried, folder, format, revision, **options)

    @settled
    def export_several(
        self,
        folder: str | os.PathLike[str],
        revisions: Iterable[str],
        format: str = "adapter",
        **options: Any,
    ) -> tuple[Export, ...]:
        """Write an export of each of several revisions into one folder: all of them, or none.

        Each is named by the first twelve digits of its revision. Options and errors are those of
        `export`; with `overwrite`, all earlier exports in the folder are replaced.
        """
        self._carried.check_weights()
        return export_states(self._carried, folder, revisions, format, **options)

    def kept_moments(
        self, layers: Sequence[int], site: Site = "coefficients"
    ) -> Mapping[int, SecondMoment]:
        """The second moments of these layers that are kept here, or came with the model."""
        return kept_moments(self.lm, layers, self._moments_folder, site=site)

    def moments(
        self,
        layers: Sequence[int],
        sources: Sources,
        progress: Progress | None,
        site: Site = "coefficients",
    ) -> Mapping[int, SecondMoment]:
        """The second moments of these layers, of the base weights: kept, or computed now."""
        return self.find_moments(
            layers, texts=sources.texts, seed=sources.seed, site=site, progress=progress
        )

    def known_layers(self) -> LayerChoice | None:
        """The layers to edit as far as they are known without work: kept here, or else those of
        `published_choice`.
        """
        return self._kept_layers() or published_choice(self.lm)

    def first_layers(self) -> LayerChoice:
        """The layers to edit where none are known: a first choice, without trial edits."""
        return first_choice(self.lm)

    def find_moments(
        self,
        layers: Sequence[int],
        *,
        folder: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> dict[int, SecondMoment]:
        """Return second moments of the base weights, kept in the workspace unless `folder` says
        where; otherwise as the function.
        """
        self._carried.check_weights()
        with self.on_base():
            return find_moments(self.lm, layers, folder=folder or self._moments_folder, **options)

    @settled
    def recommend_layers(
        self,
        facts: Iterable[Fact] | None = None,
        *,
        trials: int | None = None,
        texts: Iterable[str] | None = None,
        contexts: Sequence[str] | None = None,
        seed: int = 0,
        refresh: bool = False,
        progress: Progress | None = None,
    ) -> LayerChoice:
        """Measure which layers to edit, on the base weights, and keep the choice in the workspace
        as layers.json.

        A kept choice is returned when nothing else is asked for: no `facts`, no other number of
        `trials`, no `refresh`. The arguments are those of the function `recommend_layers`.

        Raises:
            DamagedError: The kept choice cannot be read.
            WorkspaceError: The new one cannot be written.
            FactsmithError: What the function raises.
        """
        self._carried.check_weights()
        kept = None if refresh or facts is not None else self._kept_layers()
        if kept is not None and not kept.quick and trials in (None, kept.trials):
            return kept
        check_dense(self.lm.ffn)
        sources = Sources(texts=texts, contexts=contexts, seed=seed)
        with self.on_base():
            choice = measure_layers(
                self.lm,
                facts,
                sources,
                trials=trials,
                folder=self._moments_folder,
                progress=progress,
            )
        write_layers(self._layers_file, choice)
        return choice

    @property
    def _moments_folder(self) -> Path:
        return self.ledger.folder / "moments"

    @property
    def _layers_file(self) -> Path:
        return self.ledger.folder / "layers.json"

    def _kept_layers(self) -> LayerChoice | None:
        return read_layers(self._layers_file, self.lm, self.ledger.fingerprint)
