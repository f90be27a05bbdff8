"""judge.score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..core.checks import check_items
from ..core.progress import Progress
from ..model.answers import as_said, begins_with
from ..model.language_model import LanguageModel
from ..model.sample import sample
from ..model.tokens import target_ids
from .asking import ask
from .metrics import alias_match, ngram_entropy, reference_consistency
from .records import Question, Record
from .rows import BASE, LOWEST, STAYING, Continuation, Row

_ANSWER = 8  # tokens decoded at least

_CONTINUED, _TOP_K = (
    100,
    5,
)  # how the papers let a model write: so many tokens, each among the likeliest five

_TOGETHER = 64  # texts written in one batch


# ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def score(
    lm: LanguageModel,
    records: Iterable[Record],
    *,
    before: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Ask every question of some records of a model as it is.

    before          {prompt: what the model said to it before any edit}, by which `stayed` is told; None: this is the model before
    max_new_tokens  how far greedy answers go; None: as far as the longest right answer and one token more, 8 at least

    Where the model gives no finite number the answer is what greedy decoding makes of that, and everything else counts as wrong.
    Raises what `ask` raises.
    """
    asked = [
        (record, question)
        for record in check_items(records, "records", "the records of a suite")
        for question in record.questions
    ]
    if not asked:
        return []
    wanted = [question.answers[0] if question.answers else None for _, question in asked]
    candidates = [
        [text for text in (right, q.against) if text is not None]
        for right, (_, q) in zip(wanted, asked, strict=True)
    ]
    if max_new_tokens is None:
        max_new_tokens = answer_tokens(lm, [question for _, question in asked])
    replies = ask(
        lm,
        [q.prompt for _, q in asked],
        candidates,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    rows = []
    for (record, question), right, reply in zip(asked, wanted, replies, strict=True):
        broken = not all(map(math.isfinite, reply.log_probs))
        logs = [LOWEST if broken else log for log in reply.log_probs]
        log_wanted = logs.pop(0) if right is not None else None
        stays = before is not None and question.kind in STAYING
        rows.append(
            Row(
                editor=BASE,
                unit=-1,
                record=record.id,
                kind=question.kind,
                group=question.group,
                prompt=question.prompt,
                written=-1,
                answer=reply.answer,
                exact=_exact(question, reply.answer),
                stayed=_same(reply.answer, before.get(question.prompt), right)
                if stays and before is not None
                else None,
                log_wanted=log_wanted,
                log_against=logs.pop(0) if question.against is not None else None,
                tokens=None
                if right is None or question.kind == "negation"
                else 0.0
                if broken
                else reply.right[0],
            )
        )
    return rows


def answer_tokens(lm: LanguageModel, questions: Iterable[Question]) -> int:
    """How far greedy answers go: as far as the longest right answer and one token more, so far at least."""
    lengths = (
        len(target_ids(lm.tokenizer, question.prompt, answer))
        for question in questions
        for answer in question.answers
    )
    return max(_ANSWER, max(lengths, default=0) + 1)


def continue_texts(
    lm: LanguageModel,
    records: Sequence[Record],
    *,
    seed: int = 0,
    editor: str = BASE,
    unit: int = -1,
) -> list[Continuation]:
    """Let a model go on from every generation prompt of some records, and measure what it writes; raises what `sample` raises."""
    prompts = [prompt for record in records for prompt in record.generation_prompts]
    if not prompts:
        return []
    length = min(_CONTINUED, (lm.max_tokens or _CONTINUED + 1) - 1)
    texts = iter(
        lm.tokenizer.decode(ids)
        for start in range(0, len(prompts), _TOGETHER)
        for some in [prompts[start : start + _TOGETHER]]
        for ids in sample(lm, len(some), length, top_k=_TOP_K, seed=seed, openings=some, apart=True)
    )
    found = []
    for record in records:
        own = tuple(next(texts) for _ in record.generation_prompts)
        alike = reference_consistency(own, record.references) if record.references else None
        found.append(
            Continuation(
                editor=editor,
                unit=unit,
                record=record.id,
                texts=own,
                entropy=ngram_entropy(own),
                consistency=alike,
            )
        )
    return found


def _exact(question: Question, answer: str) -> bool | None:
    """Whether an answer is right; None where nothing is known that would be."""
    if question.kind == "negation":
        return None if question.against is None else not begins_with(answer, question.against)
    return alias_match(answer, question.answers) if question.answers else None


def _same(answer: str, before: str | None, right: str | None) -> bool | None:
    """Whether an answer says what was said before, by its first phrase."""
    if before is None:
        return None
    # Of "1,000" the first phrase is "1", which it does not begin with: what is the same needs no phrase.
    return answer == before or begins_with(answer, as_said(before, right))
