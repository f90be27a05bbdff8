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
import itertools
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..core.checks import check_count, check_items, check_seed
from ..core.errors import InputError
from ..core.executor import Executor, executor_in_use
from ..core.files import folder_path
from ..core.progress import Progress, tell
from ..core.tables import counted
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .drift_sample import DriftSample
from .editor import (
    Change,
    Editor,
    MadeChanges,
    apart_from_others,
    check_changes,
    check_editors,
    description_of,
)
from .evaluation import Evaluation
from .records import Record, Suite
from .rows import BASE
from .schedule import Schedule
from .steps import EditsPart, Probe, Steps, edited_subjects, judge_base, judge_edits
from .store import FORMAT, Store, Unit
from .suites import load_suite


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
        records = list(records)
        self.steps = Steps(lm, records, schedule.for_records(lm, records), probe)
        self.units = self.steps.units
        made_from = {
            "format": FORMAT,
            "fingerprint": lm.fingerprint,
            "records": hashlib.sha256(repr(records).encode()).hexdigest(),
            **self.steps.schedule.made_from(),
            "probe": None if probe is None else description_of(probe),
        }
        about = {"model": lm.name, "skipped": skipped, "units": len(self.units)}
        self.store = Store.open(None if folder is None else folder_path(folder), made_from, about)

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
        finished = total - sum(len(self._pending(name)) for name in (BASE, *editors))

        def report(done: int) -> None:
            tell(progress, "judging", finished + done, total)

        report(0)
        executor = executor_in_use()
        if executor.cuts:
            self._judge_in_parts(executor, editors, report)
        else:
            self._judge_in_place(editors, report)
        return Evaluation.of(self.store)

    def _judge_in_place(
        self, editors: Mapping[str, Editor], report: Callable[[int], object]
    ) -> None:
        """Judge edits in this process, one after another, and keep each at once."""
        numbers = itertools.count(1)

        def keep(unit: Unit) -> None:
            self.store.add(unit)
            report(next(numbers))

        for unit in self._pending(BASE):
            keep(self.steps.ask_base(unit))
        self._check_any_asked()
        subjects = edited_subjects(self.steps.records, editors.values())
        sample = self.steps.draw_sample(subjects) if self._needs_sample(editors) else None
        steps = self._steps_after_base(sample)
        for name, editor in editors.items():
            steps.write(name, editor, self._pending(name), keep)

    def _judge_in_parts(
        self,
        executor: Executor,
        editors: Mapping[str, Editor],
        report: Callable[[int], object],
    ) -> None:
        """Let an executor judge edits that know nothing of one another, and keep them here.

        Each edit is a part. A sequence is one part. The results come in the order of the parts, so
        the file is the one that `_judge_in_place` writes.
        """
        apart = {name: apart_from_others(editor) for name, editor in editors.items()}
        asked = self._pending(BASE)
        parts: list[int | None] = [None, *asked] if self._needs_sample(editors) else [*asked]
        subjects = edited_subjects(self.steps.records, editors.values())
        sample = None
        self._check_can_be_sent(executor, apart)
        for made in executor.map(partial(judge_base, self.steps, subjects), parts, progress=report):
            if isinstance(made, DriftSample):
                sample = made
            else:
                self.store.add(made)
        self._check_any_asked()
        task = partial(judge_edits, self._steps_after_base(sample), apart)
        edits = [part for name in editors for part in self._parts(name)]
        for units in executor.map(task, edits, progress=lambda n: report(len(asked) + n)):
            for unit in units:
                self.store.add(unit)

    def _check_can_be_sent(self, executor: Executor, editors: Mapping[str, Editor]) -> None:
        """Raise an error before work begins if the probe or an editor cannot be sent to workers."""
        things = {f"the editor {name}": editor for name, editor in editors.items()}
        for what, thing in {"the probe": self.steps.probe, **things}.items():
            executor.check(thing, what)

    # ── what is finished ──────────────────────────────────────────────────────────────────────────

    def _pending(self, name: str) -> list[int]:
        """Return the numbers of the edits that are not finished."""
        return [unit for unit in range(len(self.units)) if not self.store.has(name, unit)]

    def _parts(self, name: str) -> list[EditsPart]:
        """Return the parts of an editor's edits that are not finished."""
        pending = self._pending(name)
        if self.steps.schedule.sequence:
            return [EditsPart(name, tuple(pending))] if pending else []
        return [EditsPart(name, (unit,)) for unit in pending]

    def _needs_sample(self, editors: Mapping[str, Editor]) -> bool:
        """Return whether an edit that is not finished may be measured for drift."""
        return bool(self.steps.schedule.drift_tokens) and any(map(self._pending, editors))

    def _steps_after_base(self, sample: DriftSample | None) -> Steps:
        """Return the steps that follow when the base model has been asked."""
        rows = [row for row in self.store.rows if row.editor == BASE]
        return self.steps.after_base(rows, self._unusable, sample)

    @property
    def _unusable(self) -> dict[str, str]:
        """{record: reason} of the records that the model cannot be asked about."""
        by_unit = [why for (editor, _), why in self.store.unusable.items() if editor == BASE]
        return {record: reason for why in by_unit for record, reason in why.items()}

    def _check_any_asked(self) -> None:
        """Raise an InputError if no record could be asked about."""
        n_records = len(self.steps.records)
        if not (unusable := self._unusable) or len(unusable) < n_records:
            return
        record, reason = next(iter(unusable.items()))
        raise InputError(
            f"the model can be asked about none of {counted(n_records, 'record')}; "
            f"the first is {record}: {reason}",
            argument="suite",
        )


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
