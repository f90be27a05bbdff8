"""Ask a model everything about some records, and let it continue their generation prompts.

rows = score(lm, suite.records)                               # the unedited model
before = {row.prompt: row.answer for row in rows}
with applied(lm, delta):
    rows = score(lm, suite.records, before=before)            # the edited one
    continuations = continue_texts(lm, suite.records, seed=0)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..core.checks import check_items
from ..core.progress import Progress
from ..model.answers import n_lines, stayed
from ..model.language_model import LanguageModel
from ..model.sample import sample
from .asker import Asked, Asker, ModelAsker
from .asking import Reply
from .metrics import ngram_entropy, reference_consistency
from .records import Question, Record
from .rows import BASE, LOWEST, STAYING, Continuation, Row

_CONTINUED_TOKENS = 100
"""Length of a continuation, as in the papers."""

_TOP_K = 5
"""Each token of a continuation is drawn among the likeliest five, as in the papers."""

_TEXTS_TOGETHER = 64
"""Continuations in one batch."""


def score(
    lm: LanguageModel | Asker,
    records: Iterable[Record],
    *,
    before: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Ask a model every question of some records.

    If the model gives no finite number for a question, everything except the greedy answer counts
    as wrong.

    Args:
        lm: The model, edited or not, or another that answers.
        records: Records of a suite.
        before: {prompt: answer of the unedited model}, which decides `Row.stayed`. None: this is
            the unedited model.
        max_new_tokens: Length of the greedy answers in tokens. None: one token more than the
            longest right answer, and at least 8.
        progress: Gets the number of prompts that are done.

    Returns:
        One row a question, with the editor `BASE` and no unit.

    Raises:
        InputError: as `ask`.
    """
    asked = [
        (record, question)
        for record in check_items(records, "records", "records of a suite")
        for question in record.questions
    ]
    if not asked:
        return []
    asker = ModelAsker(lm) if isinstance(lm, LanguageModel) else lm
    questions = [question for _, question in asked]
    if max_new_tokens is None:
        max_new_tokens = asker.tokens_for(questions)
    listed = [Asked(q.prompt, _candidates(q), _lines(q)) for q in questions]
    replies = asker.replies(listed, max_new_tokens, progress)
    return [
        _row(asker, record, question, reply, before)
        for (record, question), reply in zip(asked, replies, strict=True)
    ]


def _candidates(question: Question) -> list[str]:
    """Return the first right answer and the other side of the comparison, if they are known."""
    against = [] if question.against is None else [question.against]
    return [*question.answers[:1], *against]


def _lines(question: Question) -> int:
    """Return how many lines with text the answer to a question has at most."""
    return max(map(n_lines, [*question.answers, ""]))


def _row(
    asker: Asker,
    record: Record,
    question: Question,
    reply: Reply,
    before: Mapping[str, str] | None,
) -> Row:
    """Return the row of a question that the model answered."""
    is_broken = not all(map(math.isfinite, reply.log_probs))
    logs = [LOWEST if is_broken else log for log in reply.log_probs]
    right = question.answers[0] if question.answers else None
    known = bool(logs)  # a server may give answers alone
    same: bool | None = None
    if before is not None and question.kind in STAYING and question.prompt in before:
        old = before[question.prompt]
        named = (each for each in question.answers if asker.says(question.prompt, old, each))
        same = stayed(old, reply.answer, next(named, None))
    tokens: float | None = None
    if reply.right and right is not None and question.kind != "negation":
        tokens = 0.0 if is_broken else reply.right[0]
    return Row(
        editor=BASE,
        unit=-1,
        record=record.id,
        kind=question.kind,
        group=question.group,
        prompt=question.prompt,
        written=-1,
        answer=reply.answer,
        exact=_is_exact(asker, question, reply.answer),
        stayed=same,
        log_wanted=logs[0] if known and right is not None else None,
        log_against=logs[-1] if known and question.against is not None else None,
        tokens=tokens,
    )


def _is_exact(asker: Asker, question: Question, answer: str) -> bool | None:
    """Return whether an answer is right; None if no answer is known to be right."""
    if question.kind == "negation":
        against = question.against
        return None if against is None else not asker.says(question.prompt, answer, against)
    if not question.answers:
        return None
    return any(asker.says(question.prompt, answer, right) for right in question.answers)


def continue_texts(
    lm: LanguageModel,
    records: Sequence[Record],
    *,
    seed: int = 0,
    editor: str = BASE,
    unit: int = -1,
) -> list[Continuation]:
    """Let a model continue the generation prompts of some records, and measure the texts.

    Args:
        lm: The model, edited or not.
        records: Records of a suite, each with a generation prompt or more.
        seed: Seed of the draws.
        editor: Name of the editor, for the result.
        unit: Number of the edit that the model carries, for the result.

    Returns:
        One continuation a record.
    """
    prompts = [prompt for record in records for prompt in record.generation_prompts]
    if not prompts:
        return []
    length = min(_CONTINUED_TOKENS, (lm.max_tokens or _CONTINUED_TOKENS + 1) - 1)
    all_texts = iter(
        lm.tokenizer.decode(ids)
        for start in range(0, len(prompts), _TEXTS_TOGETHER)
        for some in [prompts[start : start + _TEXTS_TOGETHER]]
        for ids in sample(lm, len(some), length, top_k=_TOP_K, seed=seed, openings=some, apart=True)
    )
    continuations = []
    for record in records:
        texts = tuple(next(all_texts) for _ in record.generation_prompts)
        similarity = reference_consistency(texts, record.references) if record.references else None
        continuations.append(
            Continuation(
                editor=editor,
                unit=unit,
                record=record.id,
                texts=texts,
                entropy=ngram_entropy(texts),
                consistency=similarity,
            )
        )
    return continuations
