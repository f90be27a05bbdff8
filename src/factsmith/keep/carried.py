"""The patches that a model carries: the one place that writes kept patches into a model.

    carried = Carried(lm, ledger)
    carried.go_to(ledger.current)              # base + Σ active deltas
    with carried.exactly([]):                  # the base weights, for the length of a block
        lm.answer([prompt])
    carried.move([*carried.deltas.values(), delta], record)

The weights are always base + Σ active deltas in ledger order, built again from the kept base
matrices. Nothing is subtracted: W + Δ − Δ is not W in floating point.

A Ctrl-C can come at any moment, also while weights are put back. So every change of the weights is
noted before it begins, and `settle` finishes what was interrupted. Weights can also be changed in
memory, past PyTorch's counter of changes. So the sha256 of every patched matrix is compared before
anything is recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from ..core.errors import FingerprintError, InputError
from ..core.fact import Fact
from ..core.tables import counted
from ..edit.delta import (
    Delta,
    homes,
    patched,
    read_weights,
    write_weights,
)
from ..edit.lending import n_lent, take_back
from ..edit.neurons import edits_neurons, revives
from ..edit.widening import Held, check_rows, parameters_of, put_back, widen
from ..model.appended import by_layer
from ..model.language_model import LanguageModel
from .ledger import BASE, Ledger
from .revision import Revision

T = TypeVar("T", Revision, str)


@dataclass(frozen=True)
class _State:
    """What the model carries when nothing is under way. It is replaced as a whole, in one step.

    Attributes:
        at: The id of the revision whose weights the model has, or "base".
        deltas: {revision id: its delta}, in ledger order.
        delta_digests: {revision id: the sha256 of that delta's files}.
        fingerprint: The model's fingerprint.
        weights: {layer: sha256 of its down-projection}; of layers that share one, the first.
        rows: {layer: sha256 of all parameters of a layer with appended neurons}.
    """

    at: str = BASE
    deltas: dict[str, Delta] = field(default_factory=dict)
    delta_digests: dict[str, str | None] = field(default_factory=dict)
    fingerprint: str = ""
    weights: dict[int, str] = field(default_factory=dict)
    rows: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _UnderWay:
    """A change of the weights that has begun. `started`: the revision of then; None: no matter."""

    started: str | None
    records: bool


@dataclass
class _Held:
    """The base weights of a model that a workbench has changed.

    Attributes:
        base: {layer: (d_model, d_ff)}.
        plain: {layer: the parameters without appended neurons}.
        owner: The `Carried` of that workbench.
        leaving: Whether it has begun to put the base weights back.
    """

    base: dict[int, Tensor]
    plain: dict[int, Held]
    owner: ReferenceType[Carried]
    leaving: bool = False


_HELD: WeakKeyDictionary[LanguageModel, _Held] = WeakKeyDictionary()


def give_back(lm: LanguageModel) -> None:
    """Put a model's base weights back, if an interrupted or forgotten workbench left others."""
    held = _HELD.get(lm)
    if held is not None and (held.leaving or held.owner() is None):
        for parameters in held.plain.values():
            put_back(parameters)
        write_weights(lm, held.base)
        _HELD.pop(lm, None)


class Carried:
    """The deltas that a model carries, in ledger order, and the base weights beneath them.

    Attributes:
        lm: The model.
        ledger: The records.
    """

    def __init__(self, lm: LanguageModel, ledger: Ledger) -> None:
        self.lm, self.ledger = lm, ledger
        self._homes = homes(lm)
        self._base: dict[int, Tensor] = {}
        self._plain: dict[int, Held] = {}
        self._state = _State(fingerprint=lm.fingerprint)
        self._under_way: _UnderWay | None = None
        self._mark: int | None = None
        self._turn = 0
        # The digests of then tell whether a matrix that is not patched yet is still the base's.
        self._first = {layer: self._digest(layer) for layer in set(self._homes.values())}

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    @property
    def at(self) -> str:
        """The id of the revision whose weights the model has, or "base"."""
        return self._state.at

    @property
    def deltas(self) -> dict[str, Delta]:
        """{revision id: its delta}, in ledger order."""
        return self._state.deltas

    @property
    def base(self) -> dict[int, Tensor]:
        """{layer: (d_model, d_ff) base weight} of every layer that was ever patched here."""
        return {
            layer: self._base[home] for layer, home in self._homes.items() if home in self._base
        }

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
        if wanted is not None and wanted == self._state.delta_digests.get(revision.id):
            return self.deltas[revision.id]
        return Delta.load(self.ledger.delta_folder(revision, digest))

    def check_weights(self) -> None:
        """Check that the model has the weights that the ledger says.

        Raises:
            FingerprintError: Somebody else changed them: what would be recorded is then not what
                was made.
        """
        if self._mark is None:
            self._finish()
        weights = self._state.weights
        wrong = [layer for layer, digest in weights.items() if self._digest(layer) != digest]
        rows = self._state.rows
        wrong += [layer for layer, digest in rows.items() if self._digest_of_all(layer) != digest]
        if wrong:
            raise FingerprintError(
                f"the weights of layer {_listed(wrong)} were changed outside the workbench, so "
                "what would be recorded is not what was made; "
                "call `rebuild`, which builds them again from the base and the patches"
            )
        if self.lm.fingerprint != self._state.fingerprint:
            raise FingerprintError(
                "the model's weights were changed outside the workbench, so what would be recorded "
                "is not what was made; "
                "load the model again and open the workspace with it"
            )

    def check_bits(self) -> None:
        """Build the weights again from the base and the files, compare them with the model's, and
        then compare the whole model without the patches with the base.

        Afterwards the patched layers have the weights that the ledger says.

        Raises:
            FingerprintError: Some weights were others.
        """
        fresh = [
            Delta.load(self.ledger.delta_folder(revision))
            for revision in self.ledger.active(self.at)
        ]
        built = patched(self._base, fresh, self._homes)
        now = read_weights(self.lm, built)
        wrong = [layer for layer, weight in built.items() if not torch.equal(weight, now[layer])]
        if self._plain:
            before = {layer: self._digest_of_all(layer) for layer in self._plain}
            with self.exactly(fresh):
                after = {layer: self._digest_of_all(layer) for layer in self._plain}
            wrong += [layer for layer, digest in before.items() if after[layer] != digest]
        with self.exactly([]):
            self.lm.fresh_fingerprint()
            is_base = self.lm.has_fingerprint(self.ledger.fingerprint)
        if wrong and is_base:
            raise FingerprintError(
                f"the weights of layer {_listed(wrong)} were not base + patches: something changed "
                "them in memory. They were built again, and the model now carries what the ledger "
                "says; run this again, and find out what writes into the model"
            )
        if not is_base:
            raise FingerprintError(
                "without the patches the model is not the base model any more: something changed "
                "weights in memory that no patch changes; "
                "load the model again and open the workspace with it"
            )

    # ── changing ──────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def exactly(self, deltas: Collection[Delta]) -> Iterator[None]:
        """A block in which the model has base + Σ deltas: the very weights that committing them
        would give.
        """
        turn = self._turn
        with self.lm.gap_choices.held(self.lm):
            try:
                self._under_way = self._under_way or _UnderWay(None, records=False)
                self._put(deltas)
                yield
            finally:
                if turn == self._turn:  # otherwise `settle` has ended the block
                    self._put(self.deltas.values())
                    self._under_way = None

    def move(self, deltas: Collection[Delta], record: Callable[[], T]) -> T:
        """Put deltas into the model and record it in the ledger; if either fails, the model goes
        back.

        The weights come first: they are checked for shape and finite numbers before anything is
        recorded. An interruption that comes when the record is already made leaves both moved,
        since history is not taken back.

        Args:
            deltas: In ledger order.
            record: Writes the record, and returns the revision or its id.
        """
        recorded = False
        self._under_way = _UnderWay(self.ledger.current, records=True)
        try:
            weights = self._put(deltas)
            # It takes a while: before the record, an interruption undoes everything.
            fingerprint = self.lm.fingerprint
            noted = record()
            recorded = True
            identity = noted if isinstance(noted, str) else noted.id
            self._take_over(deltas, weights, fingerprint, identity)
        except BaseException as error:
            self.settle(follow=recorded or not isinstance(error, Exception))
            raise
        return noted

    def go_to(self, identity: str) -> None:
        """Give the model the weights that the ledger says a revision has; write nothing."""
        deltas = [self.delta_of(revision) for revision in self.ledger.active(identity)]
        self._under_way = _UnderWay(None, records=True)
        weights = self._put(deltas)
        self._take_over(deltas, weights, self.lm.fingerprint, identity)

    def release(self) -> None:
        """Put the base weights back, bit for bit."""
        if (held := _HELD.get(self.lm)) is not None and held.base is self._base:
            held.leaving = True
        take_back(self.lm, 0)
        self._put([])
        self._under_way, self._state = None, _State(fingerprint=self.ledger.fingerprint)
        if held is not None and held.base is self._base:
            _HELD.pop(self.lm, None)

    # ── interruptions ─────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """Settle what an interrupted call left, and note that another one begins."""
        self._finish()
        self._mark = n_lent(self.lm)

    def end(self) -> None:
        """Settle what an interruption left, and note that the call has ended."""
        if self._mark is not None:
            take_back(self.lm, self._mark)
        self.settle(follow=True)
        self._mark = None

    def _finish(self) -> None:
        """Settle what an interrupted call left, and say so."""
        is_open = self._under_way is not None
        if self._mark is not None:
            take_back(self.lm, self._mark)
        self.ledger.settle()
        self.settle(follow=True)
        self._mark = None
        if is_open:
            warnings.warn(
                "an interrupted operation, or a block such as a preview, had left other weights in "
                "the model; it now carries what the ledger says",
                stacklevel=4,
            )

    def settle(self, *, follow: bool) -> None:
        """Give the model the weights that the ledger says, if a change of them was interrupted.

        Args:
            follow: Whether a revision that was recorded since counts: it may be that of the change.
        """
        change = self._under_way
        if change is None:
            return
        self._turn += 1
        self.ledger.settle()
        now = self.ledger.current
        if follow and change.records and now != change.started:
            self.go_to(now)
        else:
            self._put(self.deltas.values())
        self._under_way = None

    # ── inside ────────────────────────────────────────────────────────────────────────────────────

    def _put(self, deltas: Collection[Delta]) -> dict[int, Tensor]:
        """Write base + Σ deltas into the model, and return these weights."""
        layers = {self._homes.get(layer, layer) for delta in deltas for layer in delta.layers}
        rows = by_layer([delta.appended for delta in deltas])
        check_rows(self.lm.ffn, rows, self._homes)
        # A layer that was never patched still has its base weights: they are copied before its
        # first change.
        new = layers - self._base.keys()
        base = read_weights(self.lm, new)
        changed = [
            layer for layer in base if self._digest(layer, base[layer]) != self._first[layer]
        ]
        if changed:
            raise FingerprintError(
                f"the weights of layer {_listed(changed)} were changed outside the workbench, so "
                "they are not the base's; load the model again and open the workspace with it"
            )
        self._base.update(base)
        for layer in rows.keys() - self._plain.keys():
            self._plain[layer] = parameters_of(self.lm.ffn[layer])
        if self._base or self._plain:
            _HELD.setdefault(self.lm, _Held(self._base, self._plain, ref(self)))
        weights = patched(self._base, deltas, self._homes)
        for held in self._plain.values():
            put_back(held)
        write_weights(self.lm, weights)
        for layer, neurons in rows.items():
            widen(self.lm.ffn[layer], neurons)
        return weights

    def _take_over(
        self, deltas: Collection[Delta], weights: Mapping[int, Tensor], fingerprint: str, at: str
    ) -> None:
        """Note that the model carries these deltas, those of the revision `at`.

        Not those of the ledger's newest revision: another process may have committed in between.
        """
        active = self.ledger.active(at)
        self._state = _State(
            at=at,
            deltas=dict(zip((revision.id for revision in active), deltas, strict=True)),
            delta_digests={revision.id: revision.carried for revision in active},
            fingerprint=fingerprint,
            weights={layer: self._digest(layer, weight) for layer, weight in weights.items()},
            rows={layer: self._digest_of_all(layer) for layer in self._plain},
        )
        self._under_way = None

    def _digest(self, layer: int, weight: Tensor | None = None) -> str:
        """Return the sha256 of a layer's down-projection, or of a matrix to put there."""
        stored = self.lm.ffn[layer].original_weight()
        weight = stored if weight is None else weight
        weight = weight if stored.stride(1) == 1 else weight.T  # as the model stores it: no copy
        digest = hashlib.sha256()
        _hash(digest, weight)
        return digest.hexdigest()

    def _digest_of_all(self, layer: int) -> str:
        """Return the sha256 of all parameters of a layer's feed-forward linears."""
        digest = hashlib.sha256()
        for _, _, parameter in parameters_of(self.lm.ffn[layer]).parameters:
            if parameter is not None:
                _hash(digest, parameter)
        return digest.hexdigest()


def _hash(digest: hashlib._Hash, weight: Tensor) -> None:
    """Let a digest see a tensor's bytes."""
    flat = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(flat.numpy().data)


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers)))


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
    layers = ", ".join(map(str, delta.touched))
    return f"{delta.method} {counted(len(neurons), 'neuron')} of layer {layers}"


def newest_facts(deltas: Iterable[Delta]) -> list[Fact]:
    """Return the facts of some patches; of those with one prompt the newest."""
    facts: dict[str, Fact] = {}
    for delta in deltas:
        for fact in delta.facts:
            facts.pop(fact.asked, None)
            facts[fact.asked] = fact
    return list(facts.values())
