"""The runner: edit, ask, restore; over single facts, batches or rounds upon rounds, with the model as it was beside it.

    found = evaluate(lm, suite.records, {"rome": write}, size=1)            # each record by itself
    found = evaluate(lm, suite.records, {"memit": write}, size=100, sequence=True, folder="runs/memit")
    found                                                                   # a table: the base model first, shares with 95 % intervals
    found.rows, found.summary("memit")

An editor is any function of facts that returns a context manager: inside it the model carries them. So nothing here knows a method, and
whatever can be put into a model and taken out again can be judged. Success is the papers' two-way comparison; exact match is what the model
says by greedy decoding. Both always stand side by side.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..checks import check_count, check_items
from ..errors import DamagedError, FingerprintError, InputError, WorkspaceError
from ..fact import Fact
from ..files import write_file
from ..model.load import LanguageModel, check_model
from ..model.tokens import target_ids
from ..progress import Progress, tell
from ..tables import Shown, Table, counted
from ..verify import as_said, begins_with
from .asking import ask
from .metrics import alias_match, bootstrap_interval, harmonic_mean
from .suites import Kind, Question, Record

Editor: TypeAlias = Callable[[Sequence[Fact]], AbstractContextManager[Any]]
"""Writes facts into the model for as long as the block runs, on top of what it carries. What the block is given, if it is a mapping of
names to numbers, is noted beside the rows: norms, seconds."""

BASE = "base"
"""The model as it was."""
STAYING: tuple[Kind, ...] = ("neighbour", "locality")
_FORMAT = "evaluation 1"
_ANSWER = 8  # tokens decoded at least


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question asked once.

    editor, unit  which editor had written, and which of its edits the model carried: a record, a batch or a round, from 0; -1: none
    record, kind, group, prompt  the question
    written       the unit in which the question's record was written
    answer        what the model said
    exact         whether that is right: it begins with an answer; for a negation, that it does not begin with what was written
    stayed        of what must stay, whether it says what it said before any edit; None for other kinds, and for the base model
    log_wanted    mean log-probability a token of the first right answer; None where there is none
    log_against   of the other side of the comparison; None where there is none
    tokens        share of the right answer's tokens that are the likeliest in their place, each after those before it (teacher forced)
    """

    editor: str
    unit: int
    record: str
    kind: Kind
    group: int | None
    prompt: str
    written: int
    answer: str
    exact: bool | None
    stayed: bool | None
    log_wanted: float | None
    log_against: float | None
    tokens: float | None

    @property
    def success(self) -> bool | None:
        """Whether the wanted side of the comparison is the likelier; for a negation, the side that was not written."""
        return None if self.log_wanted is None or self.log_against is None else self.log_wanted > self.log_against


@dataclass(frozen=True)
class Share:
    """A mean over questions: of n of them, with its 95 % bootstrap interval over records."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Evaluation(Shown):
    """All rows of a run, the base model's among them.

    rows      in the order in which they were asked
    notes     {(editor, unit): {name: number}}, what the editors said of themselves
    size      records an edit; sequence: whether edits were put upon one another
    skipped   records left out because there is nothing to write in them
    model     what it was loaded as; fingerprint: the model's
    """

    rows: tuple[Row, ...]
    notes: Mapping[tuple[str, int], Mapping[str, float]]
    size: int
    sequence: bool
    skipped: int
    model: str
    fingerprint: str

    @property
    def editors(self) -> tuple[str, ...]:
        """Base first, then in the order in which they ran."""
        return tuple(dict.fromkeys(row.editor for row in self.rows))

    def asked(self, editor: str, unit: int | None = None) -> list[Row]:
        """The rows of an editor: of a sequence those asked behind its last round (or behind `unit`), else of every edit on its own records.

        Raises InputError for an editor that did not run.
        """
        own = [row for row in self.rows if row.editor == editor]
        if not own:
            raise InputError(f"no editor {editor!r} ran; there are {', '.join(self.editors)}")
        if unit is None and not (self.sequence and editor != BASE):
            return own
        wanted = max(row.unit for row in own) if unit is None else unit
        return [row for row in own if row.unit == wanted]

    def summary(self, editor: str, unit: int | None = None, *, seed: int = 0) -> dict[str, Share]:
        """Every measure that the questions allow, by name: "prompt success", "prompt exact", "neighbour stayed", "multihop exact" ...

        Questions that are ways to ask the same thing (MQuAKE's three) count once, as right when any of them is. "score" and "score exact"
        are the harmonic means over prompt, paraphrase and neighbour, where all three were asked.
        """
        rows = self.asked(editor, unit)
        found: dict[str, Share] = {}
        for kind in dict.fromkeys(row.kind for row in rows):
            own = [row for row in rows if row.kind == kind]
            for name, value in _MEASURES.items():
                cases: dict[tuple[str, int], list[float]] = {}
                for at, row in enumerate(own):
                    if (measured := value(row)) is not None:
                        cases.setdefault((row.record, at if row.group is None else -1 - row.group), []).append(float(measured))
                if cases:
                    values, groups = [max(each) for each in cases.values()], [record for record, _ in cases]
                    low, high = bootstrap_interval(values, groups=groups, seed=seed)
                    found[f"{kind} {name}"] = Share(sum(values) / len(values), low, high, len(values))
        for name, measure in (("score", "success"), ("score exact", "exact")):
            if (overall := _score(rows, _MEASURES[measure], seed)) is not None:
                found[name] = overall
        return found

    def retention(self, editor: str, name: str = "exact") -> dict[int, dict[int, float]]:
        """Of a sequence: {round written: {round asked: share of its prompts}}, to see what becomes of earlier rounds."""
        found: dict[int, dict[int, list[float]]] = {}
        for row in self.rows:
            value = _MEASURES[name](row) if row.editor == editor and row.kind == "prompt" else None
            if value is not None:
                found.setdefault(row.written, {}).setdefault(row.unit, []).append(float(value))
        return {written: {asked: sum(v) / len(v) for asked, v in sorted(own.items())} for written, own in sorted(found.items())}

    def tables(self) -> list[Table]:
        """One column an editor, the base model first."""
        summaries = {editor: self.summary(editor) for editor in self.editors}
        names = list(dict.fromkeys(name for own in summaries.values() for name in own if not name.endswith(("tokens", "magnitude"))))
        rows = [
            (
                name,
                *(
                    f"{100 * own[name].value:.1f} ± {50 * (own[name].high - own[name].low):.1f}" if name in own else ""
                    for own in summaries.values()
                ),
            )
            for name in names
        ]
        how = "in rounds of" if self.sequence else "at a time:"
        title = f"{self.model}, {how} {counted(self.size, 'record')}"
        columns = {"per cent": "<", **dict.fromkeys(summaries, ">")}
        return [Table(title, columns, rows, "± half of the 95 % interval over records")]


_MEASURES: Mapping[str, Callable[[Row], float | None]] = {
    "success": lambda row: row.success,
    "exact": lambda row: row.exact,
    "stayed": lambda row: row.stayed,
    "magnitude": lambda row: None if row.success is None else _p(row.log_wanted) - _p(row.log_against),
    "tokens": lambda row: row.tokens,
}


def _p(log: float | None) -> float:
    return 0.0 if log is None else math.exp(log)


def _score(rows: Sequence[Row], measure: Callable[[Row], float | None], seed: int, resamples: int = 2000) -> Share | None:
    """The harmonic mean of a measure's means over prompt, paraphrase and neighbour questions; None unless all three were asked."""
    place = {kind: i for i, kind in enumerate(("prompt", "paraphrase", "neighbour"))}
    number: dict[str, int] = {}
    told = [(number.setdefault(row.record, len(number)), place[row.kind], measure(row)) for row in rows if row.kind in place]
    sums, sizes = np.zeros((len(number), 3)), np.zeros((len(number), 3))
    for record, kind, value in told:
        if value is not None:
            sums[record, kind] += value
            sizes[record, kind] += 1
    if not len(number) or not sizes.sum(0).all():
        return None
    draws = np.random.default_rng(seed).multinomial(len(number), np.full(len(number), 1 / len(number)), size=resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = (draws @ sums) / (draws @ sizes)
        drawn = 3 / (1 / means).sum(1)  # 0 where one is 0
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Share(harmonic_mean((sums.sum(0) / sizes.sum(0)).tolist()), float(low), float(high), len(number))


# ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def score(
    lm: LanguageModel,
    records: Iterable[Record],
    *,
    before: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Ask every question of some records of a model as it is.

    before          {prompt: what the model said to it before any edit}, by which `stayed` is told; None: this is the model before
    max_new_tokens  how far greedy answers go; None: as far as the longest right answer and one token more, 8 at least

    Raises what `ask` raises.
    """
    asked = [(record, question) for record in check_items(records, "records", "records of a suite") for question in record.questions]
    if not asked:
        return []
    wanted = [question.answers[0] if question.answers else None for _, question in asked]
    candidates = [[text for text in (right, q.against) if text is not None] for right, (_, q) in zip(wanted, asked, strict=True)]
    if max_new_tokens is None:
        lengths = (len(target_ids(lm.tokenizer, q.prompt, answer)) for _, q in asked for answer in q.answers)
        max_new_tokens = max(_ANSWER, *(length + 1 for length in lengths), 0)
    replies = ask(lm, [q.prompt for _, q in asked], candidates, max_new_tokens=max_new_tokens, progress=progress)
    rows = []
    for (record, question), right, reply in zip(asked, wanted, replies, strict=True):
        logs = list(reply.log_probs)
        log_wanted = logs.pop(0) if right is not None else None
        stays = before is not None and question.kind in STAYING
        rows.append(
            Row(
                editor=BASE,
                unit=-1,
                record=record.id,
                kind=question.kind,
                group=question.group,
                prompt=question.prompt,
                written=-1,
                answer=reply.answer,
                exact=_exact(question, reply.answer),
                stayed=_same(reply.answer, before.get(question.prompt), right) if stays and before is not None else None,
                log_wanted=log_wanted,
                log_against=logs.pop(0) if question.against is not None else None,
                tokens=reply.right[0] if right is not None else None,
            )
        )
    return rows


def _exact(question: Question, answer: str) -> bool | None:
    """Whether an answer is right; None where nothing is known that would be."""
    if question.kind == "negation":
        return None if question.against is None else not begins_with(answer, question.against)
    return alias_match(answer, question.answers) if question.answers else None


def _same(answer: str, before: str | None, right: str | None) -> bool | None:
    """Whether an answer says what was said before, by its first phrase."""
    if before is None:
        return None
    told = as_said(before, right)
    return begins_with(answer, told) if told else answer == before


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate(
    lm: LanguageModel,
    records: Iterable[Record],
    editors: Mapping[str, Editor],
    *,
    size: int = 1,
    sequence: bool = False,
    retained: int = 100,
    max_new_tokens: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge editors by records: write so many at a time, ask everything about them, and take the edit back.

    editors   {name: editor}; the base model is asked first, whatever they are called
    size      records an edit: 1, each by itself; more, batches; the last may be smaller
    sequence  put each batch upon those before it, and take all back at the end. Behind each round its own records are asked, and again the
              prompts of up to `retained` records of each earlier one; behind the last, every question of every record
    folder    keeps rows.jsonl and what they are of. Called again with the same arguments a run that was killed goes on where it stood: of a
              sequence the rounds that were asked are written again, and not asked again

    Records without a fact to write are left out. Raises InputError for no such record, two of one id, or an editor called "base",
    FingerprintError or InputError when the folder holds another run, DamagedError when it cannot be read, and what editors raise; the model
    is then as it was.
    """
    check_model(lm)
    every = check_items(records, "records", "records of a suite")
    kept = [record for record in every if record.facts and all(fact.target is not None or fact.target_true for fact in record.facts)]
    size = check_count(size, "size", "how many records are written at a time")
    retained = check_count(retained, "retained", "how many records of an earlier round are asked again", least=0)
    if not kept:
        raise InputError(f"{counted(len(every), 'record')} and none with a fact to write; expected at least one")
    if len({record.id for record in kept}) < len(kept):
        raise InputError("two records have the same id; rows could not be told apart: make ids unique")
    if BASE in editors or not editors:
        raise InputError(f'editors are {{name: editor}}, at least one and none called "{BASE}"; got {list(editors)}')
    units = [kept[start : start + size] for start in range(0, len(kept), size)]
    written = {record.id: unit for unit, members in enumerate(units) for record in members}
    made_from = {
        "format": _FORMAT,
        "fingerprint": lm.fingerprint,
        "records": hashlib.sha256(repr(kept).encode()).hexdigest(),
        "size": size,
        "sequence": sequence,
        "retained": retained,
        "max_new_tokens": max_new_tokens,
    }
    store = _Store(None if folder is None else Path(folder), made_from)
    total, done = (len(editors) + 1) * len(units), 0

    def step() -> None:
        nonlocal done
        done += 1
        tell(progress, "judging", done, total)

    for unit, members in enumerate(units):
        if not store.has(BASE, unit):
            rows = score(lm, members, max_new_tokens=max_new_tokens)
            store.add(BASE, unit, [replace(row, written=written[row.record]) for row in rows], {})
        step()
    before = {row.prompt: row.answer for row in store.rows if row.editor == BASE}

    def asked(editor: str, unit: int, some: Sequence[Record]) -> list[Row]:
        rows = score(lm, some, before=before, max_new_tokens=max_new_tokens)
        return [replace(row, editor=editor, unit=unit, written=written[row.record]) for row in rows]

    for editor, write in editors.items():
        with ExitStack() as stack:
            for unit, members in enumerate(units):
                facts = [fact for record in members for fact in record.facts]
                if store.has(editor, unit) and not (sequence and not store.has(editor, len(units) - 1)):
                    step()
                    continue
                with nullcontext() if sequence else ExitStack() as alone:
                    notes = (stack if alone is None else alone).enter_context(write(facts))
                    if not store.has(editor, unit):
                        last = sequence and unit == len(units) - 1
                        rows = asked(editor, unit, kept if last else members)
                        if sequence and not last:
                            rows += asked(editor, unit, [_prompts(record) for old in units[:unit] for record in old[:retained]])
                        store.add(editor, unit, rows, _numbers(notes))
                step()
    return Evaluation(
        rows=tuple(store.rows),
        notes=store.notes,
        size=size,
        sequence=sequence,
        skipped=len(every) - len(kept),
        model=lm.name,
        fingerprint=lm.fingerprint,
    )


def _prompts(record: Record) -> Record:
    """A record with nothing but the questions that ask for what was written."""
    return replace(record, questions=tuple(question for question in record.questions if question.kind == "prompt"))


def _numbers(notes: object) -> dict[str, float]:
    found = notes if isinstance(notes, Mapping) else {}
    return {str(name): float(value) for name, value in found.items() if isinstance(value, (int, float))}


class _Store:
    """Rows and notes, in memory and in rows.jsonl of a folder, if any: a line a row, and behind each edit's rows a line that ends it."""

    def __init__(self, folder: Path | None, made_from: Mapping[str, Any]) -> None:
        self.path = None if folder is None else folder / "rows.jsonl"
        self.rows: list[Row] = []
        self.notes: dict[tuple[str, int], dict[str, float]] = {}
        if self.path is None:
            return
        first = json.dumps(made_from, ensure_ascii=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else [first]
            self._check(lines[0] if lines else "", made_from)
            kept = [first, *self._take(lines[1:])]
            write_file(self.path, ("\n".join(kept) + "\n").encode())  # without the rows of an edit that was not finished
        except OSError as error:
            raise WorkspaceError(f"cannot write {self.path}: {error.strerror}; choose a folder that can be written") from None
        except UnicodeDecodeError as error:
            raise DamagedError(f"{self.path} is no text ({error.reason}); delete it to begin again") from None

    def _check(self, line: str, made_from: Mapping[str, Any]) -> None:
        try:
            held = json.loads(line)
        except ValueError:
            held = None
        if not isinstance(held, dict) or held.get("format") != _FORMAT:
            raise DamagedError(f"{self.path} holds no evaluation; choose another folder, or delete it")
        for name, value in made_from.items():
            if held.get(name) != value:
                error = FingerprintError if name == "fingerprint" else InputError
                raise error(f"{self.path} is of another run: {name} is {held.get(name)!r} there, {value!r} here; choose another folder")

    def _take(self, lines: Sequence[str]) -> list[str]:
        """Rows of finished edits into memory; the lines that hold them."""
        kept: list[str] = []
        open_lines: list[str] = []
        open_rows: list[Row] = []
        for number, line in enumerate(lines, 2):
            try:
                entry = json.loads(line)
                if "ends" in entry:
                    self.rows += open_rows
                    self.notes[str(entry["ends"]), int(entry["unit"])] = _numbers(entry["notes"])
                    kept += [*open_lines, line]
                    open_lines, open_rows = [], []
                else:
                    open_rows.append(Row(**entry))
                    open_lines.append(line)
            except (ValueError, TypeError, KeyError) as error:
                if number <= len(lines):  # only the last line can be torn
                    raise DamagedError(f"{self.path}, line {number}, cannot be read ({error}); delete the file to begin again") from None
        return kept

    def has(self, editor: str, unit: int) -> bool:
        """Whether an edit's rows are there."""
        return (editor, unit) in self.notes

    def add(self, editor: str, unit: int, rows: Sequence[Row], notes: Mapping[str, float]) -> None:
        """Keep an edit's rows."""
        self.rows += rows
        self.notes[editor, unit] = dict(notes)
        if self.path is None:
            return
        lines = [json.dumps(vars(row), ensure_ascii=False) for row in rows]
        lines.append(json.dumps({"ends": editor, "unit": unit, "notes": dict(notes)}, ensure_ascii=False))
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WorkspaceError(f"cannot write {self.path}: {error.strerror}; make room, and start again to go on") from None
