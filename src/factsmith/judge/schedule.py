"""The schedule of a run: how many records an edit writes, and what is asked and measured after it.

schedule = Schedule(size=100, sequence=True, seed=1)
schedule = schedule.for_records(lm, records)      # with the length of the answers settled
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..core.checks import check_count, check_items, check_seed
from ..model.language_model import LanguageModel
from .asker import ModelAsker
from .records import Record

_SINGLE_EDITS_WITH_DRIFT = 10

_AT_LEAST = {
    "size": (1, "the number of records written at a time"),
    "retained": (0, "the number of earlier records asked again in each round"),
    "drift_tokens": (0, "the number of tokens of text for drift"),
    "continued": (0, "the number of records whose text the model continues"),
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the records of a run are written, asked about and measured.

    Attributes:
        size: Number of records an edit. 1: each record by itself. The last edit may be smaller.
        sequence: Whether each batch is put on top of those before it, and all are taken back at the
            end. After each round its own records are asked, and again the prompts of earlier
            records. After the last round everything is asked of every record.
        retained: Number of records of each earlier round that are asked again.
        max_new_tokens: Length of the greedy answers in tokens, the same for all. None: one token
            more than the longest right answer, and at least 8.
        drift_tokens: Tokens of text on which drift is measured, with 100 facts that nothing was
            written about: after each round, each batch, or each of the first ten single edits. 0:
            no drift.
        texts: The text for drift. None: the model writes it.
        continued: Number of records whose generation prompts the model continues, the first that
            have some: 100 tokens, each drawn among the likeliest five as in the papers, after the
            edit that wrote the record, or after the last round of a sequence.
        seed: Seed of everything that is drawn.

    Raises:
        InputError: when a number is out of its range, or `texts` is no list.
    """

    size: int = 1
    sequence: bool = False
    retained: int = 100
    max_new_tokens: int | None = None
    drift_tokens: int = 500
    texts: Sequence[str] | None = None
    continued: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        values: dict[str, object] = {"seed": check_seed(self.seed)}
        for name, (least, meaning) in _AT_LEAST.items():
            values[name] = check_count(getattr(self, name), name, meaning, least=least)
        if self.max_new_tokens is not None:
            values["max_new_tokens"] = check_count(
                self.max_new_tokens,
                "max_new_tokens",
                "the length of an answer in tokens",
                also="None",
            )
        if self.texts is not None:
            values["texts"] = tuple(check_items(self.texts, "texts", "texts", also="None"))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def for_records(self, lm: LanguageModel, records: Sequence[Record]) -> Schedule:
        """Return the schedule for some records.

        The size is at most the number of records, and the length of the answers is settled: answers
        of different length could not be compared.
        """
        max_new_tokens = self.max_new_tokens
        if max_new_tokens is None:
            questions = [question for record in records for question in record.questions]
            max_new_tokens = ModelAsker(lm).tokens_for(questions)
        return replace(self, size=min(self.size, len(records)), max_new_tokens=max_new_tokens)

    def units(self, records: Sequence[Record]) -> list[Sequence[Record]]:
        """Return the records of each edit."""
        return [records[at : at + self.size] for at in range(0, len(records), self.size)]

    def measures_drift(self, unit: int) -> bool:
        """Return whether drift is measured after an edit."""
        is_single = self.size == 1 and not self.sequence
        return bool(self.drift_tokens) and not (is_single and unit >= _SINGLE_EDITS_WITH_DRIFT)

    def made_from(self) -> dict[str, object]:
        """Return the fields that must be equal for a run to go on, texts by their digest."""
        texts = None
        if self.texts is not None:
            texts = hashlib.sha256("\0".join(self.texts).encode()).hexdigest()
        return {
            "size": self.size,
            "sequence": self.sequence,
            "retained": self.retained,
            "max_new_tokens": self.max_new_tokens,
            "drift_tokens": self.drift_tokens,
            "texts": texts,
            "continued": self.continued,
            "seed": self.seed,
        }
