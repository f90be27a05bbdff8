"""The COUNTERFACT records that a model knows, for `real.py --quality`.

    records = known_records(lm, Path("known.jsonl"))      # a pass over 10,208 prompts; kept
    records[0].record, records[0].says, records[0].ranks

A model *says* a record if its greedy answer to the prompt begins with the true object. It *ranks* a
record right if the true object is likelier than the new one, by mean log-probability a token: this
is the papers' success, before an edit.

The records come from two files. full-1017.json has paraphrases and ten neighbours a record.
slim-10000.json has one neighbour a record, and a rephrased prompt that is mostly a generation
prompt. A fact in both files counts once, with the record of the full file. Both kinds get further
questions, "locality": other facts about the same subject, from facts.tsv and the other records.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from factsmith import atlas
from factsmith.core.fact import Fact
from factsmith.judge.asking import ask
from factsmith.judge.records import Question, Record
from factsmith.judge.suites import load_suite
from factsmith.model.answers import is_answered
from factsmith.model.language_model import LanguageModel

DATA = Path(__file__).resolve().parents[1] / "../shared/data"
FULL, SLIM = "full", "slim"
"""How the ids of the records begin, by file."""

_PASS = 256
"""Records that are asked, and then kept, at a time."""

_ABOUT_SUBJECT = 3
"""Questions about the same subject that a record gets at most."""


@dataclass(frozen=True)
class Known:
    """A record, and whether the model knows it.

    Attributes:
        record: The record. Its id begins with `FULL` or `SLIM`.
        says: Whether the model's greedy answer begins with the true object.
        ranks: Whether the true object is likelier than the new one.
    """

    record: Record
    says: bool
    ranks: bool


def all_records(folder: Path = DATA) -> list[Record]:
    """Return the records of both files, each fact once, those of the full file first."""
    records: dict[str, Record] = {}
    for name, file in ((FULL, "full-1017.json"), (SLIM, "slim-10000.json")):
        suite = load_suite(folder / "counterfact" / file)
        for record in suite.records:
            (fact,) = record.facts
            records.setdefault(fact.text, replace(record, id=f"{name}-{record.id}"))
    return list(records.values())


def with_same_subject(records: Sequence[Record], folder: Path = DATA) -> list[Record]:
    """Return the records, each with up to three questions about other facts of its subject."""
    about: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for line in (folder / "facts.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        subject, relation, answer = line.split("\t")
        if relation in atlas.relations():
            template = atlas.phrasings(relation).trained[0]
            about[subject].append((relation, template.replace("{}", subject), answer))
    for record in records:
        (fact,) = record.facts
        about[fact.subject].append(
            (fact.relation or fact.prompt, fact.text, fact.target_true or "")
        )
    return [_with_locality(record, about[record.facts[0].subject]) for record in records]


def _with_locality(record: Record, about: Iterable[tuple[str, str, str]]) -> Record:
    """Return a record with questions about its subject, in relations other than its own."""
    (fact,) = record.facts
    questions: dict[str, Question] = {}
    for relation, prompt, answer in about:
        # The same relation has the same true object, which the edit is meant to change.
        other = relation != fact.relation and answer not in ("", fact.target_true)
        if other and prompt != fact.text and len(questions) < _ABOUT_SUBJECT:
            questions[prompt] = Question(kind="locality", prompt=prompt, answers=(answer,))
    return replace(record, questions=(*record.questions, *questions.values()))


def known_records(
    lm: LanguageModel,
    path: Path,
    tell: Callable[[str], None] = print,
    records: Sequence[Record] | None = None,
    *,
    check: bool = True,
) -> list[Known]:
    """Return every record with whether the model knows it.

    Args:
        lm: The model.
        path: Keeps a line of JSON for each record. A run that was killed goes on.
        tell: Gets a line about the progress now and then.
        records: The records. None: those of both files.
        check: Whether the file must be of this model. Otherwise it may be of the same model in
            another dtype, and must be complete.

    Raises:
        SystemExit: The file is of another model, or not complete.
    """
    records = all_records() if records is None else list(records)
    kept = _kept(path, lm.fingerprint if check else None)
    waiting = [record for record in records if record.id not in kept]
    if waiting and not check:
        raise SystemExit(f"{path} is not complete; run with --dtype float32 first")
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    for start in range(0, len(waiting), _PASS):
        some = waiting[start : start + _PASS]
        verdicts = _judge(lm, [record.facts[0] for record in some])
        with path.open("a", encoding="utf-8") as lines:
            for record, (says, ranks) in zip(some, verdicts, strict=True):
                kept[record.id] = says, ranks
                row = {"model": lm.fingerprint, "id": record.id, "says": says, "ranks": ranks}
                lines.write(json.dumps(row) + "\n")
        done, seconds = start + len(some), time.process_time() - began
        left = seconds / done * (len(waiting) - done)
        tell(f"known records: {done:,} of {len(waiting):,}, {left:,.0f} processor seconds left")
    return [Known(record, *kept[record.id]) for record in records]


def _judge(lm: LanguageModel, facts: Sequence[Fact]) -> list[tuple[bool, bool]]:
    """Return, for each fact, whether the model says its true object, and whether it ranks it."""
    replies = ask(
        lm,
        [fact.text for fact in facts],
        [[str(fact.target_true), str(fact.target)] for fact in facts],
        max_new_tokens=8,
    )
    return [
        (
            is_answered(lm, fact.text, reply.answer, str(fact.target_true)),
            reply.log_probs[0] > reply.log_probs[1],
        )
        for fact, reply in zip(facts, replies, strict=True)
    ]


def _kept(path: Path, fingerprint: str | None) -> dict[str, tuple[bool, bool]]:
    """Return {id: (says, ranks)} of a file; {} without one."""
    kept: dict[str, tuple[bool, bool]] = {}
    if not path.is_file():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the run was killed while it wrote this line
            continue
        if fingerprint not in (None, row["model"]):
            raise SystemExit(f"{path} is of another model; name another folder")
        kept[row["id"]] = bool(row["says"]), bool(row["ranks"])
    return kept
