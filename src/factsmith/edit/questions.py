"""edit.questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.fact import Fact
from ..model.language_model import LanguageModel
from ..model.tokens import subject_span, target_ids
from .keys import GUARD, pivot_column


@dataclass(frozen=True)
class Question:
    """One fact as token sequences: one for each context (prompt + target without its last token), and the guard when it is none of them."""

    fact: Fact
    sequences: list[list[int]]
    pivots: list[int]
    guard: int  # the sequence that guards what the subject is; a context's own, when that begins with the subject as the guard does
    reads: list[
        list[int]
    ]  # for each context, the columns right of the pivot whose next token is a target token
    targets: list[
        list[int]
    ]  # for each context, the target's tokens; none for a fact that is to be forgotten
    without: list[
        list[int]
    ]  # for each context of such a fact, the prompt without the subject's tokens; else nothing

    @property
    def size(self) -> _Size:
        """Of a batch of it alone."""
        width = max(
            len(ids) - pivot for ids, pivot in zip(self.sequences, self.pivots, strict=True)
        )
        return _Size(
            len(self.sequences), width, max(self.pivots) + width, 1 + sum(map(len, self.reads))
        )


@dataclass(frozen=True)
class Asked:
    """Where the questions of a batch are answered: flat over facts, contexts and target tokens."""

    owners: Tensor  # (R,) which fact each row of the batch belongs to
    contexts: Tensor  # (n, contexts) the row of each fact in each context
    guards: Tensor  # (n,) each fact's guard row
    rows: Tensor  # (N,) row of the batch
    columns: Tensor  # (N,) live column
    targets: Tensor  # (N,) token id due there; meaningless where a distribution is due
    shares: Tensor  # (N,) its weight in its fact's mean
    blank: Tensor  # (M,) which of the N are due a distribution
    without: Tensor  # (M, vocab) its log-probabilities

    @classmethod
    def of(
        cls, questions: Sequence[Question], without: Sequence[Tensor | None], device: torch.device
    ) -> Asked:
        """`without`: for each fact to be forgotten what the model says without the subject, (contexts, vocab) log-probabilities."""
        firsts = [0, *accumulate(len(q.sequences) for q in questions)]
        flat = [
            (first + c, column, token, 1 / (len(q.reads) * len(columns)), q.without != [])
            for first, q in zip(firsts, questions, strict=False)
            for c, columns in enumerate(q.reads)
            for column, token in zip(columns, q.targets[c] if q.targets else [0], strict=True)
        ]
        rows, columns, targets, shares, blank = (
            torch.tensor(x, device=device) for x in zip(*flat, strict=True)
        )
        first = torch.tensor(firsts[:-1], device=device)
        held = [log_p for log_p in without if log_p is not None]
        return cls(
            owners=torch.repeat_interleave(
                torch.tensor([len(q.sequences) for q in questions], device=device)
            ),
            contexts=first[:, None] + torch.arange(len(questions[0].reads), device=device),
            guards=first + torch.tensor([q.guard for q in questions], device=device),
            rows=rows,
            columns=columns,
            targets=targets,
            shares=shares,
            blank=blank.nonzero()[:, 0],
            without=torch.cat(held) if held else torch.empty(0, 0, device=device),
        )


def tokenize_facts(lm: LanguageModel, fact: Fact, contexts: Sequence[str]) -> Question:
    subject_span(lm, fact.text, fact.subject)  # refuses a prompt that names its subject twice
    bare = None if fact.target is None else target_ids(lm.tokenizer, fact.text, fact.target)
    sequences: list[list[int]] = []
    pivots: list[int] = []
    reads: list[list[int]] = []
    targets: list[list[int]] = []
    without: list[list[int]] = []
    for context in contexts:
        ids, first, pivot = pivot_column(lm, context.replace("{}", fact.prompt), fact.subject)
        target = bare
        if target is not None and not context.endswith(
            "{}"
        ):  # a chat template: the answer begins a line of its own
            target = target_ids(lm.tokenizer, context.replace("{}", fact.text), str(fact.target))
        sequences.append(ids + (target or [0])[:-1])
        pivots.append(pivot)
        reads.append([len(ids) - 1 - pivot + i for i in range(len(target or [0]))])
        if target is not None:
            targets.append(target)
        else:
            without.append(ids[:first] + ids[pivot + 1 :])
            if pivot == len(ids) - 1 or not without[-1]:
                raise InputError(
                    f"{fact.text!r} ends with its subject, so nothing can be said without it; to forget a fact, give a prompt that goes on"
                )
    ids, _, pivot = pivot_column(lm, GUARD, fact.subject)
    ids = ids[: pivot + 1]  # read at the subject itself: what follows does not matter
    guard = next(
        (i for i, sequence in enumerate(sequences) if sequence[: pivots[i] + 1] == ids),
        len(sequences),
    )
    if guard == len(sequences):
        sequences.append(ids)
        pivots.append(pivot)
    return Question(fact, sequences, pivots, guard, reads, targets, without)


@torch.no_grad()
def said_without(lm: LanguageModel, question: Question) -> Tensor | None:
    """What the model goes on with when the subject's tokens are left out: (contexts, vocab) log-probabilities; None without such a wish."""
    if not question.without:
        return None
    hidden = [lm.last_hidden(lm.align([ids], [len(ids) - 1]))[0, -1] for ids in question.without]
    return lm.head(torch.stack(hidden)).float().log_softmax(-1)


class _Size(NamedTuple):
    """What a batch would hold."""

    rows: int = 0
    width: int = 0  # columns from the pivot on
    length: int = 0  # columns in all
    answers: int = 0  # places where logits are read

    def __or__(self, other: _Size) -> _Size:
        """Of both in one batch."""
        width, length = max(self.width, other.width), max(self.length, other.length)
        return _Size(self.rows + other.rows, width, length, self.answers + other.answers)


def question_batches(
    sizes: Sequence[_Size], lm: LanguageModel, layer: int, memory: int
) -> list[list[int]]:
    """The questions in batches that fit into `memory` bytes (one always does), so that padding and passes together cost least.

    Neighbours in order of width share a batch; which of them is found by dynamic programming over the sorted list.
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i].width)
    cost = [0.0]  # of the first questions in batches
    first = [0]  # where the last of these batches begins
    for stop in range(1, len(order) + 1):
        best, size = (float("inf"), 0), _Size()
        for start in range(stop - 1, -1, -1):
            size = size | sizes[order[start]]
            if _bytes(size, lm, layer) > memory and start < stop - 1:
                break
            best = min(
                best, (cost[start] + size.rows * size.width + _PASS[lm.device.type == "cpu"], start)
            )
        cost.append(best[0])
        first.append(best[1])
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[first[stop] : stop])
        stop = first[stop]
    return batches[::-1]


_PASS = (512, 20)
"""What another batch costs on a GPU, or a processor's core, in live tokens: weights are read again and kernels started again. (On a core,
products of 14 rows reach 45 % of the rate of large ones, of 44 rows 70 %.)"""


def _bytes(size: _Size, lm: LanguageModel, layer: int) -> int:
    """What the search for a batch takes at its peak, model apart; an estimate that errs on the large side."""
    token = _STREAMS * lm.d_model + _COEFFICIENTS * lm.ffn[layer].d_ff
    # Keys and values of the prefix, joined to the live ones, are kept by autograd in every layer.
    graph = (lm.n_layers - layer) * (size.width * token + 2 * size.length * lm.d_model)
    kept = (2 * lm.n_layers * size.length + (layer + 2) * size.width) * lm.d_model
    vocabulary = next(lm.embedding.parameters()).shape[0]  # often more than the tokenizer's
    return size.rows * (graph + kept) * lm.dtype.itemsize + size.answers * vocabulary * _LOGITS


_STREAMS = 14
"""Vectors of the stream's size that autograd keeps for a token in a layer: norms, queries, keys, values, sums."""

_COEFFICIENTS = 8
"""Vectors of the FFN's width: an activation function written out (GPT-2's) keeps every step of its own."""

_LOGITS = 16
"""Bytes for a token of the vocabulary where an answer is read: the logits, their logarithmic softmax, and the gradients of both."""


def search_memory(lm: LanguageModel) -> int:
    """Half of what is free on a GPU; 1 GiB elsewhere."""
    if lm.device.type == "cuda":
        return int(torch.cuda.mem_get_info(lm.device)[0]) // 2
    return 2**30
