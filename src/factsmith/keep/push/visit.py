"""One visit to a server: what it carries of the workspace, and the steps of a push.

    visit = Visit(ledger, server, dtype=None, place=AdapterPlace(), progress=None)
    visit.push(revision.id, expected, "factsmith", write)

The caller holds the server's turn (`records.turn`), so that no other process of the workspace
pushes to it at the same time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ...core.errors import FactsmithError, InputError, ServerError
from ...core.progress import Progress, note, tell
from ...remote.server import Server
from ..ledger import BASE, Ledger
from ..workbench import Workbench
from .carrier import Adapter, Carrier, Making
from .carriers import carrier_of
from .expected import Expected, expect
from .names import checked_alias, new_name, parsed
from .place import AdapterPlace
from .proof import NOTHING, Answer, ServedProof, ask, compare, compare_base
from .pushed import Pushed
from .records import PushRecord, now, of_adapters, read_records, write_record
from .tolerance import Tolerance, tolerance_of

Opening: TypeAlias = Callable[[], contextlib.AbstractContextManager[Workbench]]
"""Opens a workspace with its model, where one is needed after all."""

DTYPES = {"vllm": "bfloat16", "llama.cpp": "quantised"}
"""What a kind of server computes in, if nobody says."""


@dataclass(frozen=True)
class CarriedAdapter:
    """An adapter of the workspace in the server: its revision, and the record of its push."""

    adapter: Adapter
    revision: str
    record: PushRecord | None

    @property
    def is_told(self) -> bool:
        """Whether users may know it: not if its push was killed, or it was taken back."""
        return self.record is None or self.record.state == "serving"


class Visit:
    """One visit to a server, while no other process of the workspace pushes to it."""

    def __init__(
        self,
        ledger: Ledger,
        server: Server,
        dtype: str | None,
        place: AdapterPlace,
        progress: Progress | None,
    ) -> None:
        self.ledger, self.server, self.progress = ledger, server, progress
        self.carrier: Carrier = carrier_of(server)
        self.tolerance: Tolerance = tolerance_of(dtype or DTYPES[server.kind])
        self.folder = place.below(ledger)
        self.seen_as = place.seen_as or str(self.folder)
        self.url = server.client.url

    # ── what is there ─────────────────────────────────────────────────────────────────────────────

    def carried(self, alias: str | None = None) -> list[CarriedAdapter]:
        """Return the workspace's adapters that are in use, the one told last at the end."""
        held = self.carrier.held([revision.id for revision in self.ledger.log()])
        records = read_records(self.folder, self.url)
        newest = of_adapters(records)
        order = {record.adapter: at for at, record in enumerate(records)}
        carried = [
            CarriedAdapter(adapter, held[adapter.name], newest.get(adapter.name))
            for adapter in self.carrier.adapters()
            if adapter.name in held and adapter.is_on
        ]
        if alias is not None:
            carried = [each for each in carried if alias_of(each) == alias]
        # Adapters that another machine pushed have no record: the server lists them by age.
        return sorted(carried, key=lambda each: order.get(each.adapter.name, -1))

    def tidy(self) -> None:
        """Take out what pushes have left that were killed, or could not take their adapter out."""
        for each in self.carried():
            if each.record is not None and each.record.state in ("loading", "failed"):
                self.take_out(each.record)
                note(
                    self.progress,
                    f"{each.adapter.name} was left by a push that did not end; it was taken out",
                )

    def newest_two(self, alias: str | None) -> tuple[CarriedAdapter, CarriedAdapter | None]:
        """Return the adapter that was told last, and the one before it if it is still there."""
        carried = [each for each in self.carried(alias) if each.is_told]
        if not carried:
            of = "" if alias is None else f" whose name begins with {alias!r}"
            raise InputError(
                f"{self.url} carries no adapter of this workspace{of} that was proved, so there is "
                f"nothing to roll back; `factsmith served {self.url}` shows what it carries",
                argument="url",
            )
        present, others = carried[-1], carried[:-1]
        if present.record is None:
            return present, others[-1] if others else None
        wanted = present.record.previous
        earlier = [each for each in others if name_of(each) == wanted]
        if not earlier and wanted is not None:
            earlier = self._switched_off(wanted)
        return present, earlier[-1] if earlier else None

    def _switched_off(self, name: str) -> list[CarriedAdapter]:
        """Return the adapter of an earlier push that is there and not in use, as in llama.cpp."""
        records = [
            each
            for each in read_records(self.folder, self.url)
            if each.name == name and each.state == "serving"
        ]
        there = {each.name: each for each in self.carrier.adapters() if not each.is_on}
        return [
            CarriedAdapter(there[record.adapter], record.revision, record)
            for record in records
            if record.adapter in there
        ]

    # ── pushing ───────────────────────────────────────────────────────────────────────────────────

    def push(
        self, revision: str, expected: Expected, alias: str, write: Callable[[Path], int]
    ) -> Pushed:
        """Push one revision, and return what became of it."""
        if not any(each.role == "prompt" and each.held for each in expected.probes):
            return self._failed(expected, NOTHING)
        self.tidy()
        carried = self.carried()
        before = [each for each in carried if each.is_told and self._goes_before(each, alias)]
        base, share, wrong = self._base(expected)
        if wrong is not None:
            return self._failed(expected, wrong)
        for there in carried:
            if there.revision == revision and alias_of(there) == alias:
                again = self._proof(there.adapter, expected, base, share)
                if again.passed:
                    self._note_again(there, expected, before[-1] if before else there)
                    return self._passed(there.adapter, expected, again, again=True)
                note(
                    self.progress,
                    f"{there.adapter.name} is in the server and fails its proof; it stays, and a "
                    "new adapter is pushed",
                )
        record = PushRecord(
            name=new_name(alias, revision),
            url=self.url,
            kind=self.server.kind,
            adapter="",
            path="",
            revision=revision,
            previous=name_of(before[-1]) if before else None,
            state="loading",
            at=now(),
            expected=expected,
        )
        making = Making(record.name, revision, self.folder, self.seen_as, write)
        adapter = self.carrier.chosen(making)
        record = record.having(adapter)
        # Before the load: a push that is killed leaves an adapter that is known not to be proved.
        write_record(self.folder, record)
        tell(self.progress, "loading the adapter into the server", 0, None)
        with self._unless_passed(record):
            self.carrier.put(making)
            proof = self._proof(adapter, expected, base, share)
            if proof.passed:
                self.carrier.settle(adapter, expected)
                write_record(self.folder, record.become("serving"))
        if not proof.passed:
            try:
                self.take_out(record)
            except ServerError as error:
                raise ServerError(
                    f"the proof failed ({proof.failures[0]}), and the adapter could not be taken "
                    f"out: {error} Nobody was told its name.",
                    status=error.status,
                    maybe_done=error.maybe_done,
                ) from None
            return self._failed(expected, *proof.failures, proof=proof, name=adapter.name)
        return self._passed(adapter, expected, proof)

    def _goes_before(self, there: CarriedAdapter, alias: str) -> bool:
        """Return whether a push takes the place of an adapter.

        In vLLM each alias has its own adapters. In llama.cpp they are for everybody.
        """
        return self.server.kind == "llama.cpp" or alias_of(there) == alias

    def _note_again(
        self, there: CarriedAdapter, expected: Expected, newest: CarriedAdapter
    ) -> None:
        """Record that an adapter that was there is now the one that is told."""
        previous = None if there.record is None else there.record.previous
        if newest.adapter.name != there.adapter.name:
            previous = name_of(newest)
        record = PushRecord(
            name=name_of(there),
            url=self.url,
            kind=self.server.kind,
            adapter=there.adapter.name,
            path=there.adapter.path,
            revision=there.revision,
            previous=previous,
            state="serving",
            at=now(),
            expected=expected,
        )
        write_record(self.folder, record)

    @contextlib.contextmanager
    def _unless_passed(self, record: PushRecord) -> Iterator[None]:
        """A block after whose exception the adapter is out of the server."""
        try:
            yield
        except BaseException as error:
            try:
                self.take_out(record)
            except ServerError as second:
                note(self.progress, f"{record.adapter} could not be taken out: {second}")
            except FactsmithError as second:
                note(self.progress, f"{record.adapter} is not in the server. {second}")
            raise error

    def take_out(self, record: PushRecord) -> None:
        """Take the adapter of a failed push out of the server, and then its files away.

        The server comes first: the disk may be full.
        """
        try:
            self.carrier.withdraw(Adapter(record.adapter, record.path, True))
        except ServerError as error:
            if error.status is None:  # the server is gone, and the adapter with it
                self._remove(record.name)
            write_record(self.folder, record.become("failed"))
            raise
        self._remove(record.name)
        write_record(self.folder, record.become("failed"))

    def _remove(self, name: str) -> None:
        """Remove the files of an adapter that the server does not carry."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    # ── going back ────────────────────────────────────────────────────────────────────────────────

    def withdrawn_and_there(self, alias: str | None) -> Pushed | None:
        """Take out what an earlier rollback could not; return what is used, or None: all is out."""
        carried = self.carried(alias)
        left = [each for each in carried if each.record and each.record.state == "withdrawn"]
        if not left:
            return None
        used = [each for each in carried if each.is_told]
        result = Pushed.base(self.server, self.carrier.model_of(None), BASE)
        if used:
            there = used[-1]
            result = Pushed(
                url=self.url,
                kind=self.server.kind,
                model=self.carrier.model_of(there.adapter),
                adapter=there.adapter.name,
                path=there.adapter.path,
                revision=there.revision,
                again=True,
            )
        for each in left:
            self.withdraw(each, result)
            result = result.without(each.adapter.name)
        return result

    def prove_again(self, earlier: CarriedAdapter, opening: Opening | None) -> Pushed:
        """Prove an adapter that is there by the record of its push, and let users have it."""
        if earlier.record is not None:
            expected = earlier.record.expected
        elif opening is not None:
            with opening() as bench:
                expected = expect(bench, earlier.revision, self.progress)
        else:
            raise InputError(
                f"{earlier.adapter.name} was pushed from elsewhere, so its proof is not kept here. "
                f"Push revision {earlier.revision[:10]}, which proves it again.",
                argument="url",
            )
        base, share, wrong = self._base(expected)
        if wrong is not None:
            return self._failed(expected, wrong)
        proof = self._proof(earlier.adapter, expected, base, share)
        if not proof.passed:
            failed = self._failed(expected, *proof.failures, proof=proof, name=earlier.adapter.name)
            return dataclasses.replace(failed, again=True)
        self.carrier.settle(earlier.adapter, expected)
        if earlier.record is not None:
            write_record(self.folder, earlier.record.become("serving"))
        return self._passed(earlier.adapter, expected, proof, again=True)

    def before_in_ledger(
        self,
        present: CarriedAdapter,
        alias: str | None,
        opening: Opening | None,
    ) -> Pushed:
        """Push the revision before in the ledger; without a patch there, the base model remains.

        So it does after a revert: the revision before holds what was taken back.
        """
        revision = self.ledger.show(present.revision)
        parent = BASE if revision.kind == "revert" else revision.parent
        if parent == BASE or not any(each.in_effect for each in self.ledger.active(parent)):
            return Pushed.base(self.server, self.carrier.model_of(None), parent)
        if opening is None:
            raise InputError(
                f"the adapter before {present.adapter.name} is not in the server any more. Push "
                f"revision {parent[:10]}, then take {present.adapter.name} out.",
                argument="url",
            )
        with opening() as bench:
            expected = expect(bench, parent, self.progress)

            def write(folder: Path) -> int:
                return bench.export(folder, "adapter", revision=parent, verify=False).rank

            name = checked_alias(alias or alias_of(present))
            return self.push(parent, expected, name, write)

    def withdraw(self, present: CarriedAdapter, now_used: Pushed) -> None:
        """Take the present adapter out of use, after another one has been proved."""
        # First the record: a rollback that is repeated must not come back to this adapter.
        if present.record is not None:
            write_record(self.folder, present.record.become("withdrawn"))
        if present.adapter.name == now_used.adapter:
            return
        try:
            self.carrier.withdraw(present.adapter)
        except ServerError as error:
            raise ServerError(
                f"{error} The name to use is {now_used.model}, which was proved; "
                f"{present.adapter.name} counts as withdrawn. Unload it when the server answers.",
                status=error.status,
                maybe_done=error.maybe_done,
            ) from None

    # ── proving ───────────────────────────────────────────────────────────────────────────────────

    def _base(self, expected: Expected) -> tuple[list[Answer], float, str | None]:
        """Ask the server's own model; say what is wrong if it is not the workspace's."""
        tell(self.progress, "asking the server's model without patches", 0, None)
        answers = ask(self.carrier.base_voice(), expected, self.progress)
        return answers, *compare_base(expected, answers, self.tolerance)

    def _proof(
        self, adapter: Adapter, expected: Expected, base: Sequence[Answer], share: float
    ) -> ServedProof:
        tell(self.progress, "asking the server with the patches", 0, None)
        answers = ask(self.carrier.voice(adapter), expected, self.progress)
        return compare(expected, base, answers, self.tolerance, share)

    def _passed(
        self, adapter: Adapter, expected: Expected, proof: ServedProof, *, again: bool = False
    ) -> Pushed:
        return Pushed(
            url=self.url,
            kind=self.server.kind,
            model=self.carrier.model_of(adapter),
            adapter=adapter.name,
            path=adapter.path,
            revision=expected.revision,
            proof=proof,
            again=again,
        )

    def _failed(
        self,
        expected: Expected,
        *failures: str,
        proof: ServedProof | None = None,
        name: str | None = None,
    ) -> Pushed:
        return Pushed(
            url=self.url,
            kind=self.server.kind,
            model=None,
            adapter=name,
            path=None,
            revision=expected.revision,
            proof=proof,
            failures=failures,
        )


def alias_of(carried: CarriedAdapter) -> str | None:
    """Return the alias in the name of the push; None where it is not known."""
    name = parsed(name_of(carried))
    return None if name is None else name.alias


def name_of(carried: CarriedAdapter) -> str:
    """Return the name of the push; that of the adapter where there is no record."""
    return carried.adapter.name if carried.record is None else carried.record.name
