"""The steps of a run: what is asked and measured before an edit, and after it.

    steps = Steps(lm, records, schedule.for_records(lm, records))
    unit = steps.ask_base(0)                          # the answers of the model without edits
    steps = steps.after_base(unit.rows, unit.unusable, sample=None)
    steps.write("memit", write, [0], units.append)

Steps keep nothing on disk and leave the model unchanged. So a run takes them in its own process or
sends them to others: `judge_base` and `judge_edits` are the tasks for an executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

from ..core.errors import FactsmithError, NumericsError
from ..core.executor import report_done
from ..model.language_model import LanguageModel
from ..model.turns import asking
from .drift import Reference
from .drift_sample import DriftSample, drift_sample
from .editor import Editor, MadeChanges, enter
from .evaluation import DRIFTS
from .records import Record
from .rows import BASE, BROKEN, PROBE, Continuation, Row, finite_numbers
from .schedule import Schedule
from .score import continue_texts, score
from .store import Unit
from .usable import facts_of, why_unwritable

Probe = Callable[[], Mapping[str, float]]
"""Measures anything of the model as it is now, such as the function that `ability` returns."""


@dataclass(frozen=True)
class Steps:
    """The steps of a run.

    Attributes:
        lm: The model, without edits.
        records: The records to judge.
        schedule: How they are written, asked about and measured; see `Schedule.for_records`.
        probe: Anything else to measure of the model.
        unusable: {record: reason} of the records that the model cannot be asked about.
        answers_before: {prompt: answer of the base model}.
        sample: What drift is measured on. None: no drift is measured.
    """

    lm: LanguageModel
    records: Sequence[Record]
    schedule: Schedule
    probe: Probe | None = None
    unusable: Mapping[str, str] = field(default_factory=dict)
    answers_before: Mapping[str, str] = field(default_factory=dict)
    sample: DriftSample | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what each process computes for itself, such as the reference of drift."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def units(self) -> list[Sequence[Record]]:
        """The records of each edit."""
        return self.schedule.units(self.records)

    @cached_property
    def unit_of(self) -> dict[str, int]:
        """{record: number of the edit that writes it}."""
        return {record.id: at for at, unit in enumerate(self.units) for record in unit}

    @cached_property
    def continued(self) -> frozenset[str]:
        """The records whose generation prompts the model continues."""
        with_prompts = [record.id for record in self.records if record.generation_prompts]
        return frozenset(with_prompts[: self.schedule.continued])

    @cached_property
    def reference(self) -> Reference | None:
        """The base model, to measure drift from. It is measured before the first edit."""
        return None if self.sample is None else Reference.on(self.lm, self.sample)

    @property
    def last(self) -> int:
        """Number of the last edit."""
        return len(self.units) - 1

    # ── before the edits ──────────────────────────────────────────────────────────────────────────

    def ask_base(self, unit: int) -> Unit:
        """Ask the base model about the records of one edit."""
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
        notes = self._probed() if unit == 0 else {}
        return Unit(BASE, unit, rows, continuations, notes, unusable=unusable)

    def _base_answers(
        self, unit: int, records: Sequence[Record]
    ) -> tuple[list[Row], list[Continuation]]:
        """What the base model answers and writes about some records."""
        rows = score(self.lm, records, max_new_tokens=self.schedule.max_new_tokens)
        rows = [replace(row, written=self.unit_of[row.record]) for row in rows]
        return rows, self._go_on(BASE, unit, records)

    def draw_sample(self, without: Sequence[str]) -> DriftSample:
        """Return what drift is measured on.

        Args:
            without: Subjects that are edited. Facts about them are left out.
        """
        return drift_sample(
            self.lm,
            texts=self.schedule.texts,
            without=without,
            max_tokens=self.schedule.drift_tokens,
            seed=self.schedule.seed,
        )

    def after_base(
        self, rows: Iterable[Row], unusable: Mapping[str, str], sample: DriftSample | None
    ) -> Steps:
        """Return the steps that follow when the base model has been asked.

        Args:
            rows: The rows of the base model.
            unusable: {record: reason} of the records that it could not be asked about.
            sample: What drift is measured on. None: no drift is measured.
        """
        answers = {row.prompt: row.answer for row in rows}
        return replace(self, unusable=unusable, answers_before=answers, sample=sample)

    # ── the edits ─────────────────────────────────────────────────────────────────────────────────

    def write(
        self,
        name: str,
        editor: Editor,
        units: Sequence[int],
        keep: Callable[[Unit], object],
    ) -> None:
        """Write edits, ask the model after each, and take the edits back.

        Args:
            name: Name of the editor.
            editor: The editor.
            units: Numbers of the edits to judge, ascending. In a sequence the edits before them are
                written again, and not asked about.
            keep: Gets what belongs to each edit.
        """
        if any(self.schedule.measures_drift(unit) for unit in units):
            _ = self.reference  # measured before the model carries an edit
        is_sequence = self.schedule.sequence
        with ExitStack() as rounds:
            for unit in range(units[-1] + 1) if is_sequence and units else units:
                with ExitStack() as alone:
                    stack = rounds if is_sequence else alone
                    made = self._enter(stack, editor, self._usable(self.units[unit]))
                    if unit in units:
                        keep(self._ask_after(name, unit, *made))

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

    def _ask_after(
        self, name: str, unit: int, noted: object, failure: str, unusable: Mapping[str, str]
    ) -> Unit:
        """Ask the edited model everything that belongs after an edit, and measure it.

        Args:
            name: Name of the editor.
            unit: Number of the edit.
            noted: What the editor noted of the edit.
            failure: The reason why the edit could not be made; "" if it was made.
            unusable: {record: reason} of the records that were not written.
        """
        is_sequence, is_last = self.schedule.sequence, unit == self.last
        members = self._usable(self.units[unit])
        continued = members
        if is_sequence:
            members = self._usable(self.records) if is_last else members
            continued = members if is_last else []
        rows = self._ask(name, unit, members)
        if is_sequence and not is_last:
            rows += self._ask(name, unit, self._earlier_prompts(unit))
        continuations = self._go_on(name, unit, continued)
        notes = finite_numbers(noted) | self._measure_drift(unit)
        notes |= self._probed() if is_last else {}
        if any(row.broken for row in rows):
            notes[BROKEN] = 1.0
        return Unit(name, unit, rows, continuations, notes, failure, unusable)

    def _usable(self, records: Sequence[Record]) -> list[Record]:
        """The records that the model can be asked about."""
        return [record for record in records if record.id not in self.unusable]

    def _ask(self, name: str, unit: int, records: Sequence[Record]) -> list[Row]:
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

    def _go_on(self, name: str, unit: int, records: Sequence[Record]) -> list[Continuation]:
        """Let the model continue the generation prompts of those records that the schedule
        names."""
        chosen = [record for record in records if record.id in self.continued]
        return continue_texts(self.lm, chosen, seed=self.schedule.seed, editor=name, unit=unit)

    def _measure_drift(self, unit: int) -> dict[str, float]:
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

    def _probed(self) -> dict[str, float]:
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


# ── the tasks of an executor ──────────────────────────────────────────────────────────────────────


class EditsPart(NamedTuple):
    """Edits of one editor that are judged one after another: one edit, or a sequence."""

    editor: str
    units: tuple[int, ...]
    """Numbers of the edits to judge, ascending."""


@asking(changes=True, grad=True)
def judge_base(steps: Steps, without: Sequence[str], part: int | None) -> Unit | DriftSample:
    """Do one part of what precedes the edits.

    Args:
        steps: The steps.
        without: Subjects that are edited.
        part: Number of the edit whose records the base model is asked about. None: draw the sample
            that drift is measured on.
    """
    if part is None:
        return steps.draw_sample(without)
    unit = steps.ask_base(part)
    report_done(1)
    return unit


@asking(changes=True, grad=True)
def judge_edits(steps: Steps, editors: Mapping[str, Editor], part: EditsPart) -> list[Unit]:
    """Judge the edits of one part.

    Args:
        steps: The steps, with what the base model answered.
        editors: {name: editor}. None of them depends on the edits that it made before.
        part: The edits.
    """
    units: list[Unit] = []

    def keep(unit: Unit) -> None:
        units.append(unit)
        report_done(len(units))

    steps.write(part.editor, editors[part.editor], part.units, keep)
    return units


def edited_subjects(records: Iterable[Record], editors: Iterable[Editor]) -> list[str]:
    """Return the subjects that records and changes write something about."""
    written = [record.facts for record in records]
    changes = (editor.changes for editor in editors if isinstance(editor, MadeChanges))
    written += [tuple(change.facts) for each in changes for change in each]
    return [fact.subject for facts in written for fact in facts]
