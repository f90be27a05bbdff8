"""The questions to an export, and what the models in memory answer to them.

    questions = ask(lm, deltas)
    questions.prompts, questions.picks, questions.patched      # asked, answered, and the logits

The questions are the prompts of the patched facts. Each is asked as a row: the prompt, followed by
the patched model's greedy answer. One pass over a row shows whether another model gives the same
answer: it does if each token of the answer is the likeliest one after those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...edit.delta import Delta, applied, read_weights, written
from ...model.answers import answer_tokens, is_answered, n_lines
from ...model.language_model import LanguageModel
from ...model.tokens import target_ids

_PROMPTS = 100
"""The most facts that are asked; of more facts, so many at even intervals."""

_CANDIDATES = 16


class Candidates(NamedTuple):
    """The likeliest tokens at each place of an answer.

    Attributes:
        values: (places, 17) their logits. The first is that of the token that greedy decoding
            takes; the 16 largest follow.
        ids: (places, 17) the tokens.
    """

    values: Tensor
    ids: Tensor


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What an export is asked, and what the models in memory answer.

    Attributes:
        prompts: The texts.
        facts: How many facts there are; not all are asked if there are many.
        prompt_ids: The tokens of each prompt, without an end token that the tokenizer appends.
        tokenized: What the tokenizer by itself makes of each prompt.
        rows: The tokens of each prompt, followed by those of the patched model's greedy answer.
        strict: How many tokens of each answer are the target. These must be equal, also at a tie.
        picks: The likeliest token at each place of each answer.
        candidates: The likeliest tokens at these places, which say how close another token is.
        patched: (n, vocab) float32, the patched model's logits after the prompts.
        expected: (n, vocab) float32, the logits that the files should give.
        base: (n, vocab) float32, the base model's logits.
        device: Where the models in memory answered.
        answer: Turns tokens into text.
    """

    prompts: list[str]
    facts: int
    prompt_ids: list[list[int]]
    tokenized: list[list[int]]
    rows: list[list[int]]
    strict: list[int]
    picks: list[list[int]]
    candidates: list[Candidates]
    patched: Tensor
    expected: Tensor
    base: Tensor
    device: str
    answer: Callable[[Sequence[int]], str]


def ask(
    lm: LanguageModel,
    deltas: Sequence[Delta],
    factors: Mapping[int, tuple[Tensor, Tensor]] | None = None,
) -> Questions:
    """Choose what to ask an export, and ask the models in memory.

    Args:
        lm: The model, without the deltas.
        deltas: The patches.
        factors: {layer: (left, right)} as they are written, if they are not exactly the sum of the
            deltas. None: they are.
    """
    newest = {fact.asked: fact for delta in deltas for fact in delta.facts}
    facts = {fact.text: fact for fact in newest.values()}
    texts = list(facts)
    n = min(len(texts), _PROMPTS)
    prompts = [texts[i * len(texts) // n] for i in range(n)]
    prompt_ids = [lm.prompt_ids(prompt) for prompt in prompts]
    targets = [facts[prompt].target or "" for prompt in prompts]
    with applied(lm, deltas):
        lines = [n_lines(target) for target in targets]
        answers = lm.greedy_ids(prompt_ids, answer_tokens(lm, prompts, targets), lines)
        rows = [
            (ids + answer)[: lm.max_tokens] for ids, answer in zip(prompt_ids, answers, strict=True)
        ]
        passes = [run_row(lm, row, len(ids)) for row, ids in zip(rows, prompt_ids, strict=True)]
    candidates = [each for _, each in passes]
    patched = torch.stack([logits for logits, _ in passes])
    expected = patched
    if factors is not None:
        with written(lm, _summed(lm, factors)):
            expected = _last_logits(lm, rows, prompt_ids)
    return Questions(
        prompts=prompts,
        facts=len(texts),
        prompt_ids=prompt_ids,
        tokenized=[list(lm.tokenizer(prompt)["input_ids"]) for prompt in prompts],
        rows=rows,
        strict=[
            len(target_ids(lm, prompt, target, gap=facts[prompt].gap))
            if target and is_answered(lm, prompt, lm.as_answer(answer, n), target)
            else 0
            for prompt, target, answer, n in zip(prompts, targets, answers, lines, strict=True)
        ],
        picks=[
            _picks(each.ids[:, 0].tolist(), answer, lm.end_ids)
            for each, answer in zip(candidates, answers, strict=True)
        ],
        candidates=candidates,
        patched=patched,
        expected=expected,
        base=_last_logits(lm, rows, prompt_ids),
        device=str(lm.device),
        answer=lm.as_answer,
    )


def _summed(lm: LanguageModel, factors: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """Return the base weights plus the product of some factors, rounded to the model's dtype."""
    summed = {}
    for layer, weight in read_weights(lm, factors).items():
        left, right = (factor.to(weight.device, torch.float32) for factor in factors[layer])
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        summed[layer] = (wide + left @ right).to(weight.dtype)
    return summed


def _last_logits(
    lm: LanguageModel, rows: Sequence[list[int]], prompt_ids: Sequence[list[int]]
) -> Tensor:
    """Return the logits after each prompt, (n, vocab)."""
    return torch.stack(
        [run_row(lm, row, len(ids))[0] for row, ids in zip(rows, prompt_ids, strict=True)]
    )


def _picks(picks: list[int], answer: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return the likeliest tokens that make up an answer.

    The end of the text belongs to the answer that it ends. What follows a line does not.
    """
    n = len(answer)
    return picks[: n + 1] if n < len(picks) and picks[n] in ends else picks[:n]


@torch.no_grad()
def run_row(lm: LanguageModel, row: Sequence[int], length: int) -> tuple[Tensor, Candidates]:
    """Run the model over one row: the logits after its first `length` tokens, and the candidates
    from there on."""
    logits = (
        lm.module(input_ids=torch.tensor([row], device=lm.device))
        .logits[0, length - 1 :]
        .float()
        .cpu()
    )
    top = logits.topk(min(_CANDIDATES, logits.shape[-1]), dim=-1)
    taken = logits.argmax(-1, keepdim=True)  # of equal logits, topk and argmax may differ
    values = torch.cat([logits.gather(-1, taken), top.values], -1)
    return logits[0].clone(), Candidates(values, torch.cat([taken, top.indices], -1))
