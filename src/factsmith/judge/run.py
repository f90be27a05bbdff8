"""The runner: edit, ask, restore; over single facts, batches or rounds upon rounds, with the model as it was beside it.

    found = evaluate(lm, suite, {"rome": write}, size=1)                    # each record by itself
    found = evaluate(lm, suite, {"memit": write}, size=100, sequence=True, folder="runs/memit")
    found = evaluate(lm, "atlas", delta=delta, limit=100)                   # a change that is made already
    found                                                                   # a table: the base model first, shares with 95 % intervals
    found.rows, found.summary("memit")

An editor is any function of facts that returns a context manager: inside it the model carries them. So nothing here knows a method, and
whatever can be put into a model and taken out again can be judged. Success is the papers' two-way comparison; exact match is what the model
says by greedy decoding. Both always stand side by side.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..core.checks import check_count, check_items, check_seed
from ..core.errors import InputError, NumericsError
from ..core.fact import Fact
from ..core.files import folder_path
from ..core.progress import Progress, tell
from ..core.tables import counted
from ..model.language_model import LanguageModel, check_model
from .drift import Reference
from .evaluation import DRIFTS, Evaluation
from .records import Record, Suite
from .rows import BASE, BROKEN, PROBE, Continuation, Row, finite_numbers
from .score import answer_tokens, continue_texts, score
from .store import FORMAT, Store
from .suites import load_suite

if TYPE_CHECKING:
    pass


Editor: TypeAlias = Callable[[Sequence[Fact]], AbstractContextManager[Any]]
"""Writes facts into the model for as long as the block runs, on top of what it carries. What the block is given, if it is a mapping of
names to numbers, is noted beside the rows: norms, seconds. Where it has a `description`, a run is only gone on with by one of the same."""


class Change(Protocol):
    """What is made already and can be put into a model: a Delta."""

    @property
    def facts(self) -> Sequence[Fact]:
        """What it writes."""

    @property
    def digest(self) -> str:
        """Tells it from others."""

    def inside(self, lm: LanguageModel) -> AbstractContextManager[Any]:
        """A `with` block in which a model carries it."""


_DRIFTING = 10  # single edits whose drift is measured


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate(
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
    probe: Callable[[], Mapping[str, float]] | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge editors by records: write so many at a time, ask everything about them, and take the edit back.

    suite     the records: a suite, some of its records, or what `load_suite` takes
    editors   {name: editor}, such as `editors` of factsmith gives; the base model is asked first, whatever they are called
    delta     instead of editors, a change that is made already, or several on top of one another: everything is asked of the model as it is
              and with the change in it. With neither, the base model alone is asked
    limit     a sample of so many records, drawn by seed; None: all
    size      records an edit: 1, each by itself; more, batches, of all records at most; the last may be smaller. None: 1, with a delta all
    sequence  put each batch upon those before it, and take all back at the end. Behind each round its own records are asked, and again the
              prompts of up to `retained` records of each earlier one; behind the last, every question of every record
    max_new_tokens  how far greedy answers go, the same for all; None: as far as the longest right answer and one token more, 8 at least
    drift_tokens  of how much text divergence and perplexity are measured, and with it 100 facts that nothing was written about: behind each
              round, batch, or one of the first 10 single edits; 0: not at all. Its distributions are held, (drift_tokens, vocab) float32
    texts     that text; None: the model writes it itself
    continued for how many records, the first that have generation prompts, the model goes on from them: 100 tokens, each drawn among the
              likeliest five as in the papers, behind the edit that wrote the record (of a sequence: behind the last)
    probe     anything else to measure of a model, such as what `ability` gives: asked of the base model and behind every editor's last edit
    seed      of what is drawn
    folder    keeps rows.jsonl and what they are of. Called again with the same arguments a run that was killed goes on where it stood: of a
              sequence the rounds that were asked are written again, and not asked again

    Records without a fact to write are left out where editors write. An edit whose editor raises NumericsError has failed: its questions
    are asked of the model without it, and `failed` says why. Where an edited model gives no finite numbers, what it is asked counts as
    wrong, `notes` say so, and the run goes on. Raises InputError for no such record, two of one id, an editor called "base",
    or a delta beside editors; FingerprintError or InputError when the folder holds another run, DamagedError when it cannot be read, and
    what editors and `load_suite` raise; the model is then as it was.
    """
    check_model(lm)
    seed = check_seed(seed)
    every = _chosen(suite, limit, seed)
    if strange := [type(record).__name__ for record in every if not isinstance(record, Record)]:
        raise InputError(
            f"records hold a {strange[0]}; expected those of a suite: load_suite(...).records"
        )
    changes = () if delta is None else _changes(delta)
    if changes and (editors is not None or size is not None or sequence):
        raise InputError("a delta is judged as it is: give no editors, size or sequence with it")
    named = isinstance(editors, Mapping) and all(
        isinstance(name, str) and callable(write) for name, write in editors.items()
    )
    if editors is not None and (not named or BASE in editors or not editors):
        got = list(editors) if isinstance(editors, Mapping) else type(editors).__name__
        raise InputError(
            f'editors are {{name: editor}}, functions of facts, at least one and none called "{BASE}"; got {got}'
        )
    kept = every if editors is None else [record for record in every if _writable(record)]
    if editors is None:
        editors = {"delta": _Given(lm, changes)} if changes else {}
        size = max(1, len(kept)) if size is None else size
    size = check_count(
        1 if size is None else size, "size", "the number of records written at a time"
    )
    retained = check_count(
        retained, "retained", "the number of earlier records asked again in each round", least=0
    )
    if not kept:
        raise InputError(
            f"{counted(len(every), 'record')} and none with a fact to write; expected at least one"
        )
    if len({record.id for record in kept}) < len(kept):
        raise InputError(
            "two records have the same id; rows could not be told apart: make ids unique"
        )
    if probe is not None and not callable(probe):
        raise InputError(
            f"the probe is a {type(probe).__name__}; expected a function without arguments that gives numbers by name"
        )
    if (
        max_new_tokens is None
    ):  # once for all: answers of different length would not be the same ones
        max_new_tokens = answer_tokens(
            lm, [question for record in kept for question in record.questions]
        )
    max_new_tokens = check_count(
        max_new_tokens, "max_new_tokens", "the length of an answer in tokens"
    )
    drift_tokens = check_count(
        drift_tokens, "drift_tokens", "the number of tokens of text for drift", least=0
    )
    continued = check_count(
        continued, "continued", "the number of records whose text the model continues", least=0
    )
    listed = None if texts is None else check_items(texts, "texts", "texts")
    size = min(size, len(kept))
    units = [kept[start : start + size] for start in range(0, len(kept), size)]
    written = {record.id: unit for unit, members in enumerate(units) for record in members}
    made_from = {
        "format": FORMAT,
        "fingerprint": lm.fingerprint,
        "records": hashlib.sha256(repr(kept).encode()).hexdigest(),
        "size": size,
        "sequence": sequence,
        "retained": retained,
        "max_new_tokens": max_new_tokens,
        "drift_tokens": drift_tokens,
        "texts": None if listed is None else hashlib.sha256("\0".join(listed).encode()).hexdigest(),
        "continued": continued,
        "seed": seed,
        "probe": None if probe is None else str(getattr(probe, "description", "")),
    }
    skipped = len(every) - len(kept)
    store = Store(
        None if folder is None else folder_path(folder),
        made_from,
        {"model": lm.name, "skipped": skipped, "units": len(units)},
    )
    for editor, write in editors.items():
        store.check_editor(editor, str(getattr(write, "description", "")))
    total, done = (len(editors) + 1) * len(units), 0

    def step() -> None:
        nonlocal done
        done += 1
        tell(progress, "judging", done, total)

    def probed(wanted: bool) -> dict[str, float]:
        try:
            return (
                {f"{PROBE}{name}": value for name, value in finite_numbers(probe()).items()}
                if wanted and probe is not None
                else {}
            )
        except NumericsError:
            return {BROKEN: 1.0}

    chosen = [record for record in kept if record.generation_prompts][:continued]

    def gone_on(editor: str, unit: int, some: Sequence[Record]) -> list[Continuation]:
        return continue_texts(
            lm, [record for record in chosen if record in some], seed=seed, editor=editor, unit=unit
        )

    for unit, members in enumerate(units):
        if not store.has(BASE, unit):
            rows = score(lm, members, max_new_tokens=max_new_tokens)
            store.add(
                BASE,
                unit,
                [replace(row, written=written[row.record]) for row in rows],
                gone_on(BASE, unit, members),
                probed(unit == 0),
            )
        step()
    before = {row.prompt: row.answer for row in store.rows if row.editor == BASE}
    reference = None
    if drift_tokens and not all(
        store.has(editor, unit) for editor in editors for unit in range(len(units))
    ):
        subjects = [
            fact.subject
            for facts in (*(record.facts for record in kept), *(one.facts for one in changes))
            for fact in facts
        ]
        reference = Reference(
            lm, texts=listed, without=subjects, max_tokens=drift_tokens, seed=seed
        )

    def drifted(unit: int) -> dict[str, float]:
        if reference is None or (size == 1 and not sequence and unit >= _DRIFTING):
            return {}
        try:
            found = reference.compare()
        except NumericsError:
            return {BROKEN: 1.0}
        values = {
            name: value
            for name, value in found.measures.items()
            if name in DRIFTS and value is not None
        }
        finite = finite_numbers(values)
        return finite if len(finite) == len(values) else {**finite, BROKEN: 1.0}

    def asked(editor: str, unit: int, some: Sequence[Record]) -> list[Row]:
        rows = score(lm, some, before=before, max_new_tokens=max_new_tokens)
        return [replace(row, editor=editor, unit=unit, written=written[row.record]) for row in rows]

    for editor, write in editors.items():
        with ExitStack() as stack:
            for unit, members in enumerate(units):
                facts = [fact for record in members for fact in record.facts]
                if store.has(editor, unit) and not (
                    sequence and not store.has(editor, len(units) - 1)
                ):
                    step()
                    continue
                with nullcontext() if sequence else ExitStack() as alone:
                    notes, failure = _entered(stack if alone is None else alone, write, facts)
                    if not store.has(editor, unit):
                        last = sequence and unit == len(units) - 1
                        rows = asked(editor, unit, kept if last else members)
                        if sequence and not last:
                            rows += asked(
                                editor,
                                unit,
                                [
                                    _prompts(record)
                                    for old in units[:unit]
                                    for record in old[:retained]
                                ],
                            )
                        texts_written = gone_on(
                            editor, unit, kept if last else [] if sequence else members
                        )
                        measured = {
                            **finite_numbers(notes),
                            **drifted(unit),
                            **probed(unit == len(units) - 1),
                        }
                        measured |= {BROKEN: 1.0} if any(row.broken for row in rows) else {}
                        store.add(editor, unit, rows, texts_written, measured, failure)
                step()
    return Evaluation(
        rows=tuple(store.rows),
        written=tuple(store.written),
        notes=store.notes,
        failed=store.failed,
        size=size,
        sequence=sequence,
        skipped=skipped,
        model=lm.name,
        fingerprint=lm.fingerprint,
        units=len(units),
        settings=store.settings,
    )


def _chosen(
    suite: Suite | str | os.PathLike[str] | Iterable[Record], limit: int | None, seed: int
) -> list[Record]:
    """The records to judge, a sample of `limit` in their order."""
    if isinstance(suite, (str, os.PathLike)):
        return list(
            load_suite(
                Path(suite) if isinstance(suite, os.PathLike) else suite, limit=limit, seed=seed
            ).records
        )
    every = list(
        check_items(
            suite.records if isinstance(suite, Suite) else suite,
            "suite",
            "records",
            also="a suite, its name or its file",
        )
    )
    if limit is None or check_count(
        limit, "limit", "the number of records to draw", also="None for all"
    ) >= len(every):
        return every
    return [every[at] for at in sorted(random.Random(seed).sample(range(len(every)), limit))]


def _writable(record: Record) -> bool:
    """Whether there is something to write."""
    return bool(record.facts) and all(
        fact.target is not None or fact.target_true for fact in record.facts
    )


def _changes(delta: Change | Iterable[Change]) -> tuple[Change, ...]:
    """One change or several, checked."""
    found = (
        (delta,)
        if hasattr(delta, "inside")
        else tuple(check_items(delta, "delta", "deltas", also="one Delta"))
    )
    if not found or not all(hasattr(one, "inside") for one in found):
        raise InputError(
            "delta is what an editor such as `memit` gave, or several on top of one another; got something else, or none"
        )
    return found


@dataclass(frozen=True)
class _Given:
    """An editor that puts what is made already into the model, whatever facts are judged."""

    lm: LanguageModel
    changes: tuple[Change, ...]

    @property
    def description(self) -> str:
        return " + ".join(change.digest for change in self.changes)

    @contextmanager
    def __call__(self, facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        with ExitStack() as stack:
            for change in self.changes:
                stack.enter_context(change.inside(self.lm))
            yield {}


def _entered(stack: ExitStack, write: Editor, facts: Sequence[Fact]) -> tuple[object, str]:
    """What an editor says of its edit, which stays until the stack is closed, and why there is none."""
    try:
        block = write(facts)
        if not isinstance(block, AbstractContextManager):
            raise InputError(
                f"an editor gave a {type(block).__name__}; expected a `with` block inside which the model carries the facts"
            )
        return stack.enter_context(block), ""
    except NumericsError as error:
        return {}, str(error)


def _prompts(record: Record) -> Record:
    """A record with nothing but the questions that ask for what was written."""
    return replace(
        record,
        questions=tuple(question for question in record.questions if question.kind == "prompt"),
    )
