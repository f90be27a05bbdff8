"""Push revisions to a server: put the adapter there, prove it there, and only then name it.

    with Server.open("http://127.0.0.1:8000") as server:
        check_push(ledger, server, ["latest"])          # before a model is loaded
        pushed = push(bench, server, ["latest"])
        pushed[0].model                                 # what users ask for; None: the proof failed
        roll_back(ledger, server)                       # needs no model in most cases

The order is: the server's own model is compared with the workspace's; the adapter is loaded under a
new name; the proof is asked of it; then the name is told, or the adapter is taken out again. An
exception, a Ctrl-C and a killed server leave no adapter that was not proved, as far as the server
can be reached.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ...core.errors import FactsmithError, InputError
from ...core.progress import Progress, note, tell
from ...edit.delta_folder import stated_neurons
from ...remote.server import Server
from ..export.contents import check_no_neurons
from ..ledger import BASE, Ledger
from ..revision import Revision
from ..workbench import Workbench
from .carrier import Adapter, Carrier, Making
from .carriers import carrier_of
from .expected import Expected, expect
from .names import checked_alias, new_name, parsed
from .proof import Answer, ServedProof, ask, compare, compare_base
from .pushed import Pushed
from .records import FOLDER, PushRecord, check_folder, now, read_records, turn, write_record
from .tolerance import Tolerance, tolerance_of

Opening: TypeAlias = Callable[[], contextlib.AbstractContextManager[Workbench]]
"""Opens a workspace with its model, where one is needed after all."""

DTYPES = {"vllm": "bfloat16", "llama.cpp": "quantised"}
"""What a kind of server computes in, if nobody says."""


@dataclass(frozen=True)
class AdapterPlace:
    """Where adapters and records are kept.

    Attributes:
        folder: The folder that holds them. None: `served` in the workspace.
        seen_as: The same folder, as the server sees it. None: by the same path.
    """

    folder: Path | None = None
    seen_as: str | None = None

    def below(self, ledger: Ledger) -> Path:
        """Return the folder for a workspace, as a full path."""
        return (self.folder or ledger.folder / FOLDER).resolve()


def check_push(
    ledger: Ledger,
    server: Server,
    references: Sequence[str] = (),
    *,
    alias: str | None = None,
    dtype: str | None = None,
    place: AdapterPlace = AdapterPlace(),
) -> list[Revision]:
    """Check the arguments of a push before a model is loaded.

    Args:
        ledger: The workspace's records.
        server: The server.
        references: The revisions. (): the one that is checked out.
        alias: As for `push`.
        dtype: As for `push`.
        place: As for `push`.

    Returns:
        The revisions, as their records.

    Raises:
        InputError: when the server takes no adapters, or a revision cannot be one.
        RevisionError: when there is no such revision.
        WorkspaceError: when adapters or records cannot be written.
        ServerError: when the server does not answer.
    """
    checked_alias(alias)
    if dtype is not None:
        tolerance_of(dtype)
    carrier_of(server).check()
    check_folder(place.below(ledger))
    identities = [ledger.resolve(each) for each in references or [ledger.current]]
    if len(set(identities)) < len(identities):
        raise InputError("a revision is named twice; name each once", argument="revisions")
    for identity in identities:
        active = ledger.active(identity)
        if not any(revision.in_effect for revision in active):
            raise InputError(
                f"revision {identity[:10]} has no fact in effect, so nothing could be proved in a "
                "server; `factsmith log` lists the revisions",
                argument="revisions",
            )
        folders = [ledger.delta_folder(revision, revision.carried) for revision in active]
        check_no_neurons("adapter", sum(map(stated_neurons, folders)))
    return [ledger.show(identity) for identity in identities]


def push(
    bench: Workbench,
    server: Server,
    references: Sequence[str] = (),
    *,
    alias: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    place: AdapterPlace = AdapterPlace(),
    progress: Progress | None = None,
) -> list[Pushed]:
    """Put revisions into a server as adapters, and prove each there.

    A revision that the server carries already is proved again, and not loaded again. After a proof
    that fails, the adapter is out of the server, and the revisions after it are not pushed.

    Args:
        bench: The workspace with its model. Its checkout does not move.
        server: vLLM with runtime updating of adapters, or llama.cpp.
        references: The revisions: ids, unique prefixes or "latest". (): the one checked out.
        alias: What the adapters' names begin with. None: "factsmith".
        dtype: What the server computes in, for the tolerance of the proof: "float32", "float16",
            "bfloat16" or "quantised". None: bfloat16 in vLLM, quantised in llama.cpp.
        base: The base model's name for adapter_config.json, as in `export_adapter`.
        place: Where adapters and records are kept.
        progress: Called with the step's name and how much is done.

    Returns:
        One result for each revision that was tried.

    Raises:
        ServerError: when the server cannot be reached or refuses.
        InputError, RevisionError, WorkspaceError, DamagedError: as `check_push`.
    """
    checked = check_push(bench.ledger, server, references, alias=alias, dtype=dtype, place=place)
    pushing = _Pushing(bench.ledger, server, dtype, place, progress)
    results: list[Pushed] = []
    with turn(pushing.folder, server.client.url, progress):
        for revision in checked:
            expected = expect(bench, revision.id, progress)

            def write(folder: Path, revision: Revision = revision) -> int:
                tell(progress, "writing the adapter", 0, None)
                made = bench.export(
                    folder, "adapter", revision=revision.id, base=base, verify=False
                )
                return made.rank

            results.append(pushing.push(revision.id, expected, checked_alias(alias), write))
            if not results[-1].passed:
                break
    return results


def roll_back(
    ledger: Ledger,
    server: Server,
    *,
    alias: str | None = None,
    dtype: str | None = None,
    place: AdapterPlace = AdapterPlace(),
    opening: Opening | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Go back to the revision that a server carried before, and take the present one out.

    The earlier adapter is proved first, by the proof that was kept when it was pushed. If it is no
    longer there, the revision before in the ledger is pushed. If that has no patch, the base model
    is what remains.

    Args:
        ledger: The workspace's records.
        server: The server.
        alias: Only adapters whose names begin with it. None: all of this workspace.
        dtype: As for `push`.
        place: As for `push`.
        opening: Opens the workspace with its model, where an adapter must be made again.
        progress: Called with the step's name and how much is done.

    Returns:
        What the server carries now. Its `withdrawn` names what was taken out; after a proof that
        fails it names nothing, and the server is as it was.

    Raises:
        InputError: when the server carries no adapter of this workspace.
        ServerError: when the server cannot be reached or refuses.
    """
    if alias is not None:
        checked_alias(alias)
    rolling = _Pushing(ledger, server, dtype, place, progress)
    with turn(rolling.folder, server.client.url, progress):
        present, earlier = rolling.newest_two(alias)
        if earlier is not None:
            result = rolling.prove_again(earlier, opening)
        else:
            result = rolling.before_in_ledger(present, alias, opening)
        if not result.passed:
            return result
        rolling.withdraw(present, keep=result.adapter)
    return result.without(present.adapter.name)


@dataclass(frozen=True)
class _Carried:
    """An adapter of the workspace in the server: its revision, and the record of its push."""

    adapter: Adapter
    revision: str
    record: PushRecord | None

    @property
    def is_told(self) -> bool:
        """Whether users may know it: not if its push was killed, or it was taken back."""
        return self.record is None or self.record.state == "serving"


class _Pushing:
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

    def carried(self, alias: str | None = None) -> list[_Carried]:
        """Return the workspace's adapters that are in use, the one told last at the end."""
        held = self.carrier.held([revision.id for revision in self.ledger.log()])
        records = read_records(self.folder, self.url)
        newest = {record.adapter: record for record in records}
        order = {record.adapter: at for at, record in enumerate(records)}
        carried = [
            _Carried(adapter, held[adapter.name], newest.get(adapter.name))
            for adapter in self.carrier.adapters()
            if adapter.name in held and adapter.is_on
        ]
        if alias is not None:
            carried = [each for each in carried if _alias_of(each) == alias]
        # Adapters that another machine pushed have no record: the server lists them by age.
        return sorted(carried, key=lambda each: order.get(each.adapter.name, -1))

    def newest_two(self, alias: str | None) -> tuple[_Carried, _Carried | None]:
        """Return the adapter that was told last, and the one before it if it is still there."""
        carried = [each for each in self.carried(alias) if each.is_told]
        if not carried:
            of = "" if alias is None else f" whose name begins with {alias!r}"
            raise InputError(
                f"{self.url} carries no adapter of this workspace{of}, so there is nothing to roll "
                "back; `factsmith served` shows what it carries",
                argument="url",
            )
        present, others = carried[-1], carried[:-1]
        if present.record is None:
            return present, others[-1] if others else None
        wanted = present.record.previous
        earlier = [each for each in others if _name_of(each) == wanted]
        if not earlier and wanted is not None:
            earlier = self._switched_off(wanted)
        return present, earlier[-1] if earlier else None

    def _switched_off(self, name: str) -> list[_Carried]:
        """Return the adapter of an earlier push that is there and not in use, as in llama.cpp."""
        records = [each for each in read_records(self.folder, self.url) if each.name == name]
        there = {each.name: each for each in self.carrier.adapters() if not each.is_on}
        return [
            _Carried(there[record.adapter], record.revision, record)
            for record in records
            if record.adapter in there
        ]

    # ── pushing ───────────────────────────────────────────────────────────────────────────────────

    def push(
        self, revision: str, expected: Expected, alias: str, write: Callable[[Path], int]
    ) -> Pushed:
        """Push one revision, and return what became of it."""
        carried = self.carried()
        before = [each for each in carried if each.is_told]
        base, share, wrong = self._base(expected)
        if wrong is not None:
            return self._failed(expected, wrong)
        for there in carried:
            if there.revision == revision and _alias_of(there) == alias:
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
            previous=_name_of(before[-1]) if before else None,
            state="loading",
            at=now(),
            expected=expected,
        )
        making = Making(record.name, revision, self.folder, self.seen_as, write)
        tell(self.progress, "loading the adapter into the server", 0, None)
        try:
            adapter = self.carrier.put(making)
        except BaseException:
            # An answer that was lost, and a Ctrl-C, may have left the adapter in the server.
            with contextlib.suppress(FactsmithError):
                self.carrier.withdraw(Adapter(record.name, "", True))
            self._remove(record.name)
            raise
        record = record.having(adapter)
        write_record(self.folder, record)
        with self._unless_passed(record):
            proof = self._proof(adapter, expected, base, share)
            if proof.passed:
                self.carrier.settle(adapter)
                write_record(self.folder, record.become("serving"))
        if not proof.passed:
            self.take_out(record)
            return self._failed(expected, *proof.failures, proof=proof, name=adapter.name)
        return self._passed(adapter, expected, proof)

    def _note_again(self, there: _Carried, expected: Expected, newest: _Carried) -> None:
        """Record that an adapter that was there is now the one that is told."""
        previous = None if there.record is None else there.record.previous
        if newest.adapter.name != there.adapter.name:
            previous = _name_of(newest)
        record = PushRecord(
            name=_name_of(there),
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
            except FactsmithError as second:
                note(self.progress, f"{record.adapter} could not be taken out: {second}")
            raise error

    def take_out(self, record: PushRecord) -> None:
        """Take the adapter of a failed push out of the server, and its files away."""
        try:
            self.carrier.withdraw(Adapter(record.adapter, record.path, True))
        finally:
            write_record(self.folder, record.become("failed"))
            self._remove(record.name)

    def _remove(self, name: str) -> None:
        """Remove the files of an adapter that the server does not carry."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    # ── going back ────────────────────────────────────────────────────────────────────────────────

    def prove_again(self, earlier: _Carried, opening: Opening | None) -> Pushed:
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
            return self._failed(expected, *proof.failures, proof=proof, name=earlier.adapter.name)
        self.carrier.settle(earlier.adapter)
        if earlier.record is not None:
            write_record(self.folder, earlier.record.become("serving"))
        return self._passed(earlier.adapter, expected, proof, again=True)

    def before_in_ledger(
        self,
        present: _Carried,
        alias: str | None,
        opening: Opening | None,
    ) -> Pushed:
        """Push the revision before in the ledger; without a patch there, the base model remains."""
        parent = self.ledger.show(present.revision).parent
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

            name = checked_alias(alias or _alias_of(present))
            return self.push(parent, expected, name, write)

    def withdraw(self, present: _Carried, keep: str | None) -> None:
        """Take the present adapter out of use."""
        if present.adapter.name != keep:
            self.carrier.withdraw(present.adapter)
        if present.record is not None:
            write_record(self.folder, present.record.become("withdrawn"))

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


def _alias_of(carried: _Carried) -> str | None:
    """Return the alias in the name of the push; None where it is not known."""
    name = parsed(_name_of(carried))
    return None if name is None else name.alias


def _name_of(carried: _Carried) -> str:
    """Return the name of the push; that of the adapter where there is no record."""
    return carried.adapter.name if carried.record is None else carried.record.name
