"""The records that a model can be judged by.

    records, left_out = usable(lm, suite.records)
    left_out                    # {"the model does not say the old object": 12}

Two things decide. All texts of a record must fit the model and the other records. By default the
model must also know the record: an edit of a fact that the model does not know shows little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

from ..core.checks import check_items
from ..core.errors import FactsmithError
from ..core.executor import executor_in_use
from ..core.fact import Fact
from ..model.language_model import LanguageModel
from ..model.subject import fact_span
from ..model.turns import asking
from .records import Record

_LAST = 1
"""The last token of a fact's target also needs a position, because fine-tuning runs it."""

_NO_TOKEN = "a subject or a target has no token that the model knows"

_TOO_LONG = "too long for the model's positions"

_NOTHING = "nothing to write"

_TOGETHER = 200
"""Records of a part, where they are cut into parts."""

UNSAID = "the model does not say the old object"
"""The reason for leaving out a record that the model does not know."""

UNKNOWN = "no old object is given, so it is not clear what the model knows"
"""The reason for leaving out a record that `known_only=False` judges."""


@asking()
def usable(
    lm: LanguageModel, records: Iterable[Record], *, known_only: bool = True
) -> tuple[tuple[Record, ...], dict[str, int]]:
    """Return the records that can be written and judged together.

    A record is left out in these cases:

    - A prompt with its answer has more tokens than the model has positions.
    - The record has nothing to write.
    - A subject or a target has no token that the model knows.
    - An earlier record writes another target for the same prompt.
    - With `known_only`, the record gives no old object, or the model does not say the old object.

    Args:
        lm: The model, unedited.
        records: Records of a suite.
        known_only: Whether to leave out records that the model does not know.

    Returns:
        The records in their order, and {reason: how many records were left out for it}.
    """
    listed = check_items(records, "records", "records of a suite")
    executor = executor_in_use()
    size = _TOGETHER if executor.cuts else max(1, len(listed))
    parts = (listed[at : at + size] for at in range(0, len(listed), size))
    reasons = chain.from_iterable(executor.map(partial(_reasons, lm, known_only), parts))
    able: list[Record] = []
    left_out: Counter[str] = Counter()
    for record, reason in zip(listed, reasons, strict=True):
        if reason:
            left_out[reason] += 1
        else:
            able.append(record)
    kept, conflicts = consistent(able)
    in_order = {reason: left_out[reason] for reason in (_NO_TOKEN, _TOO_LONG, UNKNOWN, UNSAID)}
    return tuple(kept), {reason: n for reason, n in (in_order | conflicts).items() if n}


@asking()
def _reasons(lm: LanguageModel, known_only: bool, records: Sequence[Record]) -> list[str]:
    """Return why each record cannot be judged, whatever the other records are; "" if it can."""
    reasons = [
        _NO_TOKEN if why_unwritable(lm, record) else "" if _fits(lm, record) else _TOO_LONG
        for record in records
    ]
    if not known_only:
        return reasons
    reasons = [
        reason or ("" if all(fact.target_true is not None for fact in record.facts) else UNKNOWN)
        for record, reason in zip(records, reasons, strict=True)
    ]
    asked = [record for record, reason in zip(records, reasons, strict=True) if not reason]
    said = {id(record) for record in known(lm, asked)}
    return [
        reason or ("" if id(record) in said else UNSAID)
        for record, reason in zip(records, reasons, strict=True)
    ]


def consistent(
    records: Iterable[Record], *, writable: bool = True
) -> tuple[list[Record], Counter[str]]:
    """Return the records that do not contradict earlier ones, and how many are left out for what.

    Args:
        records: Records of a suite.
        writable: Whether to leave out those that have nothing to write, too.
    """
    kept: list[Record] = []
    left_out: Counter[str] = Counter()
    targets: dict[str, str | None] = {}
    for record in records:
        reason = _conflict(record, targets)
        if reason and (writable or reason != _NOTHING):
            left_out[reason] += 1
        else:
            kept.append(record)
    return kept, left_out


def known(lm: LanguageModel, records: Iterable[Record]) -> tuple[Record, ...]:
    """Return the records whose old objects the model says.

    The model says an old object if greedy decoding of the fact's prompt gives the whole
    `target_true`. A record counts as known if this holds for each of its facts.
    """
    listed = list(records)
    asked = [(at, fact) for at, record in enumerate(listed) for fact in record.facts]
    is_known = {at: bool(record.facts) for at, record in enumerate(listed)}
    pairs = [(fact.text, true) for _, fact in asked if (true := fact.target_true) is not None]
    said = iter(lm.says([text for text, _ in pairs], [true for _, true in pairs]) if pairs else [])
    for at, fact in asked:
        is_known[at] &= fact.target_true is not None and next(said)
    return tuple(record for at, record in enumerate(listed) if is_known[at])


def facts_of(records: Iterable[Record]) -> list[Fact]:
    """Return the facts of some records, in their order."""
    return [fact for record in records for fact in record.facts]


def why_unwritable(lm: LanguageModel, record: Record) -> str:
    """Return why the model has no tokens for the subject or the targets of a record, or ""."""
    try:
        for fact in record.facts:
            fact_span(lm, fact)
            for target in (fact.target, fact.target_true):
                if target is not None:
                    lm.question(fact.text, target, "space")  # a given gap asks no model
    except FactsmithError as error:
        return str(error)
    return ""


def _conflict(record: Record, targets: dict[str, str | None]) -> str:
    """Return why a record cannot be written after the earlier ones, or "".

    Args:
        targets: {prompt: target} of the earlier records. The function adds a record that has no
            conflict.
    """
    if not record.facts or any(fact.target is None for fact in record.facts):
        return _NOTHING
    written = [(fact.asked, fact.wanted) for fact in record.facts]
    contradicts_itself = len(set(written)) != len({text for text, _ in written})
    if contradicts_itself or any(targets.get(text, target) != target for text, target in written):
        return "another target for the same prompt"
    targets.update(written)
    return ""


def _fits(lm: LanguageModel, record: Record) -> bool:
    """Return whether the model has positions for every prompt with its answer.

    Contexts in front of a fact's prompt need no room: an editor leaves out those that do not fit.
    """
    if lm.max_tokens is None:
        return True
    asked = [(q.prompt, text, 0) for q in record.questions for text in (*q.answers[:1], q.against)]
    asked += [
        (fact.text, text, _LAST)
        for fact in record.facts
        for text in (fact.target, fact.target_true)
    ]
    # A token has a byte or more, nearly always, so a short text needs no tokenizer.
    return all(
        len(lm.question(prompt, text)[0] if text else lm.prompt_ids(prompt)) + room <= lm.max_tokens
        for prompt, text, room in asked
        if len(prompt.encode()) + len((text or "").encode()) + room + 2 > lm.max_tokens
    )
