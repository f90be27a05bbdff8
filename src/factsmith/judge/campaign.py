"""A campaign: several methods judged at several sizes, with everything kept in one folder.

    campaign = Campaign(lm, "atlas", ["rome", "memit"], [1, 100], "judged", editors=editors)
    judged = campaign.run(progress=show)
    judged.evaluations, judged.left_out, judged.suite

A campaign loads the suite, keeps the records that the model can be judged by, makes the editors,
and runs every size. An executor may judge the edits of a size on many machines. A campaign that was
killed goes on from its folder: size-1, size-100 and sequence-100 hold the rows of their runs,
judged.json names the model, the suite and the settings, and moments holds the second moments that
the editors computed.

A campaign knows no method. `editors` is a function such as factsmith's `editors`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ..core.checks import check_count, check_items
from ..core.errors import InputError
from ..core.executor import Executor, executor_in_use, running_on
from ..core.files import file_digest
from ..core.gap import gap_notes
from ..core.progress import Progress, note, tell
from ..core.tables import counted
from ..corpus.own import OWN, is_own
from ..corpus.paragraphs import Paragraphs
from ..corpus.text_files import TextFiles
from ..model.language_model import LanguageModel, check_model
from .claim import claim_folder
from .editor import Editor, description_of
from .evaluation import Evaluation
from .records import Record, Suite
from .rows import BROKEN
from .run import Run
from .schedule import Schedule
from .steps import Probe
from .suites import load_suite
from .usable import UNKNOWN, usable


class MakeEditors(Protocol):
    """A function that makes editors by name."""

    def __call__(
        self,
        lm: LanguageModel,
        methods: Sequence[str],
        /,
        *,
        texts: Iterable[str] | None,
        folder: Path | None,
        seed: int,
        progress: Progress | None,
    ) -> Mapping[str, Editor]:
        """Return {name: editor}.

        Args:
            lm: The model, unedited.
            methods: Names of methods.
            texts: Text for second moments. None: text of the editors' own choice.
            folder: Keeps what was computed. None: it is not kept.
            seed: Seed of everything that is drawn.
            progress: Gets the progress of the computation.
        """


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The result of a campaign.

    Attributes:
        evaluations: One for each size, without the editors that lack edits. Those that were judged
            in the folder before are included.
        suite: The suite of the records.
        left_out: {reason: how many records were not judged}.
    """

    evaluations: tuple[Evaluation, ...]
    suite: Suite
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Campaign:
    """Several methods, judged at several sizes.

    Attributes:
        lm: The model, unedited.
        suite: A suite, or what `load_suite` takes.
        methods: Names of methods, as `editors` takes them.
        sizes: Numbers of records an edit, each once.
        folder: Keeps everything. None: nothing is kept.
        editors: Makes the editors.
        schedule: How each size is judged. Its size is replaced, and its text is drawn from `texts`.
        fields: Which field of the suite's file holds what; see `load_suite`.
        limit: Number of records to draw from the suite. None: all.
        malformed: "skip": leave malformed records out. "fatal": raise an error for one.
        known_only: Whether to leave out records that the model does not know.
        texts: Text for the editors, and for drift. None: the editors' own choice, and the model's
            text.
        probe: Anything else to measure of the model; see `evaluate`.

    Raises:
        InputError: when a size is no whole number of at least 1, or is named twice.
    """

    lm: LanguageModel
    suite: Suite | str | Path
    methods: Sequence[str]
    sizes: Sequence[int]
    folder: Path | None = None
    _: KW_ONLY
    editors: MakeEditors
    schedule: Schedule = field(default_factory=Schedule)
    fields: Mapping[str, str] | None = None
    limit: int | None = None
    malformed: Literal["skip", "fatal"] = "skip"
    known_only: bool = True
    texts: Iterable[str] | None = None
    probe: Probe | None = None

    def __post_init__(self) -> None:
        check_model(self.lm)
        sizes = [
            check_count(size, "sizes", "the numbers of records written at a time")
            for size in check_items(self.sizes, "sizes", "whole numbers")
        ]
        if not sizes or len(set(sizes)) < len(sizes):
            raise InputError(
                f"sizes is {sizes}; give at least one number, and each once", argument="sizes"
            )
        object.__setattr__(self, "sizes", tuple(sizes))
        object.__setattr__(self, "folder", None if self.folder is None else Path(self.folder))

    def run(self, executor: Executor | None = None, progress: Progress | None = None) -> Judged:
        """Judge every size. Edits that the folder holds already are not made again.

        Args:
            executor: Runs the parts: each edit is one, and each sequence. This process keeps what
                they return, in their order. None: the executor in use.
            progress: Gets the progress, and notes: why records are left out, what went wrong in a
                run.

        Raises:
            InputError: when no record can be judged, or the folder belongs to another campaign.
                `load_suite`, `editors` and `evaluate` raise it too.
        """
        with running_on(executor or executor_in_use()):
            return self._run(progress)

    # ── the steps ─────────────────────────────────────────────────────────────────────────────────

    def _run(self, progress: Progress | None) -> Judged:
        """Judge every size on the executor in use."""
        suite = self._load_suite(progress)
        records, left_out = self._usable_records(suite, progress)
        sizes = self._fitting_sizes(len(records), progress)
        schedule = self._schedule_with_text()
        made_from = self._made_from(suite)
        if self.folder is not None:  # before moments are computed, which takes longest
            claim_folder(self.folder, made_from, {})
        editors = self.editors(
            self.lm,
            self.methods,
            texts=self.texts,
            folder=self.folder and self.folder / "moments",
            seed=schedule.seed,
            progress=progress,
        )
        if self.folder is not None:
            settings = {name: description_of(editor) for name, editor in editors.items()}
            claim_folder(self.folder, made_from, settings)
        evaluations = [
            self._judge(records, editors, progress, replace(schedule, size=size)) for size in sizes
        ]
        finished = [
            evaluation
            for each in self._with_earlier(evaluations)
            if (evaluation := _finished(each, progress)) is not None
        ]
        for evaluation in finished:
            _note_faults(evaluation, progress)
        return Judged(evaluations=tuple(finished), suite=suite, left_out=left_out)

    def _load_suite(self, progress: Progress | None) -> Suite:
        if isinstance(self.suite, Suite):
            return self.suite
        tell(progress, f"reading {Path(self.suite).name}", 0, None)
        return load_suite(
            self.suite,
            fields=self.fields,
            limit=self.limit,
            seed=self.schedule.seed,
            malformed=self.malformed,
        )

    def _usable_records(
        self, suite: Suite, progress: Progress | None
    ) -> tuple[Sequence[Record], Mapping[str, int]]:
        """Return the records to judge, and {reason: how many were left out}."""
        records, left_out = usable(self.lm, suite.records, known_only=self.known_only)
        note_left_out(suite, records, left_out, progress)
        return records, left_out

    def _fitting_sizes(self, n_records: int, progress: Progress | None) -> list[int]:
        """Return the sizes, each at most the number of records, each once."""
        for size in self.sizes:
            if size > n_records:
                note(
                    progress,
                    f"size {size}: there are {counted(n_records, 'record')} to write, "
                    f"so {n_records:,} are written at a time",
                )
        return list(dict.fromkeys(min(size, n_records) for size in self.sizes))

    def _schedule_with_text(self) -> Schedule:
        """Return the schedule with the beginning of the texts: a text has a token or more."""
        if self.texts is None or is_own(self.texts):
            return self.schedule
        texts = itertools.islice(self.texts, self.schedule.drift_tokens)
        return replace(self.schedule, texts=list(texts))

    def _made_from(self, suite: Suite) -> dict[str, Any]:
        """Return what the folder's claim says of this campaign."""
        digests = None
        if isinstance(self.texts, Paragraphs):
            digests = [file_digest(file) for file in self.texts.files]
        elif isinstance(self.texts, TextFiles):
            digests = self.texts.identity()
        elif is_own(self.texts):
            digests = [OWN]
        elif self.texts is not None:
            digests = [hashlib.sha256("\0".join(self.texts).encode()).hexdigest()]
        return {
            "model": self.lm.fingerprint,
            "suite": suite.digest,
            "layout": suite.name,
            "limit": self.limit,
            "seed": self.schedule.seed,
            "known": self.known_only,
            "texts": digests,
            "drift_tokens": self.schedule.drift_tokens,
        }

    def _judge(
        self,
        records: Sequence[Record],
        editors: Mapping[str, Editor],
        progress: Progress | None,
        schedule: Schedule,
    ) -> Evaluation:
        """Judge one size."""
        folder = None
        if self.folder is not None:
            kind = "sequence" if schedule.sequence else "size"
            folder = self.folder / f"{kind}-{schedule.size}"
        run = Run(self.lm, records, schedule, folder=folder, probe=self.probe)
        return run.judge(editors, progress=_at_size(schedule.size, progress))

    def _with_earlier(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """Return the evaluations, followed by those that the folder holds of other sizes."""
        if self.folder is None:
            return list(evaluations)
        paces = {(evaluation.size, evaluation.sequence) for evaluation in evaluations}
        kept = (
            Evaluation.load(path.parent) for path in sorted(self.folder.glob("s*-*/rows.jsonl"))
        )
        earlier = [each for each in kept if (each.size, each.sequence) not in paces]
        return [*evaluations, *earlier]


def note_left_out(
    suite: Suite,
    records: Sequence[Record],
    left_out: Mapping[str, int],
    progress: Progress | None,
) -> None:
    """Send notes of the records of a suite that are not judged, and of prompts that end oddly.

    Args:
        suite: The suite.
        records: The records that are judged.
        left_out: {reason: how many were left out}.
        progress: Gets the notes.

    Raises:
        InputError: when no record is left.
    """
    for reason, n in left_out.items():
        note(
            progress,
            f"{counted(n, 'record')} of {len(suite.records):,} left out: {reason}",
            argument="known_only" if reason == UNKNOWN else None,
        )
    for text in gap_notes(q.prompt for record in records for q in record.questions):
        note(progress, text)
    if suite.skipped:
        note(
            progress,
            f"malformed: {suite.left_out} left out, the first: {suite.skipped[0]}",
        )
    if not records:
        raise InputError(
            f"none of {counted(len(suite.records), 'record')} can be judged; "
            "use another suite, or judge records that the model does not know, too",
            argument="known_only",
        )


def _at_size(size: int, progress: Progress | None) -> Callable[[str, int, int | None], None]:
    """Return a progress function that adds the size to each step."""

    def report(step: str, done: int, total: int | None) -> None:
        tell(progress, f"{step}, {size:,} at a time", done, total)

    return report


def _finished(evaluation: Evaluation, progress: Progress | None) -> Evaluation | None:
    """Return an evaluation without the editors that lack edits; None if no editor is left."""
    for editor, n in evaluation.unfinished.items():
        note(
            progress,
            f"{editor}, {evaluation.pace}: {n:,} of {evaluation.units:,} edits are there; "
            "run it again to finish it",
        )
    if len(evaluation.editors) == 1 and not evaluation.unfinished:
        note(
            progress,
            f"{evaluation.pace}: no method was judged to the end of an edit; run it again",
        )
    finished = evaluation.finished()
    return finished if len(finished.editors) > 1 else None


def _note_faults(evaluation: Evaluation, progress: Progress | None) -> None:
    """Send notes of the edits that broke the model, and of the edits that could not be made."""
    for editor in evaluation.editors:
        if n := int(evaluation.measured(editor).get(BROKEN, 0)):
            note(
                progress,
                f"{editor}, {evaluation.pace}: {counted(n, 'edit')} left a model without finite "
                "numbers; its answers count as wrong",
            )
    for (editor, _), reasons in list(evaluation.unusable.items())[:1]:
        record, reason = next(iter(reasons.items()))
        n = sum(map(len, evaluation.unusable.values()))
        note(
            progress,
            f"{counted(n, 'record')}, {evaluation.pace}, could not be used; "
            f"the first is {record} ({editor}): {reason}",
        )
    for (editor, unit), reason in list(evaluation.failed.items())[:1]:
        note(
            progress,
            f"{counted(len(evaluation.failed), 'edit')}, {evaluation.pace}, could not be made; "
            f"the first is {editor}, edit {unit}: {reason}",
        )
