"""Judge the models of a server by the questions of a benchmark.

    evaluation = evaluate_served("http://127.0.0.1:8000", "counterfact.json", folder="judged")
    evaluation                       # a table: the base model, and each adapter

The base model of the server is asked first, then each adapter, as editors are judged that wrote
into a model in memory. Answers are greedy. Where the server says how likely a target is, success,
magnitude and tokens are measured, too.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.checks import check_count, check_seed
from ..core.errors import InputError, ServerError
from ..core.files import folder_path
from ..core.gap import Settled
from ..core.progress import Progress, Tally, note
from ..core.tables import counted, visible
from ..model.matching import begins_with, n_lines, stayed
from ..remote.server import ServedModel, Server
from .asker import Asker
from .campaign import Judged, note_left_out
from .claim import claim_folder
from .evaluation import Evaluation
from .records import Record, Suite
from .rows import BASE, Row
from .run import chosen_records
from .score import score
from .served_asker import ServedAsker, share_of
from .store import FORMAT, Store, Unit
from .suites import load_suite
from .usable import UNKNOWN, UNSAID, consistent

_TOGETHER = 32
"""Records whose answers are kept together: a run that was killed goes on after them."""

_ASKED_AGAIN, _LEAST_SAME = 8, 0.75
"""Kept questions of each model that are asked again before a run goes on, and the share of them
that must have the same answer. In 16 bits a few near ties may change with the batch."""

_REFUSALS = (400, 413, 422)
"""Statuses of a server that does not take a prompt, because it is too long, for example."""


def evaluate_served(  # house: named like `evaluate`, with the keywords of it that a server allows
    url: str | Server,
    suite: Suite | str | os.PathLike[str] | Iterable[Record],
    models: Sequence[str] | None = None,
    *,
    known_only: bool = True,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge the models of a server that speaks OpenAI's completions.

    The rows of the server's base model have the editor "base". Each other served model is an
    editor. Records that the server refuses are left out, and `unusable` holds the reasons.

    Args:
        url: The server's address, or an open server.
        suite: A suite, some of its records, or what `load_suite` takes.
        models: Names of served models. None: the base model and all its adapters.
        known_only: Whether to leave out records whose old object the base model does not say.
        limit: Number of records to draw. None: all.
        max_new_tokens: Length of the greedy answers in tokens. None: one token more than the
            longest right answer, and at least 8.
        seed: Seed of the sample.
        folder: Keeps rows.jsonl. If the same call finds a run that was killed there, it goes on.
        progress: Gets the number of questions that are done, and notes.

    Raises:
        InputError: when there is no record to judge, a name is not served, an argument is wrong,
            or the folder holds another run.
        ServerError: when the server cannot be reached, refuses, or does not answer in JSON.
        DamagedError: when the folder's file cannot be read.
    """
    with ExitStack() as stack:
        if isinstance(url, Server):
            server = url
        else:
            server = stack.enter_context(Server.open(url, progress=progress))
        loaded = suite
        if isinstance(suite, (str, os.PathLike)):
            loaded = load_suite(Path(suite) if isinstance(suite, os.PathLike) else suite)
        records = tuple(chosen_records(loaded, limit, check_seed(seed)))
        whole = (
            replace(loaded, records=records)
            if isinstance(loaded, Suite)
            else Suite(name="own", records=records, skipped=(), source="", digest="")
        )
        run = ServedRun.of(server, models, progress)
        where = None if folder is None else folder_path(folder)
        records, _ = run.known(whole, known_only, progress)
        return run.judge(records, max_new_tokens, where, progress)


@dataclass(frozen=True)
class ServedRun:
    """The models of a server that are judged.

    Attributes:
        server: The server.
        base: The base model.
        models: {editor: model} of the others.
    """

    server: Server
    base: ServedModel
    models: Mapping[str, ServedModel]

    @classmethod
    def of(
        cls, server: Server, names: Sequence[str] | None, progress: Progress | None = None
    ) -> ServedRun:
        """Choose models.

        Args:
            server: The server.
            names: Names of served models. The first of them that is no adapter is the base model.
                None: the base model and all its adapters.
            progress: Gets a note of models that are not judged.

        Raises:
            InputError: when a name is not served, or is given twice.
        """
        offered = {model.name: model for model in server.models()}
        if isinstance(names, str) or (names is not None and len(set(names)) < len(names)):
            raise InputError(
                f"models is {names!r}; give a list of names, each once", argument="models"
            )
        if unknown := [name for name in names or () if name not in offered]:
            raise InputError(
                f"the server has no model {visible(unknown[0])!r}; it has "
                f"{', '.join(map(visible, offered))}",
                argument="models",
            )
        bases = [name for name in names or () if offered[name].parent is None]
        base = offered[bases[0]] if bases else offered[server.base]
        if names is None:
            names = [each.name for each in offered.values() if each.parent == base.name]
            if others := len(offered) - len(names) - 1:
                note(
                    progress,
                    f"the server has {counted(others, 'other base model')}, which nothing is asked "
                    "unless they are named",
                    argument="models",
                )
        editors = {
            name if name != BASE else f"{BASE} (served)": offered[name]
            for name in names
            if name != base.name
        }
        return cls(server, base, editors)

    @property
    def words(self) -> str:
        """What is judged, in words: it decides whether a run in a folder goes on."""
        place = f" from {self.base.path}" if self.base.path else ""
        return f"{self.server.kind}, {self.base.name}{place}"

    def campaign(
        self,
        suite: Suite,
        folder: Path | None,
        *,
        known_only: bool,
        seed: int,
        limit: int | None,
        progress: Progress | None = None,
    ) -> Judged:
        """Judge a suite, and keep everything in a folder that belongs to this server.

        Args:
            suite: The suite.
            folder: The folder; `served` in it gets the rows. None: nothing is kept.
            known_only: As for `evaluate_served`.
            seed: Seed of the sample that the suite is.
            limit: The size of that sample. None: all records.
            progress: As for `evaluate_served`.

        Raises:
            InputError, ServerError, DamagedError: As for `evaluate_served`.
        """
        made_from = {
            "model": self.words,
            "suite": suite.digest,
            "layout": suite.name,
            "limit": limit,
            "seed": seed,
            "known": known_only,
        }
        if folder is not None:
            claim_folder(folder, made_from, {})
        records, left_out = self.known(suite, known_only, progress)
        if folder is not None:
            settings = {name: _description(model) for name, model in self.models.items()}
            claim_folder(folder, made_from, settings)
        kept = None if folder is None else folder / "served"
        evaluation = self.judge(records, None, kept, progress).finished()
        return Judged(evaluations=(evaluation,), suite=suite, left_out=left_out)

    def known(
        self, suite: Suite, known_only: bool, progress: Progress | None
    ) -> tuple[tuple[Record, ...], Mapping[str, int]]:
        """Return the records to judge, and {reason: how many were left out}.

        Raises:
            InputError: when no record is left.
        """
        able: Sequence[Record] = suite.records
        reasons: dict[str, int] = {}
        if known_only:
            with_old = [r for r in able if r.facts and all(f.target_true for f in r.facts)]
            reasons[UNKNOWN] = len(able) - len(with_old)
            able = self._said(with_old, progress)
            reasons[UNSAID] = len(with_old) - len(able)
        records, contradictions = consistent(able, writable=False)
        left_out = {why: n for why, n in (reasons | contradictions).items() if n}
        note_left_out(suite, records, left_out, progress)
        return tuple(records), left_out

    def _said(self, records: Sequence[Record], progress: Progress | None) -> list[Record]:
        """Return the records whose old objects the base model says."""
        pairs = [(fact.text, fact.target_true or "") for one in records for fact in one.facts]
        if not pairs:
            return []
        asker = ServedAsker(self.server, self.base.name, self.base.name)
        said = self.server.complete(
            self.base.name,
            [text for text, _ in pairs],
            n_tokens=asker.tokens_of(old for _, old in pairs),
            lines=[n_lines(old) for _, old in pairs],
            progress=progress,
        )
        is_said = {
            pair: begins_with(answer.text, pair[1])
            for pair, answer in zip(pairs, said, strict=True)
        }
        return [
            one
            for one in records
            if all(is_said[fact.text, fact.target_true or ""] for fact in one.facts)
        ]

    def judge(
        self,
        records: Sequence[Record],
        max_new_tokens: int | None,
        folder: Path | None,
        progress: Progress | None,
    ) -> Evaluation:
        """Ask the base model everything about some records, then each other model.

        Args:
            records: The records.
            max_new_tokens: As for `evaluate_served`.
            folder: As for `evaluate_served`.
            progress: As for `evaluate_served`.

        Raises:
            InputError, ServerError, DamagedError: As for `evaluate_served`.
        """
        if len({record.id for record in records}) < len(records):
            raise InputError(
                "two records have the same id, so their rows cannot be told apart; make ids unique",
                argument="suite",
            )
        gaps: dict[tuple[str, str], Settled] = {}
        asker = ServedAsker(self.server, self.base.name, self.base.name, gaps)
        questions = [question for record in records for question in record.questions]
        n_tokens = asker.tokens_for(questions) if max_new_tokens is None else max_new_tokens
        n_tokens = check_count(n_tokens, "max_new_tokens", "the length of an answer in tokens")
        store = self._store(records, n_tokens, folder)
        self._check_kept(store, n_tokens)
        parts = [records[at : at + _TOGETHER] for at in range(0, len(records), _TOGETHER)]
        tally = Tally(progress, "judging", (1 + len(self.models)) * len(questions))
        asking = _Asking(store, n_tokens)
        for number, part in enumerate(parts):
            asking.ask(asker, BASE, number, part, _questions(tally, part))
        if self.server.gives_log_probs is False:
            note(
                progress,
                "the server does not say how likely a target is, so success, magnitude, tokens and "
                "score are left out; exact and stayed are measured",
            )
        asking.before = {row.prompt: row.answer for row in store.rows if row.editor == BASE}
        for editor, model in self.models.items():
            store.check_editor(editor, _description(model))
            served = ServedAsker(self.server, model.name, self.base.name, gaps)
            for number, part in enumerate(parts):
                asking.ask(served, editor, number, part, _questions(tally, part))
        return Evaluation.of(store)

    def _check_kept(self, store: Store, n_tokens: int) -> None:
        """Check, where rows were kept, that the server answers as the one that was asked then.

        An address and names do not say which weights a server has.

        Raises:
            InputError: when it answers otherwise.
        """
        for editor, model in {BASE: self.base, **self.models}.items():
            rows = [row for row in store.rows if row.editor == editor][:_ASKED_AGAIN]
            if not rows:
                continue
            lines = [n_lines(row.answer) for row in rows]
            said = self.server.complete(
                model.name, [row.prompt for row in rows], n_tokens=n_tokens, lines=lines
            )
            same = [stayed(row.answer, each.text) for row, each in zip(rows, said, strict=True)]
            if sum(same) < _LEAST_SAME * len(same):
                row, answer = next(
                    (row, each.text)
                    for row, each, is_same in zip(rows, said, same, strict=True)
                    if not is_same
                )
                raise InputError(
                    f"{store.path} holds answers of another model than {visible(model.name)!r} at "
                    f"{self.server.client.url}: {row.prompt!r} was answered {row.answer!r}, and is "
                    f"answered {answer!r}. Choose another folder.",
                    argument="folder",
                )

    def _store(self, records: Sequence[Record], n_tokens: int, folder: Path | None) -> Store:
        made_from = {
            "format": FORMAT,
            "fingerprint": "",
            "records": hashlib.sha256(repr(list(records)).encode()).hexdigest(),
            "size": len(records),
            "sequence": False,
            "max_new_tokens": n_tokens,
            "served": self.words,
        }
        units = math.ceil(len(records) / _TOGETHER)
        return Store.open(
            folder, made_from, {"model": self.base.name, "skipped": 0, "units": units}
        )


class _Asking:
    """Asks models about records, and keeps the answers.

    Attributes:
        store: Keeps them.
        n_tokens: Length of the answers in tokens.
        before: {prompt: answer of the base model}. None: the base model is asked.
    """

    def __init__(self, store: Store, n_tokens: int) -> None:
        self.store, self.n_tokens = store, n_tokens
        self.before: dict[str, str] | None = None

    def ask(
        self,
        asker: Asker,
        editor: str,
        number: int,
        records: Sequence[Record],
        progress: Progress,
    ) -> None:
        """Ask about some records, unless the store has the answers."""
        if self.store.has(editor, number):
            progress("judging", 1, 1)
            return
        gone = self.store.unusable.get((BASE, number), {})
        usable = [record for record in records if record.id not in gone]
        unusable: dict[str, str] = {}
        try:
            rows = self._rows(asker, usable, progress)
        except ServerError as error:
            if error.status not in _REFUSALS:
                raise
            rows = []
            for record in usable:  # find out which of them is refused
                try:
                    rows += self._rows(asker, [record], None)
                except ServerError as refusal:
                    if refusal.status not in _REFUSALS:
                        raise
                    unusable[record.id] = str(refusal)
            if not rows:
                raise
        unit = -1 if editor == BASE else number
        rows = [replace(row, editor=editor, unit=unit, written=number) for row in rows]
        self.store.add(Unit(editor, number, rows, [], {}, unusable=unusable))
        progress("judging", 1, 1)

    def _rows(
        self, asker: Asker, records: Sequence[Record], progress: Progress | None
    ) -> list[Row]:
        if not any(record.questions for record in records):
            return []
        return score(
            asker, records, before=self.before, max_new_tokens=self.n_tokens, progress=progress
        )


def _description(model: ServedModel) -> str:
    """Return what is known of a served model, in words."""
    return f"served from {model.path}" if model.path else ""


def _questions(tally: Tally, records: Sequence[Record]) -> Progress:
    """Return what takes reports about the questions of some records."""
    return share_of(tally, sum(len(record.questions) for record in records))
