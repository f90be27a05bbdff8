"""Many questions put to a model at once: how likely each candidate answer is, and what the model says by itself.

    replies = ask(lm, ["The capital of France is"], [["Paris", "Rome"]])
    replies[0].log_probs, replies[0].says, replies[0].answer

Every prompt is run once, whatever is asked of it: its keys and values serve all candidates and the greedy answer, and logits are read
where an answer's tokens are due and nowhere else. Prompts of similar length share a pass. The numbers are those of asking one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check_count, check_items
from ..core.errors import InputError
from ..core.progress import Progress, tell
from ..model.language_model import LanguageModel, check_model
from ..model.replay import PrefixCache
from ..model.tokens import Batch, pad_id, target_ids
from ..model.trace import recording


@dataclass(frozen=True)
class Reply:
    """What a model says to one prompt.

    answer     its greedy continuation, without white space around it, to the end of the text or the line; "" where none was asked for
    log_probs  for each candidate the mean log-probability of its tokens, in nats (teacher forced: each after those before it); NaN from a
               model that computes no finite states
    right      for each candidate the share of its tokens that are the likeliest in their place
    n_tokens   for each candidate its number of tokens
    """

    answer: str
    log_probs: tuple[float, ...]
    right: tuple[float, ...]
    n_tokens: tuple[int, ...]

    @property
    def says(self) -> tuple[bool, ...]:
        """For each candidate whether greedy decoding gives all of it."""
        return tuple(share == 1 for share in self.right)


@torch.no_grad()
def ask(
    lm: LanguageModel,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]] | None = None,
    *,
    max_new_tokens: int = 0,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[Reply]:
    """Put prompts to a model, each with any number of candidate answers.

    candidates      for each prompt its candidates; None: none for any
    max_new_tokens  how far the greedy answers go, or to the model's last position, whatever else is asked; 0: none are asked for
    batch_tokens    padded tokens in one pass

    Raises InputError for no prompts, lists of different length, an empty prompt or candidate, and prompts too long for the model.
    """
    check_model(lm)
    texts = check_items(prompts, "prompts", "texts")
    wanted = (
        [()] * len(texts)
        if candidates is None
        else check_items(candidates, "candidates", "lists of texts")
    )
    if not texts or len(wanted) != len(texts) or any(isinstance(own, str) for own in wanted):
        raise InputError(
            f"got {len(texts)} prompts and {len(wanted)} lists of candidates; expected at least one prompt, and as many lists"
        )
    n_new = check_count(
        max_new_tokens, "max_new_tokens", "the length of an answer in tokens", least=0
    )
    budget = check_count(batch_tokens, "batch_tokens")
    # What is asked of equal prompts is asked once.
    tails: dict[str, dict[str, list[int]]] = {}
    heads: dict[str, list[int]] = {}
    for text, own in zip(texts, wanted, strict=True):
        known = tails.setdefault(text, {})
        if text not in heads:
            heads[text] = lm.prompt_ids(text)
        for candidate in own:
            if candidate not in known:
                known[candidate] = target_ids(lm.tokenizer, text, candidate, head=heads[text])
    distinct, rows = list(heads), list(heads.values())
    found: dict[str, tuple[str, dict[str, tuple[float, float, int]]]] = {}
    for group in _groups(lm, [len(ids) for ids in rows], n_new, budget):
        names = [distinct[i] for i in group]
        for name, reply in zip(
            names,
            _asked(lm, [rows[i] for i in group], [tails[name] for name in names], n_new),
            strict=True,
        ):
            found[name] = reply
        tell(progress, "asking", len(found), len(distinct))
    replies = []
    for text, own in zip(texts, wanted, strict=True):
        answer, scored = found[text]
        columns = [scored[candidate] for candidate in own]
        replies.append(
            Reply(answer, *(tuple(column) for column in zip(*columns, strict=True)))
            if columns
            else Reply(answer, (), (), ())
        )
    return replies


def _groups(lm: LanguageModel, lengths: list[int], n_new: int, budget: int) -> Iterator[list[int]]:
    """Prompts that share a pass: alike in length, and with room for as long an answer, so that none is cut short for another's sake."""
    apart: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        apart.setdefault(
            n_new if lm.max_tokens is None else min(n_new, lm.max_tokens - length + 1), []
        ).append(i)
    for own in apart.values():
        yield from (
            [own[i] for i in group] for group in lm.groups([lengths[i] for i in own], budget)
        )


def _asked(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    tails: Sequence[dict[str, list[int]]],
    n_new: int,
) -> Iterator[tuple[str, dict[str, tuple[float, float, int]]]]:
    """One group of prompts: for each its answer, and {candidate: (mean log-probability, share right, tokens)}."""
    batch = lm.align(rows, [len(ids) - 1 for ids in rows])
    logits, cache = lm.begin(batch)
    # The cache grows by putting new tensors in place of its own, so these stay what they are.
    kept = None if cache is None else [(layer.keys, layer.values) for layer in cache.layers]
    pairs = [(row, name, ids) for row, own in enumerate(tails) for name, ids in own.items()]
    total, right = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    if pairs:
        at = torch.tensor([row for row, _, _ in pairs], device=logits.device)
        _count(
            total,
            right,
            torch.arange(len(pairs)),
            logits[at],
            torch.tensor([ids[0] for *_, ids in pairs]),
        )
    longer = [i for i, (*_, ids) in enumerate(pairs) if len(ids) > 1]
    for part in lm.groups([len(pairs[i][2]) for i in longer]) if longer else []:
        chosen = [longer[i] for i in part]
        hidden = _behind(
            lm, batch, kept, [pairs[i][0] for i in chosen], [pairs[i][2][:-1] for i in chosen]
        )
        places = [
            (line, column, i, token)
            for line, i in enumerate(chosen)
            for column, token in enumerate(pairs[i][2][1:])
        ]
        for some in (
            places[start : start + 256] for start in range(0, len(places), 256)
        ):  # logits are the largest tensors of all
            lines, columns, owners, tokens = (
                torch.tensor(column) for column in zip(*some, strict=True)
            )
            _count(
                total,
                right,
                owners,
                lm.head(hidden[lines.to(hidden.device), columns.to(hidden.device)]),
                tokens,
            )
    scored: list[dict[str, tuple[float, float, int]]] = [{} for _ in tails]
    for (row, name, ids), each, n_right in zip(pairs, total.tolist(), right.tolist(), strict=True):
        scored[row][name] = (each / len(ids), n_right / len(ids), len(ids))
    answers = lm.continue_from(batch, logits, cache, n_new) if n_new else [[] for _ in rows]
    for ids, own in zip(answers, scored, strict=True):
        yield lm.as_answer(ids), own


def _count(total: Tensor, right: Tensor, owners: Tensor, logits: Tensor, tokens: Tensor) -> None:
    """Add what logits (N, vocab) say about the tokens (N,) due there to the sums of their owners (N,)."""
    due = tokens.to(logits.device)
    logs = logits.float().log_softmax(-1).gather(1, due[:, None])[:, 0]
    total.index_add_(0, owners, logs.cpu())
    right.index_add_(0, owners, ((logits.argmax(-1) == due) & ~logs.isnan()).float().cpu())


def _behind(
    lm: LanguageModel,
    batch: Batch,
    kept: list[tuple[Tensor, Tensor]] | None,
    rows: Sequence[int],
    tails: Sequence[Sequence[int]],
) -> Tensor:
    """The last layer's output at tokens (R lists) that stand behind rows (R,) of a batch: (R, longest, d_model)."""
    width, device = max(map(len, tails)), batch.input_ids.device
    head = batch.keep(torch.tensor(rows))
    ids, mask = (
        torch.full((len(rows), width), pad_id(lm.tokenizer)),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for row, tail in enumerate(tails):
        ids[row, : len(tail)] = torch.tensor(tail)
        mask[row, : len(tail)] = 1
    positions = head.position_ids[:, -1:] + mask.to(device).cumsum(
        1
    )  # padding on the right stays inside what the row uses
    whole = Batch(
        torch.cat([head.input_ids, ids.to(device)], 1),
        torch.cat([head.attention_mask, mask.to(device)], 1),
        torch.cat([head.position_ids, positions], 1),
        batch.width,
    )
    lm.check_batch(whole)
    start = 0 if kept is None else batch.width
    cache = None if kept is None else PrefixCache(kept, torch.tensor(rows))
    with recording({"last": lm.layers[-1]}, stop=True) as calls:
        lm.forward(whole, start=start, cache=cache)
    return calls["last"][0].output[:, batch.width - start :]
