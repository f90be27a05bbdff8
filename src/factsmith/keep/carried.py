"""The patches that a model carries: the one place that writes kept patches into a model.

    carried = Carried(lm, ledger)
    carried.go_to(ledger.current)              # base + Σ active deltas
    with carried.exactly([]):                  # the base weights, for the length of a block
        lm.answer([prompt])
    carried.move([*carried.deltas.values(), delta], record)

The weights are always base + Σ active deltas in ledger order, built again from the kept base
matrices. Nothing is subtracted: W + Δ − Δ is not W in floating point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ..core.errors import DamagedError, FingerprintError, InputError
from ..core.fact import Fact
from ..core.tables import counted
from ..edit.delta import Delta, patched, read_weights, write_weights
from ..edit.neurons import edits_neurons, revives
from ..model.language_model import LanguageModel
from .ledger import BASE, Ledger
from .revision import Revision

T = TypeVar("T", Revision, str)


class Carried:
    """The deltas that a model carries, in ledger order, and the base weights beneath them.

    Attributes:
        lm: The model.
        ledger: The records.
        base: {layer: (d_model, d_ff) base weight} of every layer that was ever patched here.
        deltas: {revision id: its delta}, in ledger order.
        at: The id of the revision whose weights the model has, or "base".
    """

    def __init__(self, lm: LanguageModel, ledger: Ledger) -> None:
        self.lm, self.ledger = lm, ledger
        self.base: dict[int, Tensor] = {}
        self.deltas: dict[str, Delta] = {}
        self.at = BASE
        self._digests: dict[str, str | None] = {}  # sha256 of each delta in `deltas`
        self._fingerprint = lm.fingerprint

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    def on_base(self, deltas: Iterable[Delta]) -> tuple[Delta, ...]:
        """The deltas as a solver takes what lies beneath an edit: the first as made on the base.

        What the first was made on may have been reverted in other layers.
        """
        every = list(deltas)
        if not every:
            return ()
        return (dataclasses.replace(every[0], fingerprint=self.ledger.fingerprint), *every[1:])

    def delta_of(self, revision: Revision, digest: str | None = None) -> Delta:
        """The delta that is carried for a patch, or another of its deltas by its sha256; from
        memory where it is there.

        Raises DamagedError when the files are not whole.
        """
        wanted = revision.carried if digest is None else digest
        if wanted is not None and wanted == self._digests.get(revision.id):
            return self.deltas[revision.id]
        return Delta.load(self.ledger.delta_folder(revision, digest))

    def check_weights(self) -> None:
        """Raise FingerprintError when somebody else changed the weights: what would be recorded is
        then not what was made.
        """
        if self.lm.fingerprint != self._fingerprint:
            raise FingerprintError(
                "the model's weights were changed outside the workbench, so what would be recorded "
                "is not what was made; "
                "load the model again and open the workspace with it"
            )

    def check_bits(self) -> None:
        """Build the weights again from the base and the files, and compare them with the model's;
        raises DamagedError.
        """
        fresh = [
            Delta.load(self.ledger.delta_folder(revision)) for revision in self.ledger.active()
        ]
        built = patched(self.base, fresh)
        now = read_weights(self.lm, built)
        wrong = [layer for layer, weight in built.items() if not torch.equal(weight, now[layer])]
        if wrong:
            raise DamagedError(
                f"the weights of layer {', '.join(map(str, wrong))} are not base + patches; open "
                "the workspace again"
            )

    # ── changing ──────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def exactly(self, deltas: Collection[Delta]) -> Iterator[None]:
        """A block in which the model has base + Σ deltas: the very weights that committing them
        would give.
        """
        with self.lm.gap_choices.held(self.lm):
            try:
                self._put(deltas)
                yield
            finally:
                self._put(self.deltas.values())

    def move(self, deltas: Collection[Delta], record: Callable[[], T]) -> T:
        """Put deltas into the model and record it in the ledger; if either fails, the model goes
        back.

        The weights come first: they are checked for shape and finite numbers before anything is
            recorded. An interruption that comes when
        the record is already made leaves both moved, since history is not taken back.

        Args:
            deltas: In ledger order.
            record: Writes the record, and returns the revision or its id.
        """
        started, fingerprint = self.ledger.current, None
        try:
            self._put(deltas)
            fingerprint = (
                self.lm.fingerprint
            )  # takes a while: before the record, so that an interruption then undoes everything
            noted = record()
        except BaseException as error:
            now = self.ledger.current
            if fingerprint is not None and not isinstance(error, Exception) and now != started:
                self.go_to(now)
            else:
                self._put(self.deltas.values())
            raise
        self._take_over(deltas, fingerprint, noted if isinstance(noted, str) else noted.id)
        return noted

    def go_to(self, identity: str) -> None:
        """Give the model the weights that the ledger says a revision has; write nothing."""
        deltas = [self.delta_of(revision) for revision in self.ledger.active(identity)]
        self._put(deltas)
        self._take_over(deltas, self.lm.fingerprint, identity)

    def release(self) -> None:
        """Put the base weights back, bit for bit."""
        self._put([])
        self.deltas = {}

    def _put(self, deltas: Collection[Delta]) -> None:
        layers = {layer for delta in deltas for layer in delta.layers}
        # A layer that was never patched still has its base weights: they are copied before its
        # first change.
        self.base.update(read_weights(self.lm, layers - self.base.keys()))
        write_weights(self.lm, patched(self.base, deltas))

    def _take_over(self, deltas: Collection[Delta], fingerprint: str, at: str) -> None:
        """Note that the model carries these deltas, those of the revision `at`.

        Not those of the ledger's newest revision: another process may have committed in between.
        """
        active = self.ledger.active(at)
        self.deltas = dict(zip((revision.id for revision in active), deltas, strict=True))
        self._digests = {revision.id: revision.carried for revision in active}
        self.at, self._fingerprint = at, fingerprint


def check_erased(delta: Delta, carried: Mapping[str, Delta]) -> None:
    """Check that a delta leaves the neurons that carried patches erased at zero.

    Raises:
        InputError: It does not.
    """
    for revision, below in carried.items():
        if revived := revives(delta, [below]):
            layer, i = revived[0]
            raise InputError(
                f"the delta writes into neuron {(layer, i)}, which {revision[:10]} erased; make it "
                "with beneath=bench.beneath, which leaves erased neurons out, or revert "
                f"{revision[:10]} first"
            )


def neurons_in_words(delta: Delta) -> str:
    """Return what an edit of neurons does, as the message of its record; "" for other deltas."""
    if not edits_neurons(delta):
        return ""
    neurons = delta.config.get("neurons", ())
    layers = ", ".join(map(str, sorted(delta.layers)))
    return f"{delta.method} {counted(len(neurons), 'neuron')} of layer {layers}"


def newest_facts(deltas: Iterable[Delta]) -> list[Fact]:
    """Return the facts of some patches; of those with one prompt the newest."""
    facts: dict[str, Fact] = {}
    for delta in deltas:
        for fact in delta.facts:
            facts.pop(fact.asked, None)
            facts[fact.asked] = fact
    return list(facts.values())
