"""What a run keeps: one row a question, one continuation a record.

    row = Row(editor="rome", unit=0, record="7", kind="prompt", prompt="Ada Quill lives in",
              answer="Oslo", exact=True, log_wanted=-0.1, log_against=-4.2, ...)
    row.success, row.magnitude, row.exact

These are the records that `store.py` writes and `evaluation.py` summarises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .records import QuestionKind

BASE = "base"
"""The editor of rows asked of the unedited model."""

STAYING: tuple[QuestionKind, ...] = ("neighbour", "locality")
"""The kinds of questions whose answers must stay."""

PROBE = "probe: "
"""What the name of a note begins with if the probe measured it."""

BROKEN = "broken"
"""The note of an edit after which the model gave numbers that are not finite."""

LOWEST = -1e4
"""The log-probability of both sides of a comparison in which the model gave a number that is not
finite. Neither side is then likelier, and the probability of both is 0."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question, asked once.

    Attributes:
        editor: Name of the editor that had written, or `BASE`.
        unit: Number of the edit that the model carried, from 0: one record, batch or round. -1:
            none.
        record: Id of the question's record.
        kind: What the question tests.
        group: Number that questions share if they ask the same thing in several ways.
        prompt: The question.
        written: Number of the unit in which the record was written.
        answer: The model's greedy answer.
        exact: Whether the answer begins with a right one. For a negation, whether it does not begin
            with the new object. None: no answer is known to be right.
        stayed: Whether a question that must stay has the answer of the unedited model. None for
            other kinds, and for the unedited model.
        log_wanted: Mean log-probability a token of the first right answer, in nats. `LOWEST` if it
            is not finite. None: no answer is known to be right.
        log_against: The same for the other side of the comparison. None: there is no other side.
        tokens: Share of the right answer's tokens that are the likeliest after the right tokens
            before them (teacher forcing), zsRE's measure. None for a negation, which has several
            right answers; 0 from a model whose numbers are not finite. It gives away the answer's
            length and its beginning: Yang et al. 2025 (QAEdit, arXiv 2502.11177) find 96.8 % by it
            where free generation gives 38.5 %. Mitchell et al. 2022 (MEND, arXiv 2110.11309); memit
            py/eval_utils_zsre.py:52-65.
    """

    editor: str
    unit: int
    record: str
    kind: QuestionKind
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
        """Whether the wanted side is strictly likelier than the other. None: there is no
        comparison.

        The mean over questions is COUNTERFACT's ES, PS and NS. The log-probabilities are means over
        tokens, so a longer candidate is not less likely for its length. For prompts and paraphrases
        the wanted side is the new object. For neighbours it is the old one. For a negation it is
        the side that was not written. Meng et al. 2022 (ROME, arXiv 2202.05262), section 3.3; memit
        py/eval_utils_counterfact.py:148-181, summarize.py:51-90.
        """
        if self.log_wanted is None or self.log_against is None:
            return None
        return self.log_wanted > self.log_against

    @property
    def magnitude(self) -> float | None:
        """p(wanted) − p(other), in [−1, 1]. None: there is no comparison.

        A probability is exp of the mean a token. The mean over questions is COUNTERFACT's EM, PM
        and NM; sources as for `success`.
        """
        if self.log_wanted is None or self.log_against is None:
            return None
        return math.exp(self.log_wanted) - math.exp(self.log_against)

    @property
    def broken(self) -> bool:
        """Whether the model gave a number that is not finite, so that the question counts as
        wrong."""
        return LOWEST in (self.log_wanted, self.log_against)


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """The texts that a model wrote when it continued a record's generation prompts.

    Attributes:
        editor: As in `Row`.
        unit: As in `Row`.
        record: As in `Row`.
        texts: One text a prompt. Each begins with its prompt.
        entropy: n-gram entropy in bits, the mean over the texts. It is low if the model repeats
            itself.
        consistency: Similarity to the record's references, in [0, 1]. None: it has no references.
    """

    editor: str
    unit: int
    record: str
    texts: tuple[str, ...]
    entropy: float
    consistency: float | None


@dataclass(frozen=True)
class Share:
    """A mean over questions, with its interval.

    Attributes:
        value: The mean. A share in [0, 1], or an entropy in bits.
        low: Lower end of the 95 % bootstrap interval over records.
        high: Upper end.
        n: Number of questions.
        n_records: Number of records that have these questions. 0: it was not counted.
    """

    value: float
    low: float
    high: float
    n: int
    n_records: int = 0


def finite_numbers(notes: object) -> dict[str, float]:
    """Return the entries of a mapping whose values are finite numbers; {} for any other object."""
    if not isinstance(notes, Mapping):
        return {}
    return {
        str(name): float(value)
        for name, value in notes.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
