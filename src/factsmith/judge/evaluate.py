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

import functools
import hashlib
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pydantic

from ..checks import check_count, check_items, check_seed
from ..errors import DamagedError, FingerprintError, InputError, NumericsError, WorkspaceError
from ..fact import Fact
from ..files import folder_path, write_file
from ..model.load import LanguageModel, check_model
from ..model.sample import sample
from ..model.tokens import target_ids
from ..progress import Progress, tell
from ..tables import Shown, Table, counted
from ..verify import as_said, begins_with
from .asking import ask
from .drift import Reference
from .metrics import alias_match, bootstrap_interval, harmonic_mean, ngram_entropy, reference_consistency
from .suites import Kind, Question, Record, Suite, load_suite

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


BASE = "base"
"""The model as it was."""
STAYING: tuple[Kind, ...] = ("neighbour", "locality")
_FORMAT = "evaluation 4"
_ANSWER = 8  # tokens decoded at least
_CONTINUED, _TOP_K = 100, 5  # how the papers let a model write: so many tokens, each among the likeliest five
_TOGETHER = 64  # texts written in one batch
_PROBE = "probe: "
_DRIFTING = 10  # single edits whose drift is measured
_BROKEN = "broken"
LOWEST = -1e4
"""Stands for both log-probabilities of a comparison where a model gives no finite number: neither side is the likelier, exp of it is 0."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question asked once.

    editor, unit  which editor had written, and which of its edits the model carried: a record, a batch or a round, from 0; -1: none
    record, kind, group, prompt  the question
    written       the unit in which the question's record was written
    answer        what the model said
    exact         whether that is right: it begins with an answer; for a negation, that it does not begin with what was written
    stayed        of what must stay, whether it says what it said before any edit; None for other kinds, and for the base model
    log_wanted    mean log-probability a token of the first right answer; None where there is none, `LOWEST` where it is no finite number
    log_against   of the other side of the comparison; None where there is none, `LOWEST` where either side's is no finite number
    tokens        share of the right answer's tokens that are the likeliest in their place, each after those before it (teacher forced);
                  None for a negation, to which more than one thing is right; 0 from a model that gives no finite numbers
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

    @property
    def broken(self) -> bool:
        """Whether the model gave no finite number here: what it was asked counts as wrong."""
        return LOWEST in (self.log_wanted, self.log_against)


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a model wrote when it was given a record's generation prompts to go on from.

    editor, unit, record  as in `Row`
    texts        one a prompt, which it begins with
    entropy      n-gram entropy in bits, the mean over the texts: low when the model repeats itself
    consistency  with the record's references, in [0, 1]; None where it has none
    """

    editor: str
    unit: int
    record: str
    texts: tuple[str, ...]
    entropy: float
    consistency: float | None


@dataclass(frozen=True)
class Share:
    """A mean over questions (of entropies, in bits): of n of them, with its 95 % bootstrap interval over records."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Evaluation(Shown):
    """All rows of a run, the base model's among them.

    rows      in the order in which they were asked
    written   what the models wrote by themselves
    notes     {(editor, unit): {name: number}}, what the editors said of themselves, and where drift was measured, `DRIFTS` of it; "broken"
              is 1 where the model gave numbers that are not finite: what it was asked counts as wrong, such drift is left out
    failed    {(editor, unit): why}, edits that could not be made; what was asked behind them was asked of the model without them
    size      records an edit; sequence: whether edits were put upon one another
    units     how many edits of each editor there are to be; 0: not told
    settings  {editor: its settings in words}, of those that say theirs
    skipped   records left out because there is nothing to write in them
    model     what it was loaded as; fingerprint: the model's
    """

    rows: tuple[Row, ...]
    written: tuple[Continuation, ...] = ()
    notes: Mapping[tuple[str, int], Mapping[str, float]]
    failed: Mapping[tuple[str, int], str] = field(default_factory=dict)
    size: int
    sequence: bool
    skipped: int
    model: str
    fingerprint: str
    units: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Evaluation:
        """What a run has kept so far, of edits that were finished (`unfinished` says where some are missing).

        Raises InputError where there is none, DamagedError, WorkspaceError.
        """
        store = _Store(Path(folder), None)
        told = store.header
        try:
            return cls(
                rows=tuple(store.rows),
                written=tuple(store.written),
                notes=store.notes,
                failed=store.failed,
                size=int(told["size"]),
                sequence=bool(told["sequence"]),
                skipped=int(told.get("skipped", 0)),
                model=str(told.get("model", "")),
                fingerprint=str(told["fingerprint"]),
                units=int(told["units"]),
                settings=store.settings,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{store.path}, line 1, cannot be read ({error}); delete the file to begin again") from None

    @property
    def editors(self) -> tuple[str, ...]:
        """Base first, then in the order in which they ran."""
        return tuple(dict.fromkeys(row.editor for row in self.rows))

    @property
    def unfinished(self) -> dict[str, int]:
        """{editor: how many of its edits are there} of those, base among them, that have fewer than `units`: the run was stopped."""
        there = Counter(editor for editor, _ in self.notes)
        return {editor: there[editor] for editor in self.editors if there[editor] < self.units}

    def finished(self) -> Evaluation:
        """The same without editors that are unfinished."""
        gone = self.unfinished
        return replace(
            self,
            rows=tuple(row for row in self.rows if row.editor not in gone),
            written=tuple(one for one in self.written if one.editor not in gone),
            notes={at: note for at, note in self.notes.items() if at[0] not in gone},
            failed={at: why for at, why in self.failed.items() if at[0] not in gone},
        )

    @property
    def pace(self) -> str:
        """How many records were written together, in words: "100 at a time", "100 a round"."""
        return f"{self.size:,} {'a round' if self.sequence else 'at a time'}"

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
        chosen = [row for row in own if row.unit == wanted]
        if not chosen:
            raise InputError(f"{editor} was not asked behind edit {unit}; there are 0 to {max(row.unit for row in own)}")
        return chosen

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
        told = [one for one in self.written if one.editor == editor and (unit is None or one.unit == unit)]
        for name in ("entropy", "consistency"):
            if some := [(value, one.record) for one in told if (value := getattr(one, name)) is not None]:
                values, groups = [value for value, _ in some], [record for _, record in some]
                found[f"text {name}"] = Share(sum(values) / len(values), *bootstrap_interval(values, groups=groups, seed=seed), len(values))
        for name, measure in (("score", "success"), ("score exact", "exact")):
            if (overall := _score(rows, _MEASURES[measure], seed)) is not None:
                found[name] = overall
        return found

    def retention(self, editor: str, name: str = "exact") -> dict[int, dict[int, float]]:
        """Of a sequence: {round written: {round asked: share of its prompts}}, to see what becomes of earlier rounds."""
        found: dict[int, dict[int, list[float]]] = {}
        self.asked(editor)  # raises for one that did not run
        for row in self.rows:
            value = _MEASURES[name](row) if row.editor == editor and row.kind == "prompt" else None
            if value is not None:
                found.setdefault(row.written, {}).setdefault(row.unit, []).append(float(value))
        return {written: {asked: sum(v) / len(v) for asked, v in sorted(own.items())} for written, own in sorted(found.items())}

    def remaining(self, editor: str) -> dict[int, tuple[float, float]]:
        """Of a sequence, behind each round: the share of prompts answered right of those of the first round, and of all rounds so far."""
        told = self.retention(editor)
        rounds = sorted({asked for own in told.values() for asked in own})
        sizes = {
            at: sum(row.unit == at == row.written for row in self.rows if row.editor == editor and row.kind == "prompt") for at in rounds
        }
        found = {}
        for at in rounds:
            own = [(told[old][at], sizes[old]) for old in rounds if at in told.get(old, {})]
            if at in told.get(rounds[0], {}):
                found[at] = (told[rounds[0]][at], sum(share * n for share, n in own) / max(1, sum(n for _, n in own)))
        return found

    def drift(self, editor: str, unit: int | None = None) -> dict[str, float]:
        """The means of `DRIFTS` where they were measured: of a sequence behind its last round, or behind `unit`. {} where they were not."""
        told = {at: note for (name, at), note in self.notes.items() if name == editor and set(DRIFTS) & set(note)}
        if unit is not None or self.sequence:
            told = {at: note for at, note in told.items() if at == (max(told) if unit is None else unit)}
        found = {name: [note[name] for note in told.values() if name in note] for name in DRIFTS}
        return {name: sum(values) / len(values) for name, values in found.items() if values}

    def probed(self, editor: str) -> dict[str, float]:
        """What the probe measured of a model: the base model, or what it was behind an editor's last edit."""
        return {
            name.removeprefix(_PROBE): value
            for (of, _), note in self.notes.items()
            for name, value in note.items()
            if of == editor and name.startswith(_PROBE)
        }

    def measured(self, editor: str) -> dict[str, float]:
        """What an editor noted of its edits: how many were made, mean seconds, the largest norm, and drift where it was measured.

        "failed": edits that could not be made; "broken": edits behind which the model gave no finite numbers; where there are any.
        """
        notes = [own for (name, _), own in self.notes.items() if name == editor]
        records = len({row.record for row in self.rows if row.editor == editor})
        failed = sum(name == editor for name, _ in self.failed)
        broken = sum(_BROKEN in own for own in notes)
        found: dict[str, float] = {"edits": len(notes) - failed}
        found |= {name: n for name, n in (("failed", failed), (_BROKEN, broken)) if n}
        if seconds := [own["seconds"] for own in notes if "seconds" in own]:
            found |= {"seconds": sum(seconds) / len(seconds), "seconds_a_record": sum(seconds) / max(1, records)}
        if norms := [own["norm"] for own in notes if "norm" in own]:
            found["norm"] = max(norms)
        return found | self.drift(editor)

    @functools.cached_property
    def summaries(self) -> Mapping[str, Mapping[str, Share]]:
        """{editor: its summary}."""
        return {editor: self.summary(editor) for editor in self.editors}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields: measures, what edits cost and did, retention; not the rows."""
        edits = [editor for editor in self.editors if editor != BASE]
        return {
            "size": self.size,
            "sequence": self.sequence,
            "settings": {e: self.settings[e] for e in edits if e in self.settings},
            "measures": {e: {name: _plain(share) for name, share in own.items()} for e, own in self.summaries.items()},
            "probed": {e: dict(self.probed(e)) for e in self.editors},
            "failed": [{"editor": e, "edit": unit, "why": why} for (e, unit), why in self.failed.items()],
            "edits": {e: self.measured(e) for e in edits},
            "retention": {e: self.retention(e) for e in edits if self.sequence},
        }

    def tables(self) -> list[Table]:
        """One column an editor, the base model first."""
        summaries = self.summaries
        names = list(dict.fromkeys(name for own in summaries.values() for name in own if not name.endswith("tokens")))
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
        return [Table(title, columns, rows, INTERVALS)]


INTERVALS = "± half of the 95 % interval over records; entropy in bits, times 100"
DRIFTS = ("kl_text", "perplexity", "kl_facts", "changed_share")
"""What of a `Drift` is noted beside an edit's rows: perplexity is after divided by before."""
_MEASURES: Mapping[str, Callable[[Row], float | None]] = {
    "success": lambda row: row.success,
    "exact": lambda row: row.exact,
    "stayed": lambda row: row.stayed,
    "magnitude": lambda row: None if row.success is None else _p(row.log_wanted) - _p(row.log_against),
    "tokens": lambda row: row.tokens,
}


def _plain(share: Share) -> dict[str, float | int | None]:
    return {name: value if math.isfinite(value) else None for name, value in vars(share).items()}


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

    Where the model gives no finite number the answer is what greedy decoding makes of that, and everything else counts as wrong.
    Raises what `ask` raises.
    """
    asked = [(record, question) for record in check_items(records, "records", "records of a suite") for question in record.questions]
    if not asked:
        return []
    wanted = [question.answers[0] if question.answers else None for _, question in asked]
    candidates = [[text for text in (right, q.against) if text is not None] for right, (_, q) in zip(wanted, asked, strict=True)]
    if max_new_tokens is None:
        max_new_tokens = _answer_tokens(lm, [question for _, question in asked])
    replies = ask(lm, [q.prompt for _, q in asked], candidates, max_new_tokens=max_new_tokens, progress=progress)
    rows = []
    for (record, question), right, reply in zip(asked, wanted, replies, strict=True):
        broken = not all(map(math.isfinite, reply.log_probs))
        logs = [LOWEST if broken else log for log in reply.log_probs]
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
                tokens=None if right is None or question.kind == "negation" else 0.0 if broken else reply.right[0],
            )
        )
    return rows


def _answer_tokens(lm: LanguageModel, questions: Iterable[Question]) -> int:
    """How far greedy answers go: as far as the longest right answer and one token more, so far at least."""
    lengths = (len(target_ids(lm.tokenizer, question.prompt, answer)) for question in questions for answer in question.answers)
    return max(_ANSWER, max(lengths, default=0) + 1)


def continue_texts(
    lm: LanguageModel, records: Sequence[Record], *, seed: int = 0, editor: str = BASE, unit: int = -1
) -> list[Continuation]:
    """Let a model go on from every generation prompt of some records, and measure what it writes; raises what `sample` raises."""
    prompts = [prompt for record in records for prompt in record.generation_prompts]
    if not prompts:
        return []
    length = min(_CONTINUED, (lm.max_tokens or _CONTINUED + 1) - 1)
    texts = iter(
        lm.tokenizer.decode(ids)
        for start in range(0, len(prompts), _TOGETHER)
        for some in [prompts[start : start + _TOGETHER]]
        for ids in sample(lm, len(some), length, top_k=_TOP_K, seed=seed, openings=some, apart=True)
    )
    found = []
    for record in records:
        own = tuple(next(texts) for _ in record.generation_prompts)
        alike = reference_consistency(own, record.references) if record.references else None
        found.append(Continuation(editor=editor, unit=unit, record=record.id, texts=own, entropy=ngram_entropy(own), consistency=alike))
    return found


def _exact(question: Question, answer: str) -> bool | None:
    """Whether an answer is right; None where nothing is known that would be."""
    if question.kind == "negation":
        return None if question.against is None else not begins_with(answer, question.against)
    return alias_match(answer, question.answers) if question.answers else None


def _same(answer: str, before: str | None, right: str | None) -> bool | None:
    """Whether an answer says what was said before, by its first phrase."""
    if before is None:
        return None
    # Of "1,000" the first phrase is "1", which it does not begin with: what is the same needs no phrase.
    return answer == before or begins_with(answer, as_said(before, right))


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
        raise InputError(f"records hold a {strange[0]}; expected those of a suite: load_suite(...).records")
    changes = () if delta is None else _changes(delta)
    if changes and (editors is not None or size is not None or sequence):
        raise InputError("a delta is judged as it is: give no editors, size or sequence with it")
    named = isinstance(editors, Mapping) and all(isinstance(name, str) and callable(write) for name, write in editors.items())
    if editors is not None and (not named or BASE in editors or not editors):
        got = list(editors) if isinstance(editors, Mapping) else type(editors).__name__
        raise InputError(f'editors are {{name: editor}}, functions of facts, at least one and none called "{BASE}"; got {got}')
    kept = every if editors is None else [record for record in every if _writable(record)]
    if editors is None:
        editors = {"delta": _Given(lm, changes)} if changes else {}
        size = max(1, len(kept)) if size is None else size
    size = check_count(1 if size is None else size, "size", "how many records are written at a time")
    retained = check_count(retained, "retained", "how many records of an earlier round are asked again", least=0)
    if not kept:
        raise InputError(f"{counted(len(every), 'record')} and none with a fact to write; expected at least one")
    if len({record.id for record in kept}) < len(kept):
        raise InputError("two records have the same id; rows could not be told apart: make ids unique")
    if probe is not None and not callable(probe):
        raise InputError(f"the probe is a {type(probe).__name__}; expected a function without arguments that gives numbers by name")
    if max_new_tokens is None:  # once for all: answers of different length would not be the same ones
        max_new_tokens = _answer_tokens(lm, [question for record in kept for question in record.questions])
    max_new_tokens = check_count(max_new_tokens, "max_new_tokens", "how far answers go, 1 token or more")
    drift_tokens = check_count(drift_tokens, "drift_tokens", "how much text", least=0)
    continued = check_count(continued, "continued", "how many records are continued", least=0)
    listed = None if texts is None else check_items(texts, "texts", "a list of texts")
    size = min(size, len(kept))
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
        "drift_tokens": drift_tokens,
        "texts": None if listed is None else hashlib.sha256("\0".join(listed).encode()).hexdigest(),
        "continued": continued,
        "seed": seed,
        "probe": None if probe is None else str(getattr(probe, "description", "")),
    }
    skipped = len(every) - len(kept)
    store = _Store(None if folder is None else folder_path(folder), made_from, {"model": lm.name, "skipped": skipped, "units": len(units)})
    for editor, write in editors.items():
        store.check_editor(editor, str(getattr(write, "description", "")))
    total, done = (len(editors) + 1) * len(units), 0

    def step() -> None:
        nonlocal done
        done += 1
        tell(progress, "judging", done, total)

    def probed(wanted: bool) -> dict[str, float]:
        try:
            return {f"{_PROBE}{name}": value for name, value in _numbers(probe()).items()} if wanted and probe is not None else {}
        except NumericsError:
            return {_BROKEN: 1.0}

    chosen = [record for record in kept if record.generation_prompts][:continued]

    def gone_on(editor: str, unit: int, some: Sequence[Record]) -> list[Continuation]:
        return continue_texts(lm, [record for record in chosen if record in some], seed=seed, editor=editor, unit=unit)

    for unit, members in enumerate(units):
        if not store.has(BASE, unit):
            rows = score(lm, members, max_new_tokens=max_new_tokens)
            store.add(
                BASE, unit, [replace(row, written=written[row.record]) for row in rows], gone_on(BASE, unit, members), probed(unit == 0)
            )
        step()
    before = {row.prompt: row.answer for row in store.rows if row.editor == BASE}
    reference = None
    if drift_tokens and not all(store.has(editor, unit) for editor in editors for unit in range(len(units))):
        subjects = [fact.subject for facts in (*(record.facts for record in kept), *(one.facts for one in changes)) for fact in facts]
        reference = Reference(lm, texts=listed, without=subjects, max_tokens=drift_tokens, seed=seed)

    def drifted(unit: int) -> dict[str, float]:
        if reference is None or (size == 1 and not sequence and unit >= _DRIFTING):
            return {}
        try:
            found = reference.compare()
        except NumericsError:
            return {_BROKEN: 1.0}
        values = {name: value for name, value in found.measures.items() if name in DRIFTS and value is not None}
        finite = _numbers(values)
        return finite if len(finite) == len(values) else {**finite, _BROKEN: 1.0}

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
                    notes, failure = _entered(stack if alone is None else alone, write, facts)
                    if not store.has(editor, unit):
                        last = sequence and unit == len(units) - 1
                        rows = asked(editor, unit, kept if last else members)
                        if sequence and not last:
                            rows += asked(editor, unit, [_prompts(record) for old in units[:unit] for record in old[:retained]])
                        texts_written = gone_on(editor, unit, kept if last else [] if sequence else members)
                        measured = {**_numbers(notes), **drifted(unit), **probed(unit == len(units) - 1)}
                        measured |= {_BROKEN: 1.0} if any(row.broken for row in rows) else {}
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


def _chosen(suite: Suite | str | os.PathLike[str] | Iterable[Record], limit: int | None, seed: int) -> list[Record]:
    """The records to judge, a sample of `limit` in their order."""
    if isinstance(suite, (str, os.PathLike)):
        return list(load_suite(Path(suite) if isinstance(suite, os.PathLike) else suite, limit=limit, seed=seed).records)
    every = list(check_items(suite.records if isinstance(suite, Suite) else suite, "suite", "a suite, its records, or its name or file"))
    if limit is None or check_count(limit, "limit", "how many records to draw, 1 or more") >= len(every):
        return every
    return [every[at] for at in sorted(random.Random(seed).sample(range(len(every)), limit))]


def _writable(record: Record) -> bool:
    """Whether there is something to write."""
    return bool(record.facts) and all(fact.target is not None or fact.target_true for fact in record.facts)


def _changes(delta: Change | Iterable[Change]) -> tuple[Change, ...]:
    """One change or several, checked."""
    found = (delta,) if hasattr(delta, "inside") else tuple(check_items(delta, "delta", "a Delta, or several"))
    if not found or not all(hasattr(one, "inside") for one in found):
        raise InputError("delta is what an editor such as `memit` gave, or several on top of one another; got something else, or none")
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
            raise InputError(f"an editor gave a {type(block).__name__}; expected a `with` block inside which the model carries the facts")
        return stack.enter_context(block), ""
    except NumericsError as error:
        return {}, str(error)


def _prompts(record: Record) -> Record:
    """A record with nothing but the questions that ask for what was written."""
    return replace(record, questions=tuple(question for question in record.questions if question.kind == "prompt"))


def _numbers(notes: object) -> dict[str, float]:
    """What of some notes are finite numbers."""
    found = notes if isinstance(notes, Mapping) else {}
    return {str(name): float(value) for name, value in found.items() if isinstance(value, (int, float)) and math.isfinite(value)}


class _Store:
    """Rows and notes, in memory and in rows.jsonl of a folder, if any: a line a row, and behind each edit's rows a line that ends it."""

    def __init__(self, folder: Path | None, made_from: Mapping[str, Any] | None, told: Mapping[str, Any] | None = None) -> None:
        """made_from: what a folder's rows must be of; None: whatever they are of, and they are only read. told: said beside it."""
        self.path = None if folder is None else folder / "rows.jsonl"
        self.header: dict[str, Any] = {**(made_from or {}), **(told or {})}
        self.rows: list[Row] = []
        self.written: list[Continuation] = []
        self.notes: dict[tuple[str, int], dict[str, float]] = {}
        self.failed: dict[tuple[str, int], str] = {}
        self.described: dict[str, str] = {}
        self.size = 0  # of the file, as it was left
        if self.path is None:
            return
        first = json.dumps(self.header, ensure_ascii=False)
        try:
            if made_from is None:
                if not self.path.is_file():
                    raise InputError(f"{folder} holds no rows.jsonl; expected a folder that `evaluate` kept its rows in")
                lines = self._lines()
                self.header = self._check(lines[0], {})
                self._take(lines[1:])
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._lines() if self.path.is_file() and self.path.stat().st_size else [first]
            self._check(lines[0], made_from)
            content = ("\n".join([first, *self._take(lines[1:])]) + "\n").encode()
            write_file(self.path, content)  # without the rows of an edit that was not finished
            self.size = len(content)
        except OSError as error:
            raise WorkspaceError(f"cannot use {self.path}: {error.strerror}; choose a folder that can be read and written") from None
        except UnicodeDecodeError as error:
            raise DamagedError(f"{self.path} is no text ({error.reason}); delete it to begin again") from None

    def _lines(self) -> list[str]:
        """As they stand, split at line feeds alone; of the last, which may be torn inside a character, what can be read."""
        assert self.path is not None
        *lines, last = self.path.read_bytes().removesuffix(b"\n").split(b"\n")
        return [*(line.decode() for line in lines), last.decode(errors="replace")]

    def _check(self, line: str, made_from: Mapping[str, Any]) -> dict[str, Any]:
        try:
            held = json.loads(line)
        except ValueError:
            held = None
        if not isinstance(held, dict) or held.get("format") != _FORMAT:
            raise DamagedError(f"{self.path} holds no evaluation, or an earlier version's; choose another folder, or delete it")
        for name, value in made_from.items():
            if held.get(name) != value:
                error = FingerprintError if name == "fingerprint" else InputError
                there = f"{name} is {held.get(name)!r} there, {value!r} here"
                if name in ("records", "texts"):
                    there = f"its {name} are others (another suite, sample, seed or text)"
                raise error(f"{self.path} is of another run: {there}; choose another folder")
        return held

    def _take(self, lines: Sequence[str]) -> list[str]:
        """Rows of finished edits into memory; the lines that hold them."""
        kept: list[str] = []
        begun: list[str] = []
        for number, line in enumerate(lines, 2):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise TypeError("it is no row")
                if "ends" not in entry:
                    begun.append(line)
                    continue
                at = (str(entry["ends"]), int(entry["unit"]))
                if entry["sha256"] != _checksum(begun):
                    raise ValueError(f"the rows of {at[0]}, edit {at[1]}, do not match their checksum")
                if at in self.notes:
                    raise ValueError(f"{at[0]}, edit {at[1]}, is there twice")
                for each in begun:
                    if "texts" in json.loads(each, parse_constant=_no_number):
                        self.written.append(_CONTINUATION.validate_json(each, strict=True))
                    else:
                        self.rows.append(_ROW.validate_json(each, strict=True))
                self.notes[at] = _numbers(entry["notes"])
                self.described.setdefault(at[0], str(entry["by"]))
                if entry.get("failed"):
                    self.failed[at] = str(entry["failed"])
                kept += [*begun, line]
                begun = []
            except (ValueError, TypeError, KeyError) as error:  # pydantic's is a ValueError
                if number <= len(lines):  # only the last line can be torn
                    why = "; ".join(str(error).splitlines()[:3])
                    raise DamagedError(f"{self.path}, line {number}, cannot be read ({why}); delete the file to begin again") from None
        return kept

    def check_editor(self, editor: str, description: str) -> None:
        """Raises InputError where rows of an editor of this name are there that was another."""
        held = self.described.setdefault(editor, description)
        if held and description and held != description:
            raise InputError(
                f"{self.path} has rows of {editor} with other settings: {held} there, {description} here; choose another folder"
            )

    @property
    def settings(self) -> dict[str, str]:
        """{editor: its description} of those that have one."""
        return {editor: text for editor, text in self.described.items() if text}

    def has(self, editor: str, unit: int) -> bool:
        """Whether an edit's rows are there."""
        return (editor, unit) in self.notes

    def add(
        self,
        editor: str,
        unit: int,
        rows: Sequence[Row],
        texts: Sequence[Continuation],
        notes: Mapping[str, float],
        failed: str = "",
    ) -> None:
        """Keep what belongs to an edit."""
        self.rows += rows
        self.written += texts
        self.notes[editor, unit] = dict(notes)
        if failed:
            self.failed[editor, unit] = failed
        if self.path is None:
            return
        lines = [json.dumps(vars(row), ensure_ascii=False) for row in (*rows, *texts)]
        end = {"ends": editor, "unit": unit, "notes": dict(notes), "by": self.described.get(editor, ""), "sha256": _checksum(lines)}
        lines.append(json.dumps(end | ({"failed": failed} if failed else {}), ensure_ascii=False))
        content = ("\n".join(lines) + "\n").encode()
        try:
            with self.path.open("ab") as file:
                if file.seek(0, os.SEEK_END) != self.size:
                    raise WorkspaceError(f"somebody else writes to {self.path}, too; let one run finish, or choose another folder")
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self.size += len(content)
        except OSError as error:
            raise WorkspaceError(f"cannot write {self.path}: {error.strerror}; make room, and start again to go on") from None


def _checksum(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


_ROW = pydantic.TypeAdapter(Row)
_CONTINUATION = pydantic.TypeAdapter(Continuation)
