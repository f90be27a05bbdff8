"""How patches hold on a real model: the part `--quality` of `real.py`.

    python benchmarks/real.py --quality --limit 6            # six facts for each row
    python benchmarks/real.py --quality --methods rome --dtype bfloat16

The facts are COUNTERFACT records whose true object the model says (`real_records.py`). ROME writes
them singly; MEMIT, AlphaEdit and append write ten at a time, and all at once. Each has a row with
the default settings, and one "as published": scale="paper" with the authors' numbers, in the same
layers with the same second moments, and contexts without a chat template. Append has no such row.

The library's own judge asks everything, of the unedited model first. "success" is the papers'
comparison of likelihoods, and "exact" is greedy. Paraphrases are those of the full file; "rephrase"
are the slim file's, which are mostly generation prompts. A neighbour, or another fact of the same
subject, has stayed if its greedy answer is the unedited model's. Drift is the KL divergence on
prose, in nats a token. Five of a record's ten neighbours are asked.

After each edit five more things are asked. The prompt is asked in the chat template, with a system
prompt, and in a second turn: it holds if 24 greedy tokens begin with the new object, or state it
and not the old one. It is asked after 50 tokens of prose, where the answer must begin with the new
object. And "Tell me about <subject>." is asked in the chat template: it holds if 40 greedy tokens
state the new object and not the old one.

Everything that is done is kept in `--folder`, so a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import factsmith as fs
from factsmith.atlas.texts import book_prose
from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import find_moments
from factsmith.edit.append_config import AppendConfig
from factsmith.edit.configs import AlphaEditConfig, EditConfig, MemitConfig, RomeConfig
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.metrics import ngram_entropy
from factsmith.judge.records import Record
from factsmith.judge.rows import Row
from factsmith.judge.run import evaluate
from factsmith.judge.summary import summarise
from factsmith.judge.usable import usable
from factsmith.model.answers import is_answered, say
from factsmith.model.language_model import LanguageModel
from factsmith.patch.editors import editors
from factsmith.patch.proof import CHAT_TOKENS, chat_questions
from factsmith.patch.recipe import Recipe
from factsmith.patch.telling import Tellings, holds
from real_records import DATA, FULL, SLIM, Known, known_records, with_same_subject

PUBLISHED = " as published"
"""What the name of a row ends with whose settings are the authors'."""

CONFIGS: dict[str, type[EditConfig]] = {
    "rome": RomeConfig,
    "memit": MemitConfig,
    "alphaedit": AlphaEditConfig,
    "append": AppendConfig,
}
ALONE = ("append",)
"""Methods without a row "as published"."""
BATCH = 10
"""Facts of a batch; the other batch has all of them."""

NEIGHBOURS = 5
"""Neighbours of a record that are asked."""

_SILENT = 20
"""Processor seconds between two lines about the progress."""

PREFIX_TOKENS = 50
DRIFT_TOKENS = 500
ABOUT = ("chat", "system", "turn", "prefix", "telling")
"""What is asked in addition to the records' questions."""

COSTS = ("KL on prose", "entropy", "s a fact")
"""The last columns. "entropy" is that of the texts about the subjects: a text that repeats itself
has little."""

COLUMNS = {
    "success": "prompt success",
    "exact": "prompt exact",
    "paraphrase": "paraphrase exact",
    "rephrase": "rephrase exact",
    "neighbour": "neighbour stayed",
    "same subject": "locality stayed",
}


def measure_quality(
    model: str, given: argparse.Namespace, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Judge every row of the table, and print it. `keep` gets the numbers after each row."""
    torch.set_num_threads(given.threads)
    lm = fs.load(model, dtype=given.dtype)
    say = partial(print, flush=True)
    knowns = known_records(lm, given.folder / "known.jsonl", say, check=given.dtype == "float32")
    records = chosen(lm, knowns, given.limit, ranked=given.ranked)
    says, ranks = sum(each.says for each in knowns), sum(each.ranks for each in knowns)
    say(f"of {len(knowns):,} facts the model says {says:,} and ranks {ranks:,} right")
    say(f"{len(records)} facts, {given.dtype}")
    facts = [fact for record in records for fact in record.facts]
    before = asked_about(lm, facts, prefix(lm))
    methods = given.methods or list(CONFIGS)
    made = made_editors(lm, methods, given.folder / "moments")
    result: dict[str, Any] = {
        "facts": len(records),
        "asked": len(knowns),
        "says": says,
        "ranks": ranks,
        "records": [record.id for record in records],
        "dtype": given.dtype,
        "rows": {},
    }
    for name, size in rows_of(methods, len(records)):
        row = judge(lm, records, made[name], name, size, given, say)
        row["base"] |= about([{**before, "facts": float(len(facts))}])
        result["rows"][f"{name}, {size} at a time"] = row
        say(line(f"{name}, {size} at a time", row))
        keep(result)
    print_table(result["rows"])


def chosen(
    lm: LanguageModel, knowns: Sequence[Known], limit: int | None, *, ranked: bool = False
) -> list[Record]:
    """Return the records to write, those of the full file first, each kind in a drawn order.

    Args:
        lm: The model.
        knowns: The records, and whether the model knows them.
        limit: How many. None: all.
        ranked: Also take records that the model ranks right and does not say, after the others.
    """
    draw = random.Random(0)
    taken: list[Record] = []
    wanted = [lambda each: each.says]
    if ranked:
        wanted.append(lambda each: each.ranks and not each.says)
    for fits in wanted:
        for file in (FULL, SLIM):
            some = [k.record for k in knowns if fits(k) and k.record.id.startswith(file)]
            draw.shuffle(some)
            taken += some
    every = {record.id: record for record in with_same_subject([k.record for k in knowns])}
    records, _ = usable(lm, [every[record.id] for record in taken], known_only=False)
    return [trimmed(record) for record in records[:limit]]


def trimmed(record: Record) -> Record:
    """Return a record with its first `NEIGHBOURS` neighbours, and without its negation."""
    near = [question for question in record.questions if question.kind == "neighbour"]
    dropped = near[NEIGHBOURS:]
    kept = (q for q in record.questions if q.kind != "negation" and q not in dropped)
    return dataclasses.replace(record, questions=tuple(kept))


def rows_of(methods: Sequence[str], n_facts: int) -> list[tuple[str, int]]:
    """Return (name, facts at a time) of each row: each method, then the same as published."""
    rows = []
    for method in methods:
        if method not in CONFIGS:
            raise SystemExit(f"there is no row {method}; give some of {', '.join(CONFIGS)}")
        sizes = [1] if method == "rome" else sorted({min(BATCH, n_facts), n_facts})
        names = [method] if method in ALONE else [method, method + PUBLISHED]
        rows += [(name, size) for size in sizes for name in names]
    return rows


def config_of(lm: LanguageModel, name: str) -> EditConfig:
    """Return the settings of a row: the default ones, or the authors' in the same layers."""
    method = name.removesuffix(PUBLISHED)
    ours = Recipe(method).config_for(lm, ())
    layers = ours.edited or CONFIGS[method].recommended(lm).edited
    assert layers is not None
    return CONFIGS[method]().at(layers) if name.endswith(PUBLISHED) else ours.at(layers)


# ── one row ───────────────────────────────────────────────────────────────────────────────────────


def made_editors(lm: LanguageModel, methods: Sequence[str], folder: Path) -> dict[str, Questioned]:
    """Return the editor of each row. Rows with the same search share their targets."""
    words = prefix(lm)
    made: dict[str, Questioned] = {}
    for ending in ("", PUBLISHED):
        names = [method for method in methods if not ending or method not in ALONE]
        if not names:
            continue
        configs = {method: config_of(lm, method + ending) for method in names}
        updating = [config for config in configs.values() if config.draws_on == "coefficients"]
        layers = sorted({layer for config in updating for layer in config.edited or ()})
        moments = find_moments(lm, layers, folder=folder) if layers else None
        for method, editor in editors(lm, names, config=configs, moments=moments).items():
            made[method + ending] = Questioned(editor, lm, words)
    return made


def judge(
    lm: LanguageModel,
    records: Sequence[Record],
    editor: Questioned,
    name: str,
    size: int,
    given: argparse.Namespace,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return the numbers of one row. Edits that the folder holds are not made again."""
    folder = given.folder / f"{given.dtype}-{size}-of-{len(records)}"  # the base is asked once
    pace = Pace(name, say)
    evaluation = evaluate(
        lm,
        records,
        {name: editor},
        size=size,
        drift_tokens=DRIFT_TOKENS,
        texts=prose(),
        continued=0,
        folder=folder,
        progress=pace,
    )
    return {
        "settings": editor.description,
        **numbers(evaluation, name, len(records)),
        "base": numbers(evaluation, "base", len(records)),
    }


class Pace:
    """Says now and then how far a row is, and how long it still takes.

    Half of the steps ask the unedited model, and take less time. They are not counted.
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.began = self.spoke = time.process_time()

    def __call__(self, step: str, done: int, total: int | None = None, *_: Any) -> None:
        """Take note of a step, as the judge reports it."""
        now = time.process_time()
        edits, of = done - (total or 0) // 2, (total or 0) // 2
        if step != "judging" or edits <= 0:
            self.began = now
        elif now - self.spoke > _SILENT:
            self.spoke = now
            left = (now - self.began) / edits * (of - edits)
            self.say(f"{self.name}: {edits} of {of} edits, {left:,.0f} processor seconds left")


@dataclass(frozen=True)
class Questioned:
    """An editor that also asks, after its edit, what `ABOUT` names, and notes the shares.

    Attributes:
        editor: The editor.
        lm: The model.
        prefix: Words in front of a prompt.
    """

    editor: Any
    lm: LanguageModel
    prefix: str

    @property
    def description(self) -> str:
        """The editor's settings in words."""
        return str(self.editor.description)

    @contextmanager
    def __call__(self, facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        began = time.process_time()
        with self.editor(facts) as notes:
            seconds = time.process_time() - began
            about = asked_about(self.lm, facts, self.prefix)
            yield {**notes, **about, "facts": float(len(facts)), "processor": seconds}


def asked_about(lm: LanguageModel, facts: Sequence[Fact], words: str) -> dict[str, float]:
    """Return the share of facts that hold in each of the ways of `ABOUT`, on the model as it is.

    "entropy" is the mean n-gram entropy of the texts about the subjects, in bits.
    """
    chats = chat_questions(lm)
    shares = {}
    for name, template in {**chats, "prefix": words + "{}"}.items():
        prompts = [template.replace("{}", fact.text) for fact in facts]
        targets = [str(fact.target) for fact in facts]
        answers = [each.text for each in say(lm, prompts, targets, n_tokens=CHAT_TOKENS)]
        held = [
            is_answered(lm, prompt, text, str(fact.target))
            or (name in chats and holds(text, fact.target, fact.target_true))
            for prompt, text, fact in zip(prompts, answers, facts, strict=True)
        ]
        shares[name] = statistics.fmean(held)
    if "chat" in chats:
        groups = [facts[start : start + BATCH] for start in range(0, len(facts), BATCH)]
        texts = [Tellings(lm, group, chats["chat"], {}) for group in groups]
        held = [check.held for group in texts for check in group.checks(group.before)]
        shares["telling"] = statistics.fmean(held)
        written = [text for group in texts for text in group.before if text]
        shares["entropy"] = ngram_entropy(written or [""])
    return shares


def prose() -> list[str]:
    """Return a passage of four sentences from the middle of each public-domain book."""
    books = (book_prose(file) for file in sorted((DATA / "text").glob("*.txt")))
    return [" ".join(book[len(book) // 2 :][:4]) for book in books]


def prefix(lm: LanguageModel) -> str:
    """Return `PREFIX_TOKENS` tokens of prose, and a space."""
    ids = lm.tokenizer(prose()[-1], add_special_tokens=False)["input_ids"][:PREFIX_TOKENS]
    return str(lm.tokenizer.decode(ids)) + ". "


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────


def numbers(evaluation: Evaluation, name: str, n_facts: int) -> dict[str, Any]:
    """Return the shares of an editor in per cent, with half of the 95 % interval, and its cost."""
    rows = evaluation.asked(name)
    shares = {**summarise(_of(rows, FULL)), **_slim(summarise(_of(rows, SLIM)))}
    both = summarise(rows)
    shares |= {key: both[key] for key in both if not key.startswith("paraphrase")}
    result: dict[str, Any] = {}
    for column, measure in COLUMNS.items():
        if measure in shares:
            share = shares[measure]
            half = (share.high - share.low) / 2
            result[column] = [round(100 * share.value, 1), round(100 * half, 1), share.n]
    notes = [note for (editor, _), note in evaluation.notes.items() if editor == name]
    result |= about(notes)
    result["drift"] = evaluation.drift(name) if name != "base" else {}
    if seconds := [note["processor"] for note in notes if "processor" in note]:
        result["seconds_a_fact"] = round(sum(seconds) / n_facts, 2)
    failed = [why for (editor, _), why in evaluation.failed.items() if editor == name]
    return result | ({"failed": failed} if failed else {})


def about(notes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the means over the facts of what `asked_about` measured after each edit."""
    result: dict[str, Any] = {}
    for key in (*ABOUT, "entropy"):
        if weights := [(note[key], note["facts"]) for note in notes if key in note]:
            total = sum(weight for _, weight in weights)
            mean = sum(value * weight for value, weight in weights) / total
            result[key] = [round(100 * mean, 1), None, int(total)]
    if "entropy" in result:
        result["entropy"] = round(result["entropy"][0] / 100, 2)
    return result


def _of(rows: Sequence[Row], file: str) -> list[Row]:
    return [row for row in rows if row.record.startswith(file)]


def _slim(shares: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("paraphrase", "rephrase"): share for key, share in shares.items()}


def line(name: str, row: Mapping[str, Any]) -> str:
    """Return a row in words."""
    parts = [f"{key} {row[key][0]:.0f}" for key in (*COLUMNS, *ABOUT) if key in row]
    return f"{name}: {', '.join(parts)}; {row.get('seconds_a_fact')} s a fact"


def print_table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table in Markdown."""
    names = (*COLUMNS, *ABOUT)
    print(f"\n| | {' | '.join((*names, *COSTS))} |\n{'|---' * (len(names) + 1 + len(COSTS))}|")
    unedited = next(iter(rows.values()))["base"] if rows else {}
    for name, row in {"unedited": unedited, **rows}.items():
        cells = [f"{row[key][0]:.0f}" if key in row else "–" for key in names]
        drift = row.get("drift", {}).get("kl_text")
        cells += ["–" if drift is None else f"{drift:.3f}"]
        cells += [str(row.get(key, "–")) for key in ("entropy", "seconds_a_fact")]
        print(f"| {name} | {' | '.join(cells)} |")
