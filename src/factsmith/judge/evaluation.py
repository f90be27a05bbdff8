"""The result of a run: all its rows, and what they come to.

evaluation = Evaluation.load("judged")
evaluation                                       # a table: the base model first
evaluation.summary("rome")["prompt exact"]       # Share(value, low, high, n)
evaluation.measured("rome"), evaluation.drift("rome"), evaluation.retention("rome")
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import DamagedError, InputError
from ..core.tables import Shown, Table, counted
from .rows import BASE, BROKEN, PROBE, Continuation, Row, Share
from .store import Store
from .summary import MEASURES, summarise

INTERVALS = "± half of the 95 % interval over records; entropy in bits, times 100"

DRIFTS = ("kl_text", "perplexity", "kl_facts", "changed_share")
"""The measures of a `Drift` that are noted after an edit. perplexity is after divided by before."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Evaluation(Shown):
    """All rows of a run, those of the base model included.

    Attributes:
        rows: In the order in which they were asked.
        written: What the models wrote when they continued generation prompts.
        notes: {(editor, unit): {name: number}}. The numbers come from the editors and, if drift was
            measured, from `DRIFTS`. "broken" is 1 if the model gave numbers that are not finite:
            its answers count as wrong, and drift that is not finite is left out.
        failed: {(editor, unit): reason} of the edits that could not be made. The questions after
            such an edit were asked of the model without it.
        unusable: {(editor, unit): {record: reason}}. With the editor "base": the records that the
            model cannot be asked about, which no editor gets. With another editor: the records that
            were left out of an edit, so that the others could be written.
        size: Number of records an edit.
        sequence: Whether each edit was put on top of the edits before it.
        skipped: Number of records that were left out because they have nothing to write.
        model: Name that the model was loaded by.
        fingerprint: Fingerprint of the model.
        units: Number of edits that each editor has to make. 0: not known.
        settings: {editor: its settings in words}, of the editors that have some.
        served: What answered, in words, if it was a server: its editors are served models, which
            carried everything from the start. "": a model in memory.
    """

    rows: tuple[Row, ...]
    written: tuple[Continuation, ...] = ()
    notes: Mapping[tuple[str, int], Mapping[str, float]]
    failed: Mapping[tuple[str, int], str] = field(default_factory=dict)
    unusable: Mapping[tuple[str, int], Mapping[str, str]] = field(default_factory=dict)
    size: int
    sequence: bool
    skipped: int
    model: str
    fingerprint: str
    units: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    served: str = ""

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Evaluation:
        """Return what a run has kept so far in its folder. `unfinished` lists the missing edits.

        Raises:
            InputError: when the folder holds no run.
            DamagedError: when its file cannot be read as rows.
            WorkspaceError: when its file cannot be opened.
        """
        return cls.of(Store.read(Path(folder)))

    @classmethod
    def of(cls, store: Store) -> Evaluation:
        """Return what a store holds.

        Raises:
            DamagedError: when the store's header lacks a field.
        """
        header = store.header
        try:
            return cls(
                rows=tuple(store.rows),
                written=tuple(store.continuations),
                notes=store.notes,
                failed=store.failed,
                unusable=store.unusable,
                size=int(header["size"]),
                sequence=bool(header["sequence"]),
                skipped=int(header.get("skipped", 0)),
                model=str(header.get("model", "")),
                fingerprint=str(header["fingerprint"]),
                units=int(header["units"]),
                settings=store.settings,
                served=str(header.get("served", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(
                f"{store.path}, line 1, cannot be read ({error}); delete the file to begin again"
            ) from None

    # ── which rows ────────────────────────────────────────────────────────────────────────────────

    @property
    def editors(self) -> tuple[str, ...]:
        """The editors: base first, then the others in the order in which they ran."""
        return tuple(dict.fromkeys(row.editor for row in self.rows))

    @property
    def unfinished(self) -> dict[str, int]:
        """{editor: number of its finished edits}, of the editors that lack edits; base may be
        one."""
        finished = Counter(editor for editor, _ in self.notes)
        return {
            editor: finished[editor] for editor in self.editors if finished[editor] < self.units
        }

    def finished(self) -> Evaluation:
        """Return the same run without the editors that lack edits."""
        gone = self.unfinished
        return replace(
            self,
            rows=tuple(row for row in self.rows if row.editor not in gone),
            written=tuple(one for one in self.written if one.editor not in gone),
            notes={at: note for at, note in self.notes.items() if at[0] not in gone},
            failed={at: why for at, why in self.failed.items() if at[0] not in gone},
            unusable={at: why for at, why in self.unusable.items() if at[0] not in gone},
        )

    @property
    def gives_log_probs(self) -> bool:
        """Whether the answers came with log-probabilities, which some servers do not give."""
        return any(row.log_wanted is not None or row.log_against is not None for row in self.rows)

    @property
    def pace(self) -> str:
        """How many records were written together, in words: "100 at a time", "100 a round".

        "as served": a server carried them.
        """
        if self.served:
            return "as served"
        return f"{self.size:,} {'a round' if self.sequence else 'at a time'}"

    def asked(self, editor: str, unit: int | None = None) -> list[Row]:
        """Return the rows of an editor.

        Args:
            editor: Name of the editor.
            unit: Return the rows asked after this edit. None: the rows after the last round of a
                sequence, or else the rows of every edit.

        Raises:
            InputError: when the editor did not run, or has no rows after this edit.
        """
        rows = [row for row in self.rows if row.editor == editor]
        if not rows:
            raise InputError(
                f"no editor {editor!r} ran; give one of {', '.join(self.editors)}",
                argument="editor",
            )
        last = max(row.unit for row in rows)
        if unit is None:
            if editor == BASE or not self.sequence:
                return rows
            unit = last
        rows = [row for row in rows if row.unit == unit]
        if not rows:
            raise InputError(
                f"{editor} was not asked after edit {unit}; give an edit from 0 to {last}",
                argument="unit",
            )
        return rows

    # ── what they come to ─────────────────────────────────────────────────────────────────────────

    def summary(self, editor: str, unit: int | None = None, *, seed: int = 0) -> dict[str, Share]:
        """Return every measure that the questions allow, by name.

        The names are "prompt success", "prompt exact", "neighbour stayed", "multihop exact" and so
        on. Questions that ask the same thing in several ways (MQuAKE's three) count once, as right
        if any of them is right. "score" and "score exact" are the harmonic means over prompt,
        paraphrase and neighbour questions, if all three kinds were asked.

        Args:
            editor: Name of the editor.
            unit: As for `asked`.
            seed: Seed of the bootstrap.
        """
        continuations = [
            one
            for one in self.written
            if one.editor == editor and (unit is None or one.unit == unit)
        ]
        return summarise(self.asked(editor, unit), continuations, seed=seed)

    @functools.cached_property
    def summaries(self) -> Mapping[str, Mapping[str, Share]]:
        """{editor: its summary}."""
        return {editor: self.summary(editor) for editor in self.editors}

    def retention(self, editor: str, name: str = "exact") -> dict[int, dict[int, float]]:
        """Return what becomes of earlier rounds of a sequence.

        Args:
            editor: Name of the editor.
            name: The way to count: success, exact, stayed, magnitude or tokens.

        Returns:
            {round written: {round asked: mean over the prompts of the records}}.
        """
        values: dict[int, dict[int, list[float]]] = {}
        self.asked(editor)  # raises an error if the editor did not run
        for row in self.rows:
            if row.editor == editor and row.kind == "prompt":
                value = MEASURES[name](row)
                if value is not None:
                    by_round = values.setdefault(row.written, {})
                    by_round.setdefault(row.unit, []).append(float(value))
        return {
            written: {asked: sum(v) / len(v) for asked, v in sorted(by_round.items())}
            for written, by_round in sorted(values.items())
        }

    def remaining(self, editor: str) -> dict[int, tuple[float, float]]:
        """Return what is left of a sequence after each round.

        Returns:
            {round: (share of right prompts of the first round, share of those of all rounds so
            far)}.
        """
        retention = self.retention(editor)
        rounds = sorted({asked for by_round in retention.values() for asked in by_round})
        prompts = [row for row in self.rows if row.editor == editor and row.kind == "prompt"]
        n_prompts = {at: sum(row.unit == at == row.written for row in prompts) for at in rounds}
        remaining = {}
        for at in rounds:
            shares = [
                (retention[written][at], n_prompts[written])
                for written in rounds
                if at in retention.get(written, {})
            ]
            if at in retention.get(rounds[0], {}):
                right = sum(share * n for share, n in shares)
                remaining[at] = (
                    retention[rounds[0]][at],
                    right / max(1, sum(n for _, n in shares)),
                )
        return remaining

    def drift(self, editor: str, unit: int | None = None) -> dict[str, float]:
        """Return the means of `DRIFTS` over the edits after which drift was measured.

        Args:
            editor: Name of the editor.
            unit: Only after this edit. None: after the last round of a sequence, or else after
                every edit.

        Returns:
            {measure: mean}; {} if no drift was measured.
        """
        notes = {
            at: note
            for (name, at), note in self.notes.items()
            if name == editor and set(DRIFTS) & set(note)
        }
        if unit is None and self.sequence:
            unit = max(notes, default=None)
        if unit is not None:
            notes = {at: note for at, note in notes.items() if at == unit}
        values = {name: [note[name] for note in notes.values() if name in note] for name in DRIFTS}
        return {name: sum(listed) / len(listed) for name, listed in values.items() if listed}

    def probed(self, editor: str) -> dict[str, float]:
        """Return what the probe measured of the base model, or after an editor's last edit."""
        return {
            name.removeprefix(PROBE): value
            for (of, _), note in self.notes.items()
            for name, value in note.items()
            if of == editor and name.startswith(PROBE)
        }

    def measured(self, editor: str) -> dict[str, float]:
        """Return what the edits of an editor cost, and what they did to the rest of the model.

        Returns:
            "edits": how many were made, if no server answered. "failed" and "broken", if there are
            any: edits that could not be made, and edits after which the model gave no finite
            numbers. "unusable", if there are any: records that could not be asked about or written.
            "seconds" and "seconds_a_record": means. "norm": the largest. And the measures of
            `drift`.
        """
        notes = [note for (name, _), note in self.notes.items() if name == editor]
        n_records = len({row.record for row in self.rows if row.editor == editor})
        n_failed = sum(name == editor for name, _ in self.failed)
        n_broken = sum(BROKEN in note for note in notes)
        measured: dict[str, float] = {} if self.served else {"edits": len(notes) - n_failed}
        if n_failed:
            measured["failed"] = n_failed
        if n_broken:
            measured[BROKEN] = n_broken
        if n_unusable := sum(
            len(why) for at, why in self.unusable.items() if at[0] in (BASE, editor)
        ):
            measured["unusable"] = n_unusable
        if seconds := [note["seconds"] for note in notes if "seconds" in note]:
            measured["seconds"] = sum(seconds) / len(seconds)
            measured["seconds_a_record"] = sum(seconds) / max(1, n_records)
        if norms := [note["norm"] for note in notes if "norm" in note]:
            measured["norm"] = max(norms)
        return measured | self.drift(editor)

    # ── how it is shown ───────────────────────────────────────────────────────────────────────────

    def to_dict(self) -> dict[str, Any]:
        """Return fields for JSON: measures, what the edits cost and did, and retention; no rows."""
        edits = [editor for editor in self.editors if editor != BASE]
        return {
            "size": self.size,
            "sequence": self.sequence,
            **({"served": self.served} if self.served else {}),
            "settings": {e: self.settings[e] for e in edits if e in self.settings},
            "measures": {
                e: {name: _plain(share) for name, share in shares.items()}
                for e, shares in self.summaries.items()
            },
            "probed": {e: dict(self.probed(e)) for e in self.editors},
            "failed": [
                {"editor": e, "edit": unit, "why": why} for (e, unit), why in self.failed.items()
            ],
            "unusable": [
                {"editor": e, "edit": unit, "record": record, "why": why}
                for (e, unit), reasons in self.unusable.items()
                for record, why in reasons.items()
            ],
            "edits": {e: self.measured(e) for e in edits},
            "retention": {e: self.retention(e) for e in edits if self.sequence},
        }

    def tables(self) -> list[Table]:
        """Return one table: a row a measure, a column an editor, the base model first."""
        summaries = self.summaries
        names = dict.fromkeys(name for shares in summaries.values() for name in shares)
        rows = [
            (name, *(_cell(shares.get(name)) for shares in summaries.values()))
            for name in names
            if not name.endswith("tokens")
        ]
        how = "in rounds of" if self.sequence else "at a time:"
        how = "as served:" if self.served else how
        title = f"{self.model}, {how} {counted(self.size, 'record')}"
        columns = {"per cent": "<", **dict.fromkeys(summaries, ">")}
        return [Table(title, columns, rows, INTERVALS)]


def _plain(share: Share) -> dict[str, float | int | None]:
    return {name: value if math.isfinite(value) else None for name, value in vars(share).items()}


def _cell(share: Share | None) -> str:
    if share is None:
        return ""
    if share.n_records == 1:  # one record has no spread
        return f"{100 * share.value:.1f}"
    return f"{100 * share.value:.1f} ± {50 * (share.high - share.low):.1f}"
