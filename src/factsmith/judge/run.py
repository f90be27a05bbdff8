"""A run: edit, ask, restore; single facts, batches, or rounds on top of one another.

    evaluation = evaluate(lm, suite, {"rome": write}, size=1)         # each record by itself
    evaluation = evaluate(lm, suite, {"memit": write}, size=100, sequence=True, folder="runs/memit")
    evaluation = evaluate(lm, "atlas", delta=delta, limit=100)       # a change that is made already
    evaluation                                # a table: the base model first, with 95 % intervals
    evaluation.rows, evaluation.summary("memit")

The base model is asked first. Then each editor writes its edits, one after the other. After an edit
the model is asked, its drift is measured, and the edit is taken back. Success is the papers'
two-way comparison, and exact match is the model's own greedy answer. Both are always reported
together.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ..core.checks import check_count, check_items, check_seed
from ..core.errors import FactsmithError, InputError, NumericsError
from ..core.files import folder_path
from ..core.progress import Progress, tell
from ..core.tables import counted
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .drift import Reference
from .editor import (
    Change,
    Editor,
    MadeChanges,
    check_changes,
    check_editors,
    description_of,
    enter,
)
from .evaluation import DRIFTS, Evaluation
from .records import Record, Suite
from .rows import BASE, BROKEN, PROBE, Continuation, Row, finite_numbers
from .schedule import Schedule
from .score import continue_texts, score
from .store import FORMAT, Store, Unit
from .suites import load_suite
from .usable import facts_of, why_unwritable

Probe = Callable[[], Mapping[str, float]]
"""Measures anything of the model as it is now, such as the function that `ability` returns."""


@asking(grad=True, changes=True)
def evaluate(  # house: the public name and its keywords are promised; they become a Schedule
    lm: LanguageModel,
    suite: Suite | str | os.PathLike[str] | Iterable[Record],
    editors: Mapping[str, Editor] | None = None,
    *,
    delta: Change | Iterable[Change] | None = None,
    limit: int | None = None,
    size: int | None = None,
    sequence: bool = False,
    retained: int = 100,
    max_new_tokens: int | None = None,
    drift_tokens: int = 500,
    texts: Iterable[str] | None = None,
    continued: int = 10,
    probe: Probe | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge editors: write some records at a time, ask everything about them, take the edit back.

    Without `editors` and `delta` only the base model is asked. With editors, a record without a
    fact to write is left out. An edit has failed if its editor raises an error of factsmith: its
    questions are asked of the model without it, and `failed` holds the reason. Records that cannot
    be asked about, or that keep the others of an edit from being written, are left out, and
    `unusable` holds the reasons. If an edited model gives no finite numbers, its answers count as
    wrong, and `notes` say so. In all these cases the run goes on. Other exceptions of an editor
    end it.

    Args:
        lm: The model. It is unchanged afterwards, also after an error.
        suite: A suite, some of its records, or what `load_suite` takes.
        editors: {name: editor}, such as `editors` of factsmith returns.
        delta: Instead of editors, a change that is made already, or several on top of one another.
        limit: Number of records to draw. None: all.
        size: Number of records an edit, see `Schedule`. None: 1, and all for a delta.
        sequence: Whether each edit is put on top of the edits before it, see `Schedule`.
        retained: Records of each earlier round that are asked again, see `Schedule`.
        max_new_tokens: Length of the greedy answers, see `Schedule`.
        drift_tokens: Tokens of text on which drift is measured, see `Schedule`. The distributions
            of the base model take (drift_tokens, vocab) float32 of memory.
        texts: The text for drift. None: the model writes it.
        continued: Number of records whose text the model continues, see `Schedule`.
        probe: Anything else to measure of the model, such as what `ability` returns: called for the
            base model, and after every editor's last edit.
        seed: Seed of everything that is drawn.
        folder: Keeps rows.jsonl. If the same call finds a run that was killed there, it goes on.
            The finished rounds of a sequence are written again and not asked again.
        progress: Gets the number of edits that are done.

    Raises:
        InputError: when there is no record to judge, two records have one id, an argument is wrong,
            or the folder holds another run. Editors and `load_suite` raise it too.
        FingerprintError: when the folder holds a run of another model.
        DamagedError: when the folder's file cannot be read.
    """
    check_model(lm)
    records = chosen_records(suite, limit, check_seed(seed))
    changes = () if delta is None else check_changes(delta)
    if changes and (editors is not None or size is not None or sequence):
        raise InputError(
            "a delta is judged as a whole; leave out editors, size and sequence", argument="delta"
        )
    n_chosen = len(records)
    if editors is not None:
        editors = check_editors(editors)
        records = [record for record in records if _is_writable(record)]
        size = 1 if size is None else size
    else:
        editors = {"delta": MadeChanges(lm, changes)} if changes else {}
        size = max(1, len(records)) if size is None else size
    if not records:
        raise InputError(
            f"there is no record with a fact to write among {counted(n_chosen, 'record')}; "
            "give at least one",
            argument="suite",
        )
    schedule = Schedule(
        size=size,
        sequence=sequence,
        retained=retained,
        max_new_tokens=max_new_tokens,
        drift_tokens=drift_tokens,
        texts=None if texts is None else check_items(texts, "texts", "texts", also="None"),
        continued=continued,
        seed=seed,
    )
    run = Run(lm, records, schedule, folder=folder, probe=probe, skipped=n_chosen - len(records))
    return run.judge(editors, progress=progress)


class Run:
    """Records that are judged by a schedule.

        Run(lm, records, Schedule(size=100), folder="runs/memit").judge({"memit": write})

    Every step keeps what it asked and measured in a store. A step that the store has finished is
    not done again, so a run that was killed goes on.
    """

    def __init__(
        self,
        lm: LanguageModel,
        records: Sequence[Record],
        schedule: Schedule,
        *,
        folder: str | os.PathLike[str] | None = None,
        probe: Probe | None = None,
        skipped: int = 0,
    ) -> None:
        """Prepare a run, or open the one that a folder holds.

        Args:
            lm: The model, unedited.
            records: The records to judge, at least one.
            schedule: How they are written, asked about and measured.
            folder: Keeps rows.jsonl. None: the rows are kept in memory only.
            probe: Anything else to measure of the model.
            skipped: Number of records that were left out before, for the result.

        Raises:
            InputError: when two records have one id, the probe is no function, or the folder holds
                another run.
            FingerprintError: when the folder holds a run of another model.
            DamagedError: when the folder's file cannot be read.
        """
        if len({record.id for record in records}) < len(records):
            raise InputError(
                "two records have the same id, so their rows cannot be told apart; make ids unique",
                argument="suite",
            )
        if probe is not None and not callable(probe):
            raise InputError(
                f"probe is a {type(probe).__name__}; "
                "give a function without arguments that returns numbers by name",
                argument="probe",
            )
        self.lm, self.records, self.probe = lm, list(records), probe
        self.schedule = schedule.for_records(lm, self.records)
        self.units = self.schedule.units(self.records)
        self.unit_of = {record.id: at for at, unit in enumerate(self.units) for record in unit}
        with_prompts = [record.id for record in self.records if record.generation_prompts]
        self.continued = set(with_prompts[: self.schedule.continued])
        made_from = {
            "format": FORMAT,
            "fingerprint": lm.fingerprint,
            "records": hashlib.sha256(repr(self.records).encode()).hexdigest(),
            **self.schedule.made_from(),
            "probe": None if probe is None else description_of(probe),
        }
        about = {"model": lm.name, "skipped": skipped, "units": len(self.units)}
        self.store = Store.open(None if folder is None else folder_path(folder), made_from, about)
        self.answers_before: dict[str, str] = {}
        """{prompt: answer of the base model}."""
        self.reference: Reference | None = None
        """The base model, to measure drift from. None: no drift is measured."""

    @property
    def last(self) -> int:
        """Number of the last edit."""
        return len(self.units) - 1

    def judge(
        self, editors: Mapping[str, Editor], *, progress: Progress | None = None
    ) -> Evaluation:
        """Ask the base model, then let each editor write its edits, and ask after each.

        Args:
            editors: {name: editor}. {}: only the base model is asked.
            progress: Gets the number of edits that are done.

        Raises:
            InputError: when the folder has rows of an editor with other settings.
        """
        for name, editor in editors.items():
            self.store.check_editor(name, description_of(editor))
        total = (len(editors) + 1) * len(self.units)
        done = 0
        for unit in range(len(self.units)):
            self.ask_base(unit)
            done += 1
            tell(progress, "judging", done, total)
        self._check_any_asked()
        rows_of_base = (row for row in self.store.rows if row.editor == BASE)
        self.answers_before = {row.prompt: row.answer for row in rows_of_base}
        self.reference = self._reference(editors)
        for name, editor in editors.items():
            with ExitStack() as rounds:
                for unit in range(len(self.units)):
                    self.write(name, editor, unit, rounds)
                    done += 1
                    tell(progress, "judging", done, total)
        return Evaluation.of(self.store)

    # ── the steps ─────────────────────────────────────────────────────────────────────────────────

    def ask_base(self, unit: int) -> None:
        """Ask the base model about the records of one edit."""
        if self.store.has(BASE, unit):
            return
        unusable: dict[str, str] = {}
        try:
            rows, continuations = self._base_answers(unit, self.units[unit])
        except FactsmithError:  # find out whose fault it is
            rows, continuations = [], []
            for record in self.units[unit]:
                try:
                    rows_of_one, texts_of_one = self._base_answers(unit, [record])
                except FactsmithError as error:
                    unusable[record.id] = str(error)
                else:
                    rows += rows_of_one
                    continuations += texts_of_one
        notes = self.probe_model() if unit == 0 else {}
        self.store.add(Unit(BASE, unit, rows, continuations, notes, unusable=unusable))

    def _base_answers(
        self, unit: int, records: Sequence[Record]
    ) -> tuple[list[Row], list[Continuation]]:
        """What the base model answers and writes about some records."""
        rows = score(self.lm, records, max_new_tokens=self.schedule.max_new_tokens)
        rows = [replace(row, written=self.unit_of[row.record]) for row in rows]
        return rows, self.go_on(BASE, unit, records)

    def _check_any_asked(self) -> None:
        """Raise an InputError if no record could be asked about."""
        if not (unusable := self._unusable) or len(unusable) < len(self.records):
            return
        record, reason = next(iter(unusable.items()))
        raise InputError(
            f"the model can be asked about none of {counted(len(self.records), 'record')}; "
            f"the first is {record}: {reason}",
            argument="suite",
        )

    @property
    def _unusable(self) -> dict[str, str]:
        """{record: reason} of the records that the model cannot be asked about."""
        by_unit = [why for (editor, _), why in self.store.unusable.items() if editor == BASE]
        return {record: reason for why in by_unit for record, reason in why.items()}

    def _usable(self, records: Sequence[Record]) -> list[Record]:
        """The records that the model can be asked about."""
        unusable = self._unusable
        return [record for record in records if record.id not in unusable]

    def write(self, name: str, editor: Editor, unit: int, rounds: ExitStack) -> None:
        """Write the records of one edit, ask the model, and take the edit back.

        Args:
            name: Name of the editor.
            editor: The editor.
            unit: Number of the edit.
            rounds: Holds the edits of a sequence until it ends.
        """
        is_sequence = self.schedule.sequence
        # A sequence that was killed needs its finished rounds in the model again.
        is_written_again = is_sequence and not self.store.has(name, self.last)
        if self.store.has(name, unit) and not is_written_again:
            return
        with ExitStack() as alone:
            stack = rounds if is_sequence else alone
            notes, failure, unusable = self._enter(stack, editor, self._usable(self.units[unit]))
            if not self.store.has(name, unit):
                asked = self.ask_after(name, unit, finite_numbers(notes), failure)
                self.store.add(asked._replace(unusable=unusable))

    def _enter(
        self, stack: ExitStack, editor: Editor, records: Sequence[Record]
    ) -> tuple[object, str, dict[str, str]]:
        """Let an editor write records until a stack is closed.

        Where that fails, the records that cannot be written are left out.

        Returns:
            What the editor notes, the reason if nothing was written, and {record: reason} of the
            records that were left out.
        """
        if not records:
            return {}, "the model cannot be asked about any of its records", {}
        notes, failure = enter(stack, editor, facts_of(records))
        if not failure or len(records) == 1:
            return notes, failure, {}
        unusable = {one.id: why for one in records if (why := why_unwritable(self.lm, one))}
        rest = [record for record in records if record.id not in unusable]
        if not rest or not unusable:
            return notes, failure, {}
        notes, failure = enter(stack, editor, facts_of(rest))
        return notes, failure, unusable

    def ask_after(self, name: str, unit: int, notes: dict[str, float], failure: str) -> Unit:
        """Ask the edited model everything that belongs after an edit, and measure it.

        Args:
            name: Name of the editor.
            unit: Number of the edit.
            notes: What the editor noted of the edit.
            failure: The reason why the edit could not be made; "" if it was made.
        """
        is_sequence, is_last = self.schedule.sequence, unit == self.last
        members = self._usable(self.units[unit])
        continued = members
        if is_sequence:
            members = self._usable(self.records) if is_last else members
            continued = members if is_last else []
        rows = self.ask(name, unit, members)
        if is_sequence and not is_last:
            rows += self.ask(name, unit, self._earlier_prompts(unit))
        continuations = self.go_on(name, unit, continued)
        notes = {**notes, **self.measure_drift(unit), **(self.probe_model() if is_last else {})}
        if any(row.broken for row in rows):
            notes[BROKEN] = 1.0
        return Unit(name, unit, rows, continuations, notes, failure)

    def ask(self, name: str, unit: int, records: Sequence[Record]) -> list[Row]:
        """Ask the edited model about some records."""
        rows = score(
            self.lm,
            records,
            before=self.answers_before,
            max_new_tokens=self.schedule.max_new_tokens,
        )
        return [
            replace(row, editor=name, unit=unit, written=self.unit_of[row.record]) for row in rows
        ]

    def go_on(self, name: str, unit: int, records: Sequence[Record]) -> list[Continuation]:
        """Let the model continue the generation prompts of those records that the schedule
        names."""
        chosen = [record for record in records if record.id in self.continued]
        return continue_texts(self.lm, chosen, seed=self.schedule.seed, editor=name, unit=unit)

    def measure_drift(self, unit: int) -> dict[str, float]:
        """Measure how far the edited model is from the base model; {} if the schedule does not."""
        if self.reference is None or not self.schedule.measures_drift(unit):
            return {}
        try:
            measures = self.reference.compare().measures
        except NumericsError:
            return {BROKEN: 1.0}
        values = {
            name: value for name, value in measures.items() if name in DRIFTS and value is not None
        }
        finite = finite_numbers(values)
        return finite if len(finite) == len(values) else {**finite, BROKEN: 1.0}

    def probe_model(self) -> dict[str, float]:
        """Call the probe; {} if there is no probe."""
        if self.probe is None:
            return {}
        try:
            return {f"{PROBE}{name}": value for name, value in finite_numbers(self.probe()).items()}
        except NumericsError:
            return {BROKEN: 1.0}

    def _earlier_prompts(self, unit: int) -> list[Record]:
        """Return records of the rounds before, each with its prompt questions alone."""
        return [
            replace(record, questions=tuple(q for q in record.questions if q.kind == "prompt"))
            for earlier in self.units[:unit]
            for record in self._usable(earlier)[: self.schedule.retained]
        ]

    def _reference(self, editors: Mapping[str, Editor]) -> Reference | None:
        """Return the base model to measure drift from, if an edit needs it."""
        needed = any(
            not self.store.has(name, unit) for name in editors for unit in range(len(self.units))
        )
        if not self.schedule.drift_tokens or not needed:
            return None
        changes = (e.changes for e in editors.values() if isinstance(e, MadeChanges))
        written = [record.facts for record in self.records]
        written += [tuple(change.facts) for each in changes for change in each]
        return Reference(
            self.lm,
            texts=self.schedule.texts,
            without=[fact.subject for facts in written for fact in facts],
            max_tokens=self.schedule.drift_tokens,
            seed=self.schedule.seed,
        )


# ── which records ─────────────────────────────────────────────────────────────────────────────────


def chosen_records(
    suite: Suite | str | os.PathLike[str] | Iterable[Record], limit: int | None, seed: int
) -> list[Record]:
    """Return the records to judge, or a sample of them in their order."""
    if isinstance(suite, (str, os.PathLike)):
        what = Path(suite) if isinstance(suite, os.PathLike) else suite
        return list(load_suite(what, limit=limit, seed=seed).records)
    records = check_items(
        suite.records if isinstance(suite, Suite) else suite,
        "suite",
        "records",
        also="a suite, or its name or file",
    )
    if strange := [type(each).__name__ for each in records if not isinstance(each, Record)]:
        raise InputError(
            f"the suite holds a {strange[0]}; give records of a suite: load_suite(...).records",
            argument="suite",
        )
    if limit is None:
        return records
    limit = check_count(limit, "limit", "the number of records to draw", also="None for all")
    if limit >= len(records):
        return records
    return [records[at] for at in sorted(random.Random(seed).sample(range(len(records)), limit))]


def _is_writable(record: Record) -> bool:
    """Return whether every fact of a record has an object."""
    return bool(record.facts) and all(
        fact.target is not None or fact.target_true for fact in record.facts
    )
