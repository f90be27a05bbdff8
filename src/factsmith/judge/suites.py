"""What edits are judged by: records of facts to write and questions to ask, from the benchmarks' own files or made from the bundled facts.

suite = load_suite("atlas", limit=100)                       # bundled
suite = load_suite("counterfact.json")                       # a file; its layout is recognised by its fields
suite = load_suite("zsre-rome:zsre_mend_eval.json")          # or named
suite.records[0].facts, suite.records[0].questions, suite.skipped

The layouts, by the name that `kind` takes:

counterfact       ROME's full schema (Meng et al. 2022, arXiv 2202.05262): paraphrases, neighbours, generation prompts; `attribute_prompts`
                  are not read. Where EasyEdit added a portability question or an alternative subject they are asked too
counterfact-slim  EasyEdit's: one rephrase and one neighbour a record. Most of its rephrase prompts are generation prompts, which need not
                  end where the object is due, so scores on them are not comparable with published paraphrase scores
zsre              MEND's (Mitchell et al. 2022, arXiv 2110.11309): the counterfactual `alt` is written, as MEND and EasyEdit do; the
                  portability question follows from it
zsre-rome         the same file as ROME, MEMIT and AlphaEdit use it: the true answer is written; never recognised, always named
mquake            MQuAKE-CF (Zhong et al. 2023, arXiv 2305.14795): several facts a record, three questions a multi-hop case. The hops
                  that no edit touches are asked as locality
knowedit          RippleEdits (Cohen et al. 2023, arXiv 2307.12976) in KnowEdit's layout: reasoning, aliasing, and logical generalisation as
                  "relation"; relation specificity and forgetfulness as locality
known             ROME's known_1000: what a model may know, nothing to write. Each fact has a target_true and no target, and its question
                  asks for the former: to find out what a model knows (edited, it would be made to forget)
wikibigedit       Thede et al. 2025 (arXiv 2503.05683), JSON or CSV; a persona's question counts as a paraphrase
qaedit            Yang et al. 2025 (arXiv 2502.11177)
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ..checks import check_count, check_seed, check_text
from ..errors import FactError, InputError
from ..fact import Fact
from ..model import atlas
from ..model.load import LanguageModel
from ..tables import counted

Kind = Literal["prompt", "paraphrase", "neighbour", "reasoning", "aliasing", "relation", "multihop", "locality", "negation"]
"""prompt, paraphrase: the fact that was written. neighbour: another subject, same relation; must stay. reasoning, aliasing, relation: what
follows from the fact, by a further fact, another name of its subject, another relation ("portability"). multihop: a chain of facts of which
some were written. locality: anything else that must stay. negation: the fact denied ("It is not true that ..."), see `negation`."""

_MOST = 20_000  # characters of a text, as in `Fact`


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to ask after an edit.

    kind     what it tests, one of `Kind`
    prompt   whole text, to be continued by the answer
    answers  any of them is right after the edit, the object first, then its aliases; for neighbour and locality what must stay. (): known
             only as "what the model said before" (neighbour, locality), or nothing in particular (negation)
    against  the other side of a two-way comparison: for prompt and paraphrase the true object, for a neighbour, and under a negation, the
             new one; for a multi-hop question what its answer was. None where there is none
    group    of a record's questions, those of one number are ways to ask the same thing and any of them may hit (MQuAKE); None: it stands
             alone

    Raises InputError for an unknown kind or an empty text, or no answer where one is needed.
    """

    kind: Kind
    prompt: str
    answers: tuple[str, ...]
    against: str | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"a question of kind {self.kind!r}; expected one of {', '.join(get_args(Kind))}")
        for text in (self.prompt, *self.answers, *([] if self.against is None else [self.against])):
            if not check_text(text, f"a text of a {self.kind} question").strip() or len(text) > _MOST:
                raise InputError(f"a text of a {self.kind} question has {len(text)} characters; expected some, at most {_MOST:,}")
        if not self.answers and self.kind not in ("neighbour", "locality", "negation"):
            raise InputError(f"{self.kind} question {self.prompt!r} has no answer; expected at least one that is right after the edit")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What belongs together in a benchmark: what is written, and what is asked about it.

    id                  unique in its suite
    facts               to be written, one or more (MQuAKE); a fact without a target (layout "known") is only asked for
    questions           in the file's order
    generation_prompts  to be continued freely, for n-gram entropy and consistency
    references          texts to compare the continuations with; () where the benchmark's file has none
    """

    id: str
    facts: tuple[Fact, ...]
    questions: tuple[Question, ...]
    generation_prompts: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Malformed:
    """What of a file could not be used: a record, or a question of one (its `field` says which), and why.

    index  of the record in the file, from 0
    field  such as "requested_rewrite.target_new.str"; "" where the record is none at all
    whole  whether all of the record is left out; else it is used without what this is
    """

    file: str
    index: int
    field: str
    message: str
    whole: bool = True

    def __str__(self) -> str:
        return f"{self.file}, record {self.index}: {self.field} {self.message}".replace(":  ", ": ")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Records to judge edits by.

    name     the layout, or "atlas"
    records  in the file's order
    skipped  what could not be used of the records that were looked at
    source   the path, hub id, or "bundled"
    digest   sha256 (hex) of the file's bytes, or of the bundled facts and phrasings
    """

    name: str
    records: tuple[Record, ...]
    skipped: tuple[Malformed, ...]
    source: str
    digest: str

    @property
    def left_out(self) -> str:
        """How much was malformed, in words: "2 records, 1 question of others"; "" where nothing was."""
        whole = len({each.index for each in self.skipped if each.whole})
        parts = len(self.skipped) - sum(each.whole for each in self.skipped)
        told = [(whole, counted(whole, "record")), (parts, counted(parts, "question") + (" of others" if whole else ""))]
        return ", ".join(text for n, text in told if n)


def load_suite(
    what: str | Path, *, kind: str | None = None, malformed: Literal["skip", "fatal"] = "skip", limit: int | None = None, seed: int = 0
) -> Suite:
    """The records of a benchmark.

    what       "atlas"; a .json, .jsonl or .csv file; a hub dataset, owner/name or owner/name/file; or one of these with the layout's name
               in front ("zsre-rome:FILE")
    kind       the layout's name; None: recognised by its fields
    malformed  "skip": leave out and list in `skipped`; "fatal": an error, wherever in the file
    limit      a sample of so many usable records, drawn by seed; unless malformed ones are fatal, only those drawn are looked at. None: all
    seed       of the sample, and of what "atlas" draws

    Raises InputError for what is no suite, a file that cannot be read or is not of the layout, no usable record, and, if that is fatal, a
    malformed one.
    """
    if malformed not in ("skip", "fatal"):
        raise InputError(f"malformed is {malformed!r}; expected 'skip' or 'fatal'")
    limit = None if limit is None else check_count(limit, "limit", "how many records to draw, 1 or more")
    seed = check_seed(seed)
    what = check_text(str(what) if isinstance(what, Path) else what, "the suite")
    if kind is not None and kind not in _LAYOUTS:
        raise InputError(f"kind is {kind!r}; expected one of {', '.join(_LAYOUTS)}, or None")
    named, _, rest = what.partition(":")
    if named in _LAYOUTS and rest:
        if kind not in (None, named):
            raise InputError(f"{what!r} names the layout {named}, kind is {kind!r}; give one of them")
        what, kind = rest, named
    if what == "atlas":
        if kind is not None:
            raise InputError(f"atlas is bundled and has no layout of a file; got kind {kind!r}")
        return _atlas(limit, seed)
    path = _find(what)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {what}: {error.strerror}; expected a file of records") from None
    rows = _rows(what, path.suffix.lower(), content)
    layout = _layout(what, rows, kind)
    records, skipped = _read(what, rows, layout, malformed == "fatal", limit, seed)
    return Suite(name=layout.name, records=records, skipped=skipped, source=what, digest=hashlib.sha256(content).hexdigest())


def known(lm: LanguageModel, records: Iterable[Record]) -> tuple[Record, ...]:
    """The records whose old objects a model says: greedy decoding of every fact's prompt gives its whole target_true.

    A record with a fact whose old object is not known is left out.
    """
    listed = list(records)
    asked = [(at, fact.text, fact.target_true) for at, record in enumerate(listed) for fact in record.facts]
    said = {at: bool(record.facts) for at, record in enumerate(listed)}
    pairs = [(text, true) for _, text, true in asked if true is not None]
    answers = iter(lm.says([text for text, _ in pairs], [true for _, true in pairs]) if pairs else [])
    for at, _, true in asked:
        said[at] &= true is not None and next(answers)
    return tuple(record for at, record in enumerate(listed) if said[at])


def negation(fact: Fact) -> Question | None:
    """The fact denied: "It is not true that" before its prompt. None where that makes no sentence: a question, or a prompt like "{}, the".

    What was written must now *not* follow: `against` is the new object, `answers` the old one where it is known, which is so no longer once
    the new one holds. An edit that ties the object to the words in front of it, whatever stands before them, fails.
    After Liu et al. 2025, "Is Model Editing Built on Sand?" (arXiv 2510.00625): editors collapse on such queries.
    """
    if fact.target is None or "?" in fact.prompt or fact.prompt.startswith("{},"):
        return None
    prompt = fact.prompt[0].lower() + fact.prompt[1:] if _OPENERS.match(fact.prompt) else fact.prompt
    return Question(
        kind="negation",
        prompt=f"It is not true that {prompt.replace('{}', fact.subject)}",
        answers=() if fact.target_true is None else (fact.target_true,),
        against=fact.target,
    )


_OPENERS = re.compile("(A|An|As|At|By|During|For|From|Her|His|In|Its|Of|On|Our|That|The|Their|This|To|Under|With) ")  # none is a name


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _find(what: str) -> Path:
    """The file that is meant; raises InputError."""
    try:
        path = Path(what).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError):  # the last for a user's home that is none
        raise InputError(f"{what[:80]!r} cannot be the name of a file; expected atlas, a file or a hub dataset") from None
    if is_file:
        return path
    if is_folder:
        raise InputError(f"{what!r} is a folder; expected one .json, .jsonl or .csv file in it")
    if what in _LAYOUTS:
        raise InputError(f"{what!r} is a layout, and its data is not bundled; download its file and give it as {what}:FILE")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[^:]+)?", what) and not what.startswith((".", "~")):
        return _download(what)
    raise InputError(f"no suite {what!r}: no file of this name; expected atlas, a .json, .jsonl or .csv file, or a hub dataset owner/name")


def _download(what: str) -> Path:
    """A file of a hub dataset, from the cache where it is there; raises InputError."""
    from huggingface_hub import HfApi, hf_hub_download

    owner, name, *inside = what.split("/", 2)
    try:
        if not inside:
            every = HfApi().list_repo_files(f"{owner}/{name}", repo_type="dataset")
            inside = [file for file in every if file.lower().endswith((".json", ".jsonl", ".csv"))]
            if len(inside) != 1:
                raise InputError(
                    f"dataset {what!r} has {len(inside)} .json, .jsonl and .csv files{': ' if inside else ''}{', '.join(inside[:12])}; "
                    f"name one as {what}/FILE, or download one and give its path"
                )
        return Path(hf_hub_download(f"{owner}/{name}", inside[0], repo_type="dataset"))
    except InputError:
        raise
    except Exception as error:  # hub, network and validation errors alike
        lines = str(error).splitlines() or [""]
        raise InputError(
            f"no file {what!r}, and no such hub dataset can be had ({type(error).__name__}: {lines[0]}); download the file where there is "
            "a network and give its path"
        ) from error


def _rows(what: str, suffix: str, content: bytes) -> list[Any]:
    """The records of a file as they stand; a line of JSON that is none comes as the error it makes. Raises InputError."""
    try:
        text = content.decode("utf-8-sig")
        if suffix == ".csv":
            rows: Any = list(csv.DictReader(io.StringIO(text), strict=True))
        elif suffix == ".jsonl":
            rows = _lines(text)
        else:
            try:
                rows = json.loads(text)
            except ValueError:
                rows = _lines(text)
                if not rows or isinstance(rows[0], Exception):  # no file of lines either: say what is wrong with the whole
                    raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{what} cannot be read as {suffix.lstrip('.') or 'JSON'}: {error}; expected a list of records") from None
    if not isinstance(rows, list) or not rows:
        shape = f"a {type(rows).__name__}" if not isinstance(rows, list) else "empty"
        raise InputError(f"{what} is no suite: it is {shape}; expected a list of at least one record")
    return rows


def _lines(text: str) -> list[Any]:
    rows: list[Any] = []
    for line in text.split("\n"):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                rows.append(error)
    return rows


def _layout(what: str, rows: Sequence[Any], kind: str | None) -> _Layout:
    """The layout named, or the one that most of the first records are of; raises InputError."""
    first = [set(row) for row in rows[:200] if isinstance(row, Mapping)]
    fitting = {name: sum(layout.fields <= keys for keys in first) for name, layout in _LAYOUTS.items() if name != "zsre-rome"}
    best = max(fitting, key=lambda name: (fitting[name], len(_LAYOUTS[name].fields)))
    # Records that lack a field may be of a layout with fewer: what the others are of is meant.
    finer = [name for name in fitting if _LAYOUTS[name].fields > _LAYOUTS[best].fields and 2 * fitting[name] > fitting[best]]
    best = max(finer, key=lambda name: fitting[name], default=best)
    if kind is not None and any(_LAYOUTS[kind].fields <= keys for keys in first):
        return _LAYOUTS[kind]
    if kind is None and fitting[best]:
        return _LAYOUTS[best]
    found = ", ".join(sorted(map(str, first[0]))[:12]) if first else "no record of named fields"
    if kind is not None:
        like = f"; it looks like {best}" if fitting[best] else ""
        raise InputError(
            f"{what} is not of the layout {kind}: expected the fields {', '.join(sorted(_LAYOUTS[kind].fields))}; got {found}{like}"
        )
    wanted = "; ".join(f"{name}: {', '.join(sorted(layout.fields))}" for name, layout in _LAYOUTS.items() if name in fitting)
    raise InputError(f"{what} is of no layout that is known: its records have {found}; looked for {wanted}")


def _read(
    what: str, rows: Sequence[Any], layout: _Layout, fatal: bool, limit: int | None, seed: int
) -> tuple[tuple[Record, ...], tuple[Malformed, ...]]:
    """Usable records, all or a sample, in the file's order, and what was not usable."""
    order = list(range(len(rows)))
    if limit is not None:
        random.Random(seed).shuffle(order)
    found: dict[int, Record] = {}
    skipped: list[Malformed] = []
    for index in order:
        if len(found) == limit and not fatal:
            break
        dropped: list[_Refused] = []
        record: Record | None = None
        try:
            if isinstance(rows[index], Exception):
                raise _Refused("", f"is no JSON: {rows[index]}")
            record = layout.read(_Row(rows[index], dropped=dropped), index)
        except _Refused as refused:
            dropped = [refused]
        if record is not None and len(found) != limit:
            found[index] = record
        skipped += [Malformed(what, index, each.field, each.message, whole=record is None) for each in dropped]
    skipped.sort(key=lambda each: each.index)
    if fatal and skipped:
        raise InputError(f"{skipped[0]}; correct it, or let such records be left out (malformed='skip'; no --strict)")
    if not found:
        raise InputError(f"{what} has no usable record of the layout {layout.name}; the first of {len(skipped)} errors: {skipped[0]}")
    ids = Counter(record.id for record in found.values())
    unique = {at: record if ids[record.id] == 1 else replace(record, id=f"{record.id}#{at}") for at, record in sorted(found.items())}
    return tuple(unique.values()), tuple(skipped)


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """A field that cannot be used."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field, self.message = field, message


class _Row:
    """The fields of a record, checked as they are read; `dropped` collects questions that cannot be used though the record can."""

    def __init__(self, fields: Any, path: str = "", *, dropped: list[_Refused]) -> None:
        if not isinstance(fields, Mapping):
            raise _Refused(path, f"is {_shown(fields)}; expected fields with names")
        self.fields, self.path, self.dropped = fields, path, dropped

    def at(self, name: str) -> str:
        """The whole name of a field."""
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Whether a field is there and holds something (None, NaN, and blank text are how tables write nothing)."""
        value = self.fields.get(name)
        return not (value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip()))

    def text(self, name: str) -> str:
        """A text that is not blank."""
        if not self.has(name):
            raise _Refused(self.at(name), f"is {'empty' if name in self.fields else 'missing'}; expected text")
        return _as_text(self.fields[name], self.at(name))

    def optional(self, name: str) -> str | None:
        """The same, or None where there is nothing."""
        return self.text(name) if self.has(name) else None

    def texts(self, name: str) -> tuple[str, ...]:
        """All the texts of a list, or a list of lists, that are not blank; a text alone is one; nothing is none."""
        if not self.has(name):
            return ()
        value = self.fields[name]
        if not isinstance(value, (list, str)):
            raise _Refused(self.at(name), f"is {_shown(value)}; expected text or a list of texts")
        return tuple(dict.fromkeys(_flat(value, self.at(name))))

    def wanted(self, name: str, otherwise: str = "these questions are left out") -> tuple[str, ...]:
        """The texts of a field that every record of the layout has; a note in `dropped` where it is missing or has nothing in it."""
        value = self.fields.get(name)
        blank = isinstance(value, list) and any(each is None or (isinstance(each, str) and not each.strip()) for each in value)
        found = self.texts(name)
        if blank or not found:
            state = "has a blank text" if blank else "is empty" if name in self.fields else "is missing"
            self.dropped.append(_Refused(self.at(name), f"{state}; expected text, so {otherwise}"))
        return found

    def row(self, name: str) -> _Row:
        """Fields inside a field."""
        if not self.has(name):
            raise _Refused(self.at(name), "is missing; expected fields with names")
        return _Row(self.fields[name], self.at(name), dropped=self.dropped)

    def rows(self, name: str) -> list[_Row]:
        """A list of these, or one; nothing is none."""
        value = self.fields.get(name) if self.has(name) else []
        if isinstance(value, Mapping):
            return [self.row(name)]
        if not isinstance(value, list):
            raise _Refused(self.at(name), f"is {_shown(value)}; expected a list")
        return [_Row(each, f"{self.at(name)}.{at}", dropped=self.dropped) for at, each in enumerate(value)]

    def id(self, index: int, *names: str) -> str:
        """The record's own number or name, else its place in the file."""
        own = [self.fields[name] for name in names if self.has(name)]
        if not all(isinstance(each, (str, int)) and not isinstance(each, bool) for each in own):
            raise _Refused(self.at(names[0]), f"is {_shown(own[0])}; expected a number or text")
        return "-".join(map(str, own)) or str(index)

    def fact(self, subject: str, prompt: str, target: str | None, true: str | None, relation: str | None, field: str) -> Fact:
        """A fact; an old object that is the new one as well says nothing and is left out only where the caller does so."""
        if prompt.count("{}") != 1:
            raise _Refused(
                self.at(field), f"has {prompt.count('{}')} slots in {_shown(prompt)}; expected one `{{}}`, where the subject goes"
            )
        try:
            return Fact(subject, prompt, target, target_true=true, relation=relation)
        except FactError as error:
            raise _Refused(self.at(field), f"makes no fact: {error}") from None

    def told(self, field: str, subject: str) -> tuple[str, str]:
        """(template, subject as it stands there) of a prompt that names its subject: where it does so last, if more than once."""
        prompt = self.text(field)
        if "{}" in prompt:
            raise _Refused(self.at(field), f"holds {{}} in {_shown(prompt)}; expected the subject itself")
        whole = rf"(?<!\w){re.escape(subject)}(?!\w)"
        for pattern, flags in ((whole, 0), (re.escape(subject), 0), (whole, re.IGNORECASE)):
            if found := list(re.finditer(pattern, prompt, flags)):
                start, stop = found[-1].span()
                return f"{prompt[:start]}{{}}{prompt[stop:]}", prompt[start:stop]
        raise _Refused(self.at(field), f"{_shown(prompt)} does not name the subject {_shown(subject)}; expected it there")

    def ask(self, kind: Kind, field: str, prompt: str, answers: Sequence[str], against: str | None = None) -> list[Question]:
        """The question, or nothing and a note in `dropped` where it has no answer but needs one."""
        try:
            return [Question(kind=kind, prompt=prompt, answers=tuple(dict.fromkeys(answers)), against=against)]
        except InputError as error:
            self.dropped.append(_Refused(self.at(field), f"is no question and is left out: {error}"))
            return []


def _as_text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise _Refused(field, f"is {_shown(value)}; expected text")
    if len(value) > _MOST:
        raise _Refused(field, f"has {len(value):,} characters; expected at most {_MOST:,}")
    try:
        check_text(value, "it")
    except InputError as error:
        raise _Refused(field, f"cannot be used: {error}") from None
    return value.strip()


def _flat(value: object, field: str, depth: int = 0) -> Iterator[str]:
    """The texts of a list, or of a list of lists of them, but the blank ones."""
    if isinstance(value, list) and depth < 3:
        for at, each in enumerate(value):
            yield from _flat(each, f"{field}.{at}", depth + 1)
    elif text := _as_text(value, field):
        yield text


def _shown(value: object) -> str:
    """A value in a message; of what holds others only its type, since a file may nest them without end."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    return f"a {type(value).__name__}" if isinstance(value, (Mapping, list)) else repr(value)


# ── layouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Layout(NamedTuple):
    """How a benchmark writes its records: the fields by which it is recognised, and how one is read."""

    name: str
    fields: frozenset[str]
    read: Callable[[_Row, int], Record]


def _written(row: _Row, fact: Fact, *, aliases: Sequence[str] = (), compared: bool = True) -> list[Question]:
    """The questions every fact has: its prompt, and its negation."""
    assert fact.target is not None
    asked = row.ask("prompt", "prompt", fact.text, (fact.target, *aliases), fact.target_true if compared else None)
    denied = negation(fact)
    return asked + ([] if denied is None else [denied])


def _counterfact(row: _Row, index: int) -> Record:
    rewrite = row.row("requested_rewrite")
    new, true = rewrite.row("target_new").text("str"), rewrite.row("target_true").text("str")
    subject, prompt = rewrite.text("subject"), rewrite.text("prompt")
    fact = rewrite.fact(subject, prompt, new, true, rewrite.optional("relation_id"), "prompt")
    asked = _written(row, fact)
    for text in row.wanted("paraphrase_prompts"):
        asked += row.ask("paraphrase", "paraphrase_prompts", text, (new,), true)
    for text in row.wanted("neighborhood_prompts"):
        asked += row.ask("neighbour", "neighborhood_prompts", text, (true,), new)
    if alias := row.optional("alternative_subject"):
        asked += row.ask("aliasing", "alternative_subject", prompt.replace("{}", alias), (new,), true)
    if row.has("portability"):
        further = row.row("portability")
        asked += further.ask("reasoning", "New Question", further.text("New Question"), (further.text("New Answer"),))
    return Record(id=row.id(index, "case_id"), facts=(fact,), questions=tuple(asked), generation_prompts=row.texts("generation_prompts"))


def _slim(row: _Row, index: int) -> Record:
    fact = _named(row, "prompt", "target_new", row.texts("ground_truth"))
    asked = _written(row, fact)
    assert fact.target is not None
    for text in row.wanted("rephrase_prompt"):
        asked += row.ask("paraphrase", "rephrase_prompt", text, (fact.target,), fact.target_true)
    for text in row.wanted("locality_prompt"):
        asked += row.ask("neighbour", "locality_prompt", text, row.texts("locality_ground_truth"), fact.target)
    return Record(id=row.id(index, "case_id"), facts=(fact,), questions=tuple(asked))


def _zsre(row: _Row, index: int, *, rome: bool) -> Record:
    true = row.wanted("answers", "no old object is known")
    template, subject = row.told("src", row.text("subject"))
    if rome:
        if not true:
            raise _Refused(row.at("answers"), "is empty; expected the true answer, which is written")
        new, old = true[0], None
    else:
        new = row.text("alt")
        old = true[0] if true and new not in true else None
    fact = row.fact(subject, template, new, old, None, "src")
    asked = _written(row, fact, aliases=true[1:] if rome else (), compared=False)
    for text in row.wanted("rephrase"):
        asked += row.ask("paraphrase", "rephrase", text, (new,))
    for text in row.wanted("loc"):
        asked += row.ask("locality", "loc", text if text.endswith("?") else f"{text}?", row.texts("loc_ans"))
    if row.has("portability") and not rome:
        further = row.row("portability")
        asked += further.ask("reasoning", "New Question", further.text("New Question"), (further.text("New Answer"),))
    return Record(id=row.id(index, "case_id"), facts=(fact,), questions=tuple(asked))


def _mquake(row: _Row, index: int) -> Record:
    hops = [(hop.text("question"), (hop.text("answer"), *hop.texts("answer_alias"))) for hop in row.rows("new_single_hops")]
    aliases = dict(hops)
    facts, asked, written = [], [], set()
    for rewrite in row.rows("requested_rewrite"):
        new, true = rewrite.row("target_new").text("str"), rewrite.row("target_true").text("str")
        fact = rewrite.fact(rewrite.text("subject"), rewrite.text("prompt"), new, true, rewrite.optional("relation_id"), "prompt")
        facts.append(fact)
        question = rewrite.optional("question")
        others = aliases.get(question or "", ())
        asked += _written(rewrite, fact, aliases=others)
        if question is not None:
            written.add(question)
            asked += rewrite.ask("paraphrase", "question", question, (new, *others), true)
    if not facts:
        raise _Refused(row.at("requested_rewrite"), "is empty; expected at least one fact to write")
    answers = (row.text("new_answer"), *row.texts("new_answer_alias"))
    before = row.optional("answer")
    for text in row.wanted("questions"):
        multi = row.ask("multihop", "questions", text, answers, before if before not in answers else None)
        asked += [replace(question, group=0) for question in multi]
    for question, stays in hops:
        if question not in written:
            asked += row.ask("locality", "new_single_hops", question, stays)
    return Record(id=row.id(index, "case_id"), facts=tuple(facts), questions=tuple(asked))


_ABILITIES: dict[str, Kind] = {
    "Reasoning": "reasoning",
    "reasoning": "reasoning",
    "Subject_Aliasing": "aliasing",
    "Logical_Generalization": "relation",
    "Relation_Specificity": "locality",
    "Forgetfulness": "locality",
}


def _knowedit(row: _Row, index: int) -> Record:
    fact = _named(row, "prompt", "target_new", row.texts("ground_truth"))
    assert fact.target is not None
    asked = _written(row, fact)
    for text in row.texts("rephrase") or row.texts("rephrase_prompt"):
        asked += row.ask("paraphrase", "rephrase", text, (fact.target,), fact.target_true)
    for part, otherwise in (("portability", "reasoning"), ("locality", "locality")):
        abilities = row.row(part) if row.has(part) else _Row({}, dropped=row.dropped)
        for ability in abilities.fields:
            kind: Kind = _ABILITIES.get(str(ability), otherwise)  # type: ignore[arg-type]
            for each in abilities.rows(ability):
                old = fact.target_true if kind == "aliasing" else None
                asked += each.ask(kind, "ground_truth", each.text("prompt"), each.texts("ground_truth"), old)
    prompts = row.texts("generate_prompt")
    return Record(id=row.id(index, "case_id"), facts=(fact,), questions=tuple(asked), generation_prompts=prompts)


def _known(row: _Row, index: int) -> Record:
    template, subject = row.told("prompt", row.text("subject"))
    true = row.text("attribute")
    fact = row.fact(subject, template, None, true, row.optional("relation_id"), "prompt")
    asked = row.ask("prompt", "prompt", fact.text, (true,))
    return Record(id=row.id(index, "known_id"), facts=(fact,), questions=tuple(asked))


def _wikibigedit(row: _Row, index: int) -> Record:
    fact = _named(row, "update", "ans", (), relation=row.optional("relation"))
    assert fact.target is not None
    asked = _written(row, fact)
    for field, texts in (("rephrase", row.wanted("rephrase")), ("personas", row.texts("personas"))):
        for text in texts:
            asked += row.ask("paraphrase", field, text, (fact.target,))
    if row.has("mhop"):
        asked += row.ask("multihop", "mhop", row.text("mhop"), row.texts("mhop_ans"))
    if row.has("loc"):
        asked += row.ask("locality", "loc", row.text("loc"), row.texts("loc_ans"))
    return Record(id=row.id(index, "case_id", "id"), facts=(fact,), questions=tuple(asked))


def _qaedit(row: _Row, index: int) -> Record:
    fact = _named(row, "prompt", "target", ())
    assert fact.target is not None
    asked = _written(row, fact)
    for text in row.wanted("rephrase"):
        asked += row.ask("paraphrase", "rephrase", text, (fact.target,))
    for each in row.rows("locality"):
        asked += each.ask("locality", "loc", each.text("loc"), each.texts("loc_ans"))
    return Record(id=row.id(index, "source", "id"), facts=(fact,), questions=tuple(asked))


def _named(row: _Row, prompt: str, target: str, true: Sequence[str], *, relation: str | None = None) -> Fact:
    """The fact of a layout whose prompt names its subject."""
    template, subject = row.told(prompt, row.text("subject"))
    return row.fact(subject, template, row.text(target), true[0] if true else None, relation, prompt)


_LAYOUTS = {
    name: _Layout(name, frozenset(fields.split()), read)
    for name, fields, read in (
        ("counterfact", "requested_rewrite paraphrase_prompts neighborhood_prompts", _counterfact),
        ("counterfact-slim", "subject prompt target_new rephrase_prompt locality_prompt", _slim),
        ("zsre", "subject src alt answers", partial(_zsre, rome=False)),
        ("zsre-rome", "subject src alt answers", partial(_zsre, rome=True)),
        ("mquake", "requested_rewrite questions new_answer", _mquake),
        ("knowedit", "subject prompt target_new", _knowedit),
        ("known", "subject attribute prompt", _known),
        ("wikibigedit", "subject update ans", _wikibigedit),
        ("qaedit", "subject prompt target rephrase", _qaedit),
    )
}


# ── made from the bundled facts ─────────────────────────────────────────────────────────────────────────────────────────

_NEIGHBOURS, _SAME_SUBJECT, _GENERATED, _REFERENCES, _CHAINS = 10, 3, 3, 5, 2  # at most so many a record

_COUNTRY = {
    "P17": "the country in which {} lies",
    "P27": "the country of which {} is a citizen",
    "P495": "the country from which {} comes",
}
"""Relations whose objects are countries, as a name for the object: the first hop."""

_OF_COUNTRY = {
    "P36": ("The capital of {} is", "The name of the capital of {} is", "Q: What is the capital of {}? A:"),
    "P37": ("The official language of {} is", "The state language of {} is", "Q: What is the official language of {}? A:"),
    "P30": ("The continent of {} is", "The continent that holds {} is", "Q: What is the continent of {}? A:"),
    "P38": ("The currency of {} is the", "The money used in {} is the", "Q: What is the currency of {}? A: the"),
}
"""What is asked of a country in a second hop, three ways each."""

_BOUND = (
    frozenset(["P17", "P27", "P30", "P36", "P37", "P38", "P131", "P138", "P159", "P190", "P276", "P495", "P740"]),
    frozenset(["P103", "P1412", "P27", "P19"]),
    frozenset(["P364", "P407", "P495"]),
    frozenset(["P39", "P101", "P106", "P108", "P136", "P413", "P641", "P1303", "P937"]),
    frozenset(["P127", "P176", "P178", "P449"]),
)
"""Relations of which one may follow from another: an edit of one is no reason for the others to stay."""


@cache
def _by_relation() -> dict[str, tuple[atlas.AtlasFact, ...]]:
    groups: dict[str, list[atlas.AtlasFact]] = {}
    for fact in atlas.facts():
        groups.setdefault(fact.relation, []).append(fact)
    return {relation: tuple(group) for relation, group in groups.items()}


@cache
def _sharing() -> dict[tuple[str, str], tuple[atlas.AtlasFact, ...]]:
    """Facts by (relation, object)."""
    groups: dict[tuple[str, str], list[atlas.AtlasFact]] = {}
    for fact in atlas.facts():
        groups.setdefault((fact.relation, fact.object), []).append(fact)
    return {key: tuple(group) for key, group in groups.items()}


@cache
def _own_phrasings() -> dict[str, tuple[str, ...]]:
    """The trained phrasings of a relation that no other relation has: "{} lies in" asks for more than one thing."""
    used = Counter(template for relation in atlas.relations() for template in set(atlas.phrasings(relation).every))
    return {
        relation: tuple(t for t in atlas.phrasings(relation).trained if used[t] == 1) or atlas.phrasings(relation).trained
        for relation in atlas.relations()
    }


def _atlas(limit: int | None, seed: int) -> Suite:
    """The bundled suite: counterfactual edits of facts whose held-out phrasings the models were never told.

    A record's new object is another object of its relation (of those with something further known of them, where a chain can be asked). Its
    neighbours are facts of the same relation, first those with the same object, as COUNTERFACT's all are; locality is asked of the
    subject's facts in relations that the edit has no bearing on. A two-hop question joins the edit and one bundled fact: an edited country
    with what is known of the new one, or what is edited of a country with someone or something of that country. A record is the same
    whatever the limit.
    """
    told = [fact for fact in atlas.facts() if atlas.is_held_out(fact.subject) and len(_objects(fact.relation)) > 1]
    chosen = range(len(told)) if limit is None else sorted(random.Random(seed).sample(range(len(told)), min(limit, len(told))))
    digest = hashlib.sha256("\n".join(f"{f.subject}\t{f.relation}\t{f.object}" for f in atlas.facts()).encode())
    for relation in atlas.relations():
        digest.update("\n".join((relation, *atlas.phrasings(relation).every)).encode())
    records = tuple(_atlas_record(told[at], seed) for at in chosen)
    return Suite(name="atlas", records=records, skipped=(), source="bundled", digest=digest.hexdigest())


@cache
def _objects(relation: str) -> tuple[str, ...]:
    """The objects of a relation; where that is a country, those of which something further is known."""
    objects = dict.fromkeys(fact.object for fact in _by_relation()[relation])
    if relation in _COUNTRY:
        objects = dict.fromkeys(each for each in objects if any(fact.relation in _OF_COUNTRY for fact in atlas.facts_about(each)))
    return tuple(objects)


def _atlas_record(fact: atlas.AtlasFact, seed: int) -> Record:
    draw = random.Random(f"{seed} {fact.subject} {fact.relation}")
    new = draw.choice([each for each in _objects(fact.relation) if each != fact.object])
    prompt, *others = _own_phrasings()[fact.relation]
    edit = Fact(fact.subject, prompt, new, target_true=fact.object, relation=fact.relation)
    asked = [Question(kind="prompt", prompt=edit.text, answers=(new,), against=fact.object)]
    for template in atlas.phrasings(fact.relation).held_out:
        asked.append(Question(kind="paraphrase", prompt=template.replace("{}", fact.subject), answers=(new,), against=fact.object))
    for other in _neighbours(fact, new, draw):
        asked.append(Question(kind="neighbour", prompt=_put(other, draw), answers=(other.object,), against=new))
    bound = {fact.relation}.union(*(group for group in _BOUND if fact.relation in group))
    free = [other for other in atlas.facts_about(fact.subject) if other.relation not in bound]
    for other in free[:_SAME_SUBJECT]:
        asked.append(Question(kind="locality", prompt=_put(other, draw), answers=(other.object,)))
    asked += _two_hops(fact, new, draw)
    denied = negation(edit)
    alike = [other for other in _sharing()[fact.relation, new] if other.subject != fact.subject]
    return Record(
        id=f"{fact.relation} {fact.subject}",
        facts=(edit,),
        questions=(*asked, *([] if denied is None else [denied])),
        generation_prompts=tuple(t.replace("{}", fact.subject) for t in draw.sample(others, min(_GENERATED, len(others)))),
        references=tuple(f"{_put(other, draw)} {other.object}." for other in draw.sample(alike, min(_REFERENCES, len(alike)))),
    )


def _put(fact: atlas.AtlasFact, draw: random.Random) -> str:
    """A prompt that asks for a bundled fact."""
    return draw.choice(_own_phrasings()[fact.relation]).replace("{}", fact.subject)


def _neighbours(fact: atlas.AtlasFact, new: str, draw: random.Random) -> list[atlas.AtlasFact]:
    """Facts of the relation about others, those with the same object first; none whose object is the new one."""
    same = [other for other in _sharing()[fact.relation, fact.object] if other.subject != fact.subject]
    if len(same) >= _NEIGHBOURS:
        return draw.sample(same, _NEIGHBOURS)
    rest = [other for other in _by_relation()[fact.relation] if other.object not in (fact.object, new)]
    return same + draw.sample(rest, min(_NEIGHBOURS - len(same), len(rest)))


def _two_hops(fact: atlas.AtlasFact, new: str, draw: random.Random) -> list[Question]:
    """Questions whose answer follows from the edit and one bundled fact, and is not what was so before; three ways to ask each."""
    cases: list[tuple[str, str, str, str | None]] = []  # (the country in words, what is asked of it, the answer now, the answer before)
    if fact.relation in _COUNTRY:
        old = {other.relation: other.object for other in atlas.facts_about(fact.object)}
        for other in atlas.facts_about(new):
            if other.relation in _OF_COUNTRY and other.object != old.get(other.relation):
                country = _COUNTRY[fact.relation].replace("{}", fact.subject)
                cases.append((country, other.relation, other.object, old.get(other.relation)))
    elif fact.relation in _OF_COUNTRY:
        for relation, words in _COUNTRY.items():
            if inside := _sharing().get((relation, fact.subject)):
                cases.append((words.replace("{}", draw.choice(inside).subject), fact.relation, new, fact.object))
    return [
        Question(kind="multihop", prompt=template.replace("{}", country), answers=(answer,), against=before, group=group)
        for group, (country, relation, answer, before) in enumerate(draw.sample(cases, min(_CHAINS, len(cases))))
        for template in _OF_COUNTRY[relation]
    ]
