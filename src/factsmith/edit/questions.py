"""What the search for a target asks of the model, as tokens.

    question = tokenize_fact(lm, fact, contexts)      # one sequence for each context, and the guard
    places = Places.of(questions, without, device)    # where in the batch the answers are read

The guard is the prompt "{} is a". What the model predicts after the subject there says what the
subject is. It must stay (ROME, equation 4, second term).

A fact without a target is one to forget. Then the model should continue each prompt as it does when
the subject's tokens are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.fact import Fact
from ..core.gap import plain_gap
from ..core.slots import fill
from ..model.language_model import LanguageModel
from ..model.tokens import target_ids
from .batches import Size
from .keys import in_context, subject_columns

GUARD = "{} is a"
"""The prompt of the guard: what the model predicts after the subject must stay."""


@dataclass(frozen=True)
class Question:
    """One fact as token sequences.

    Attributes:
        fact: The fact.
        sequences: For each context, the prompt and the target without its last token. Then the
            guard, unless a context begins with the subject as the guard does.
        pivots: For each sequence, the column of the subject's last token.
        guard: The sequence that is read as the guard.
        reads: For each context, the columns whose next token is one of the target's, counted from
            the pivot.
        targets: For each context, the target's tokens. Empty for a fact to forget.
        without: For each context of a fact to forget, the prompt without the subject's tokens.
            Otherwise empty.
        left_out: The number of contexts for which the model has no positions. The bare prompt is
            in their place.
    """

    fact: Fact
    sequences: list[list[int]]
    pivots: list[int]
    guard: int
    reads: list[list[int]]
    targets: list[list[int]]
    without: list[list[int]]
    left_out: int = 0

    @property
    def size(self) -> Size:
        """The size of a batch that holds this question alone."""
        pairs = zip(self.sequences, self.pivots, strict=True)
        width = max(len(ids) - pivot for ids, pivot in pairs)
        answers = 1 + sum(map(len, self.reads))
        return Size(len(self.sequences), width, max(self.pivots) + width, answers)


@dataclass(frozen=True)
class Places:
    """Where in a batch the answers of n questions are read.

    The batch has R rows. Each of N places is one target token of one fact in one context. M of them
    belong to facts to forget, where a whole distribution is wanted.

    Attributes:
        owners: (R,) the question that each row belongs to.
        contexts: (n, n_contexts) the row of each question in each context.
        guards: (n,) each question's guard row.
        rows: (N,) the row of each place.
        columns: (N,) its live column.
        targets: (N,) the token that is wanted next. Without meaning if a distribution is wanted.
        shares: (N,) the weight of each place in its fact's mean.
        blank: (M,) the places where a distribution is wanted.
        without: (M, vocab) the log-probabilities wanted there.
    """

    owners: Tensor
    contexts: Tensor
    guards: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    shares: Tensor
    blank: Tensor
    without: Tensor

    @classmethod
    def of(
        cls, questions: Sequence[Question], without: Sequence[Tensor | None], device: torch.device
    ) -> Places:
        """Return the places of some questions.

        Args:
            questions: The questions of the batch, in the order of their rows.
            without: For each fact to forget, the log-probabilities (n_contexts, vocab) that the
                model gives without the subject. None for other facts.
            device: Where the tensors are made.
        """
        firsts = [0, *accumulate(len(q.sequences) for q in questions)]
        flat = [
            (first + c, column, token, q.without != [], 1 / (len(q.reads) * len(columns)))
            for first, q in zip(firsts, questions, strict=False)
            for c, columns in enumerate(q.reads)
            for column, token in zip(columns, q.targets[c] if q.targets else [0], strict=True)
        ]
        *numbers, shares = zip(*flat, strict=True)
        rows, columns, targets, blank = (torch.tensor(each, device=device) for each in numbers)
        first = torch.tensor(firsts[:-1], device=device)
        n_rows = torch.tensor([len(q.sequences) for q in questions], device=device)
        wanted = [log_p for log_p in without if log_p is not None]
        return cls(
            owners=torch.repeat_interleave(n_rows),
            contexts=first[:, None] + torch.arange(len(questions[0].reads), device=device),
            guards=first + torch.tensor([q.guard for q in questions], device=device),
            rows=rows,
            columns=columns,
            targets=targets,
            shares=torch.tensor(shares, device=device, dtype=torch.float32),
            blank=blank.nonzero()[:, 0],
            without=torch.cat(wanted)
            if wanted
            else torch.empty(0, 0, device=device, dtype=torch.float32),
        )


def tokenize_facts(
    lm: LanguageModel, facts: Sequence[Fact], contexts: Sequence[str]
) -> list[Question]:
    """Return each fact as token sequences, as `tokenize_fact` does.

    What stands between the prompts and the targets is settled for all of them together.
    """
    chats = [context for context in contexts if not context.endswith("{}")]
    pairs = [(fact, fact.target) for fact in facts if fact.target is not None]
    prompts = [context.replace("{}", fact.text) for fact, _ in pairs for context in chats]
    lm.gaps(prompts, [target for _, target in pairs for _ in chats])
    return [tokenize_fact(lm, fact, contexts) for fact in with_gaps(lm, facts)]


def with_gaps(lm: LanguageModel, facts: Sequence[Fact]) -> list[Fact]:
    """Return the facts, each with the gap before its target where the model had to choose it.

    A kept patch is then always asked for the target's tokens that it was made for.
    """
    open_facts = {
        i: str(fact.target or fact.target_true)
        for i, fact in enumerate(facts)
        if fact.gap == "auto" and (fact.target or fact.target_true)
    }
    doubtful = [
        i for i, target in open_facts.items() if not plain_gap(facts[i].text, target.strip()).sure
    ]
    gaps = lm.gaps([facts[i].text for i in doubtful], [open_facts[i] for i in doubtful])
    settled = dict(zip(doubtful, gaps, strict=True))
    return [
        Fact.from_dict({**fact.to_dict(), "gap": settled[i]}) if i in settled else fact
        for i, fact in enumerate(facts)
    ]


def tokenize_fact(lm: LanguageModel, fact: Fact, contexts: Sequence[str]) -> Question:
    """Return a fact as token sequences, one for each context, and the guard.

    Raises:
        SubjectError: The subject has no token.
        InputError: The target has no token, or the prompt of a fact to forget ends with its
            subject.
    """
    bare = None if fact.target is None else target_ids(lm, fact.text, fact.target, gap=fact.gap)
    sequences: list[list[int]] = []
    pivots: list[int] = []
    reads: list[list[int]] = []
    targets: list[list[int]] = []
    without: list[list[int]] = []
    left_out = 0
    for context in contexts:
        template = in_context(lm, context, fact)
        left_out += template == fact.template and context != "{}"
        ids, first, pivot = subject_columns(lm, template, fact.subject)
        target = bare
        if target is not None and not template.endswith(fact.template):
            # A chat template: other text stands before the answer, so its tokens may differ.
            target = target_ids(lm, fill(template, fact.subject).text, str(fact.target))
        tokens = [0] if target is None else target
        sequences.append(ids + tokens[:-1])
        pivots.append(pivot)
        reads.append([len(ids) - 1 - pivot + i for i in range(len(tokens))])
        if target is not None:
            targets.append(target)
        else:
            without.append(_without_subject(fact, ids, first, pivot))
    ids, _, pivot = subject_columns(lm, GUARD, fact.subject)
    ids = ids[: pivot + 1]  # it is read at the subject token, which does not see what follows
    alike = (i for i, tokens in enumerate(sequences) if tokens[: pivots[i] + 1] == ids)
    guard = next(alike, len(sequences))
    if guard == len(sequences):
        sequences.append(ids)
        pivots.append(pivot)
    return Question(fact, sequences, pivots, guard, reads, targets, without, left_out)


def _without_subject(fact: Fact, ids: list[int], first: int, pivot: int) -> list[int]:
    """Return a prompt's tokens without those of the subject, columns `first` to `pivot`."""
    rest = ids[:first] + ids[pivot + 1 :]
    if pivot == len(ids) - 1 or not rest:
        raise InputError(
            f"{fact.text!r} ends with its subject, so the model cannot continue it without the "
            "subject. To forget a fact, give a prompt that goes on after the subject."
        )
    return rest


@torch.no_grad()
def log_probs_without_subject(lm: LanguageModel, question: Question) -> Tensor | None:
    """Return what the model says when the subject's tokens are left out.

    Returns:
        (n_contexts, vocab) log-probabilities of the next token. None if the fact has a target.
    """
    if not question.without:
        return None
    hidden = [lm.last_hidden(lm.align([ids], [len(ids) - 1]))[0, -1] for ids in question.without]
    return lm.head(torch.stack(hidden)).float().log_softmax(-1)
