"""judge.evaluation."""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import DamagedError, InputError
from ..core.tables import Shown, Table, counted
from .metrics import bootstrap_interval, harmonic_mean
from .rows import BASE, BROKEN, PROBE, Continuation, Row, Share
from .store import Store

if TYPE_CHECKING:
    pass


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
        store = Store(Path(folder), None)
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
            raise DamagedError(
                f"{store.path}, line 1, cannot be read ({error}); delete the file to begin again"
            ) from None

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
            raise InputError(
                f"{editor} was not asked behind edit {unit}; there are 0 to {max(row.unit for row in own)}"
            )
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
                        cases.setdefault(
                            (row.record, at if row.group is None else -1 - row.group), []
                        ).append(float(measured))
                if cases:
                    values, groups = (
                        [max(each) for each in cases.values()],
                        [record for record, _ in cases],
                    )
                    low, high = bootstrap_interval(values, groups=groups, seed=seed)
                    found[f"{kind} {name}"] = Share(
                        sum(values) / len(values), low, high, len(values)
                    )
        told = [
            one
            for one in self.written
            if one.editor == editor and (unit is None or one.unit == unit)
        ]
        for name in ("entropy", "consistency"):
            if some := [
                (value, one.record) for one in told if (value := getattr(one, name)) is not None
            ]:
                values, groups = [value for value, _ in some], [record for _, record in some]
                found[f"text {name}"] = Share(
                    sum(values) / len(values),
                    *bootstrap_interval(values, groups=groups, seed=seed),
                    len(values),
                )
        for name, measure in (("score", "success"), ("score exact", "exact")):
            if (overall := score_of(rows, _MEASURES[measure], seed)) is not None:
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
        return {
            written: {asked: sum(v) / len(v) for asked, v in sorted(own.items())}
            for written, own in sorted(found.items())
        }

    def remaining(self, editor: str) -> dict[int, tuple[float, float]]:
        """Of a sequence, behind each round: the share of prompts answered right of those of the first round, and of all rounds so far."""
        told = self.retention(editor)
        rounds = sorted({asked for own in told.values() for asked in own})
        sizes = {
            at: sum(
                row.unit == at == row.written
                for row in self.rows
                if row.editor == editor and row.kind == "prompt"
            )
            for at in rounds
        }
        found = {}
        for at in rounds:
            own = [(told[old][at], sizes[old]) for old in rounds if at in told.get(old, {})]
            if at in told.get(rounds[0], {}):
                found[at] = (
                    told[rounds[0]][at],
                    sum(share * n for share, n in own) / max(1, sum(n for _, n in own)),
                )
        return found

    def drift(self, editor: str, unit: int | None = None) -> dict[str, float]:
        """The means of `DRIFTS` where they were measured: of a sequence behind its last round, or behind `unit`. {} where they were not."""
        told = {
            at: note
            for (name, at), note in self.notes.items()
            if name == editor and set(DRIFTS) & set(note)
        }
        if unit is not None or self.sequence:
            told = {
                at: note for at, note in told.items() if at == (max(told) if unit is None else unit)
            }
        found = {name: [note[name] for note in told.values() if name in note] for name in DRIFTS}
        return {name: sum(values) / len(values) for name, values in found.items() if values}

    def probed(self, editor: str) -> dict[str, float]:
        """What the probe measured of a model: the base model, or what it was behind an editor's last edit."""
        return {
            name.removeprefix(PROBE): value
            for (of, _), note in self.notes.items()
            for name, value in note.items()
            if of == editor and name.startswith(PROBE)
        }

    def measured(self, editor: str) -> dict[str, float]:
        """What an editor noted of its edits: how many were made, mean seconds, the largest norm, and drift where it was measured.

        "failed": edits that could not be made; "broken": edits behind which the model gave no finite numbers; where there are any.
        """
        notes = [own for (name, _), own in self.notes.items() if name == editor]
        records = len({row.record for row in self.rows if row.editor == editor})
        failed = sum(name == editor for name, _ in self.failed)
        broken = sum(BROKEN in own for own in notes)
        found: dict[str, float] = {"edits": len(notes) - failed}
        found |= {name: n for name, n in (("failed", failed), (BROKEN, broken)) if n}
        if seconds := [own["seconds"] for own in notes if "seconds" in own]:
            found |= {
                "seconds": sum(seconds) / len(seconds),
                "seconds_a_record": sum(seconds) / max(1, records),
            }
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
            "measures": {
                e: {name: _plain(share) for name, share in own.items()}
                for e, own in self.summaries.items()
            },
            "probed": {e: dict(self.probed(e)) for e in self.editors},
            "failed": [
                {"editor": e, "edit": unit, "why": why} for (e, unit), why in self.failed.items()
            ],
            "edits": {e: self.measured(e) for e in edits},
            "retention": {e: self.retention(e) for e in edits if self.sequence},
        }

    def tables(self) -> list[Table]:
        """One column an editor, the base model first."""
        summaries = self.summaries
        names = list(
            dict.fromkeys(
                name for own in summaries.values() for name in own if not name.endswith("tokens")
            )
        )
        rows = [
            (
                name,
                *(
                    f"{100 * own[name].value:.1f} ± {50 * (own[name].high - own[name].low):.1f}"
                    if name in own
                    else ""
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
    "magnitude": lambda row: (
        None if row.success is None else _p(row.log_wanted) - _p(row.log_against)
    ),
    "tokens": lambda row: row.tokens,
}


def _plain(share: Share) -> dict[str, float | int | None]:
    return {name: value if math.isfinite(value) else None for name, value in vars(share).items()}


def _p(log: float | None) -> float:
    return 0.0 if log is None else math.exp(log)


def score_of(
    rows: Sequence[Row], measure: Callable[[Row], float | None], seed: int, resamples: int = 2000
) -> Share | None:
    """The harmonic mean of a measure's means over prompt, paraphrase and neighbour questions; None unless all three were asked."""
    place = {kind: i for i, kind in enumerate(("prompt", "paraphrase", "neighbour"))}
    number: dict[str, int] = {}
    told = [
        (number.setdefault(row.record, len(number)), place[row.kind], measure(row))
        for row in rows
        if row.kind in place
    ]
    sums, sizes = np.zeros((len(number), 3)), np.zeros((len(number), 3))
    for record, kind, value in told:
        if value is not None:
            sums[record, kind] += value
            sizes[record, kind] += 1
    if not len(number) or not sizes.sum(0).all():
        return None
    draws = np.random.default_rng(seed).multinomial(
        len(number), np.full(len(number), 1 / len(number)), size=resamples
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        means = (draws @ sums) / (draws @ sizes)
        drawn = 3 / (1 / means).sum(1)  # 0 where one is 0
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Share(
        harmonic_mean((sums.sum(0) / sizes.sum(0)).tolist()), float(low), float(high), len(number)
    )
