"""Ask a model many questions at once: the likelihood of candidate answers, and its greedy answer.

    replies = ask(lm, ["The capital of France is"], [["Paris", "Rome"]], max_new_tokens=8)
    replies[0].log_probs, replies[0].says, replies[0].answer

Every prompt runs once. Its keys and values serve all candidates and the greedy answer. Logits are
read only in front of the tokens of a candidate. Prompts of similar length share a pass. The numbers
are those of asking one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_count, check_items
from ..core.errors import InputError
from ..core.progress import Progress, tell
from ..model.language_model import LanguageModel, check_model
from ..model.prefix import PrefixCache
from ..model.tokens import Batch, Joint, pad_id, target_and_joint
from ..model.trace import recording


@dataclass(frozen=True)
class Reply:
    """The reply of a model to one prompt.

    Attributes:
        answer: Greedy continuation without white space around it, to the end of the text, the line
            or the lines asked for. "" if no answer was asked for.
        log_probs: For each candidate, the mean log-probability of its tokens in nats (teacher
            forced: each token after the candidate's tokens before it). NaN from a model whose
            states are not finite. Empty, as the next two, from a server that gives none.
        right: For each candidate, the share of its tokens that are the likeliest in their place.
        n_tokens: For each candidate, its number of tokens.
    """

    answer: str
    log_probs: tuple[float, ...]
    right: tuple[float, ...]
    n_tokens: tuple[int, ...]

    @property
    def says(self) -> tuple[bool, ...]:
        """For each candidate, whether greedy decoding gives all of it."""
        return tuple(share == 1 for share in self.right)


class _Scores(NamedTuple):
    """The numbers of one candidate; see `Reply`."""

    log_prob: float
    right: float
    n_tokens: int


_Answered = tuple[str, Mapping[str, _Scores]]
"""The greedy answer to a prompt, and the scores of its candidates by name."""


@torch.no_grad()
def ask(
    lm: LanguageModel,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]] | None = None,
    *,
    max_new_tokens: int = 0,
    lines: Sequence[int] | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[Reply]:
    """Ask a model prompts, each with any number of candidate answers.

    Args:
        lm: The model.
        prompts: Whole texts. Equal prompts run once.
        candidates: A list of candidates for each prompt. None: no candidates.
        max_new_tokens: Length of the greedy answers in tokens. An answer also ends at the model's
            last position. 0: no answers.
        lines: For each prompt, how many lines with text its answer has at most. None: one.
        batch_tokens: Padded tokens in one pass.
        progress: Gets the number of prompts that are done.

    Returns:
        One reply a prompt.

    Raises:
        InputError: when there are no prompts, the lists differ in length, a prompt or candidate is
            empty, or a prompt is too long for the model.
    """
    check_model(lm)
    texts = check_items(prompts, "prompts", "texts")
    lists = (
        [()] * len(texts)
        if candidates is None
        else check_items(candidates, "candidates", "lists of texts")
    )
    if not texts or len(lists) != len(texts) or any(isinstance(each, str) for each in lists):
        raise InputError(
            f"there are {len(texts)} prompts and {len(lists)} lists of candidates; "
            "give at least one prompt, and one list for each"
        )
    n_new = check_count(
        max_new_tokens, "max_new_tokens", "the length of an answer in tokens", least=0
    )
    budget = check_count(batch_tokens, "batch_tokens")
    heads: dict[str, list[int]] = {}
    tails: dict[str, dict[str, list[int]]] = {}
    pairs = [(text, each) for text, listed in zip(texts, lists, strict=True) for each in listed]
    gaps = dict(zip(pairs, lm.gaps([a for a, _ in pairs], [b for _, b in pairs]), strict=True))
    lines_of: dict[str, int] = {}
    joints: dict[tuple[str, str], Joint] = {}
    for text, listed, n in zip(texts, lists, lines or [1] * len(texts), strict=True):
        lines_of[text] = max(n, lines_of.get(text, 1))
        if text not in heads:
            heads[text] = lm.prompt_ids(text)
        tails_of_text = tails.setdefault(text, {})
        for candidate in listed:
            if candidate not in tails_of_text:
                tails_of_text[candidate], joint = target_and_joint(
                    lm, text, candidate, head=heads[text], gap=gaps[text, candidate]
                )
                if joint is not None and lm.joint_question(joint) is not None:
                    joints[text, candidate] = joint
    distinct, rows = list(heads), list(heads.values())
    answered: dict[str, _Answered] = {}
    for group in lm.answer_groups([len(ids) for ids in rows], n_new, budget):
        names = [distinct[i] for i in group]
        replies = _answer_group(
            lm,
            [rows[i] for i in group],
            [tails[name] for name in names],
            n_new,
            [lines_of[name] for name in names],
        )
        answered.update(zip(names, replies, strict=True))
        tell(progress, "asking", len(answered), len(distinct))
    if joints:
        _take_likelier(lm, answered, joints, budget)
    return [_reply(*answered[text], listed) for text, listed in zip(texts, lists, strict=True)]


def _take_likelier(
    lm: LanguageModel,
    answered: dict[str, _Answered],
    joints: Mapping[tuple[str, str], Joint],
    budget: int,
) -> None:
    """Score candidates as one text with their prompts, and keep what is likelier.

    Args:
        lm: The model.
        answered: The answers and scores by prompt. Changed in place.
        joints: The one text of those (prompt, candidate) that share a token.
        budget: Padded tokens in one pass.
    """
    listed = list(joints.items())
    for group in lm.answer_groups([len(joint.head) for _, joint in listed], 0, budget):
        some = [listed[i] for i in group]
        heads, tails = [joint.head for _, joint in some], [{"": joint.tail} for _, joint in some]
        replies = _answer_group(lm, heads, tails, 0, [1] * len(some))
        for ((text, candidate), _), (_, scores) in zip(some, replies, strict=True):
            answer, before = answered[text]
            apart, joined = before[candidate], scores[""]
            sums = [each.log_prob * each.n_tokens for each in (apart, joined)]
            if sums[1] > sums[0]:
                lm.warn_joined(text, candidate, *sums)
                answered[text] = answer, {**before, candidate: joined}


def _reply(answer: str, scores: Mapping[str, _Scores], candidates: Sequence[str]) -> Reply:
    listed = [scores[candidate] for candidate in candidates]
    return Reply(
        answer=answer,
        log_probs=tuple(each.log_prob for each in listed),
        right=tuple(each.right for each in listed),
        n_tokens=tuple(each.n_tokens for each in listed),
    )


def _answer_group(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    tails: Sequence[Mapping[str, list[int]]],
    n_new: int,
    lines: Sequence[int],
) -> Iterator[_Answered]:
    """Yield the answers to prompts that share a pass.

    Args:
        lm: The model.
        rows: Token ids of each prompt.
        tails: For each prompt, the token ids of its candidates by name.
        n_new: Length of the greedy answers in tokens.
        lines: For each prompt, how many lines with text its answer has at most.
    """
    batch = lm.align(rows, [len(ids) - 1 for ids in rows])
    logits, cache = lm.begin(batch)
    # The cache grows by new tensors in place of its own, so these tensors do not change.
    prefix = None if cache is None else [(layer.keys, layer.values) for layer in cache.layers]
    pairs = [(row, name, ids) for row, named in enumerate(tails) for name, ids in named.items()]
    log_sums, n_right = (
        torch.zeros(len(pairs), dtype=torch.float32),
        torch.zeros(len(pairs), dtype=torch.float32),
    )
    if pairs:
        first_tokens = torch.tensor([ids[0] for *_, ids in pairs])
        logits_of_pairs = logits[torch.tensor([row for row, _, _ in pairs], device=logits.device)]
        _count(log_sums, n_right, torch.arange(len(pairs)), logits_of_pairs, first_tokens)
    longer = [i for i, (*_, ids) in enumerate(pairs) if len(ids) > 1]
    for part in lm.groups([len(pairs[i][2]) for i in longer]) if longer else []:
        chosen = [longer[i] for i in part]
        hidden = _run_tails(
            lm, batch, prefix, [pairs[i][0] for i in chosen], [pairs[i][2][:-1] for i in chosen]
        )
        places = [
            (line, column, i, token)
            for line, i in enumerate(chosen)
            for column, token in enumerate(pairs[i][2][1:])
        ]
        # Logits are the largest tensors of all, so only some places get them at a time.
        for some in (places[start : start + 256] for start in range(0, len(places), 256)):
            tail_rows, columns, owners, tokens = (
                torch.tensor(column) for column in zip(*some, strict=True)
            )
            states = hidden[tail_rows.to(hidden.device), columns.to(hidden.device)]
            _count(log_sums, n_right, owners, lm.head(states), tokens)
    scores: list[dict[str, _Scores]] = [{} for _ in tails]
    totals = zip(pairs, log_sums.tolist(), n_right.tolist(), strict=True)
    for (row, name, ids), log_sum, right in totals:
        scores[row][name] = _Scores(log_sum / len(ids), right / len(ids), len(ids))
    answers: list[list[int]] = [[] for _ in rows]
    if n_new:
        answers = lm.continue_from(batch, logits, cache, n_new, lines)
    for ids, n, named_scores in zip(answers, lines, scores, strict=True):
        yield lm.as_answer(ids, n), named_scores


def _count(
    log_sums: Tensor, n_right: Tensor, owners: Tensor, logits: Tensor, tokens: Tensor
) -> None:
    """Add the log-probabilities of tokens, and whether they are the likeliest, to sums.

    Args:
        log_sums: One sum of log-probabilities for each owner. Changed in place.
        n_right: One number of likeliest tokens for each owner. Changed in place.
        owners: (N,) the owner of each token.
        logits: (N, vocab) in the place where the token belongs.
        tokens: (N,) token ids.
    """
    due = tokens.to(logits.device)
    logs = logits.float().log_softmax(-1).gather(1, due[:, None])[:, 0]
    log_sums.index_add_(0, owners, logs.cpu())
    n_right.index_add_(0, owners, ((logits.argmax(-1) == due) & ~logs.isnan()).float().cpu())


def _run_tails(
    lm: LanguageModel,
    batch: Batch,
    prefix: list[tuple[Tensor, Tensor]] | None,
    rows: Sequence[int],
    tails: Sequence[Sequence[int]],
) -> Tensor:
    """Return the last layer's output at tokens that follow prompts.

    Args:
        lm: The model.
        batch: The prompts.
        prefix: Keys and values of each layer at the prompts. None: the model has no such cache, and
            the prompts run again.
        rows: (R,) the prompt of each tail, as a row of the batch.
        tails: R lists of token ids.

    Returns:
        (R, longest tail, d_model).
    """
    width, device = max(map(len, tails)), batch.input_ids.device
    head = batch.keep(torch.tensor(rows))
    ids = torch.full((len(rows), width), pad_id(lm.tokenizer))
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tail in enumerate(tails):
        ids[row, : len(tail)] = torch.tensor(tail)
        mask[row, : len(tail)] = 1
    # A padding column on the right repeats the position of the row's last token.
    positions = head.position_ids[:, -1:] + mask.to(device).cumsum(1)
    whole = Batch(
        torch.cat([head.input_ids, ids.to(device)], 1),
        torch.cat([head.attention_mask, mask.to(device)], 1),
        torch.cat([head.position_ids, positions], 1),
        batch.width,
    )
    lm.check_batch(whole)
    start = 0 if prefix is None else batch.width
    cache = None if prefix is None else PrefixCache(prefix, torch.tensor(rows))
    with recording({"last": lm.layers[-1]}, stop=True) as calls:
        lm.forward(whole, start=start, cache=cache)
    return calls["last"][0].output[:, batch.width - start :]
