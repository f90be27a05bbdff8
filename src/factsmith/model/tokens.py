"""Text to token columns: the tokens of a prompt and of a target, prompts in one batch.

    ids, offsets = encode(tokenizer, "The mother tongue of Danielle Darrieux is")
    target_ids(lm, text, "French")                           # ids after the prompt
    batch = lm.align(sequences, pivots)                      # every row's pivot in one column

All of it uses the offset mapping of the whole string, never sums of token counts: tokenizers add a
BOS, and merge across the place where two strings meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_text
from ..core.errors import InputError, TokenizerError
from ..core.forms import canonical
from ..core.gap import Gap, Settled, before_gap, plain_gap


@dataclass(frozen=True)
class Batch:
    """Token sequences of different lengths with one column in common.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64, 1 for tokens and 0 for padding on either side.
        position_ids: (B, T) int64, counted from each row's first token.
        pivot: The column in which every row has its pivot token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    pivot: int

    @property
    def size(self) -> int:
        """Number of rows B."""
        return self.input_ids.shape[0]

    @property
    def width(self) -> int:
        """Number of columns T."""
        return self.input_ids.shape[1]

    @property
    def left_padded(self) -> bool:
        """Whether any row begins with padding."""
        return bool((self.attention_mask[:, 0] == 0).any())

    def extended(self, token_ids: Tensor) -> Batch:
        """Return the batch with one more token (B,) at the end of every row.

        That column becomes the pivot.
        """
        return Batch(
            torch.cat([self.input_ids, token_ids[:, None].to(self.input_ids)], dim=1),
            torch.cat([self.attention_mask, torch.ones_like(self.attention_mask[:, :1])], dim=1),
            torch.cat([self.position_ids, self.position_ids[:, -1:] + 1], dim=1),
            self.width,
        )

    def keep(self, rows: Tensor) -> Batch:
        """Return the batch of the given rows (R,). Rows may repeat."""
        rows = rows.to(self.input_ids.device)
        return Batch(
            self.input_ids[rows], self.attention_mask[rows], self.position_ids[rows], self.pivot
        )


class Joint(NamedTuple):
    """A prompt and its target, written as one text that does not begin with the prompt's tokens.

    Attributes:
        head: The tokens that the prompt alone has too.
        tail: Those after them: the rest of the prompt, and the target.
    """

    head: list[int]
    tail: list[int]


def fast_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer itself.

    Raises:
        TokenizerError: It cannot map tokens to characters.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so tokens cannot be mapped to "
            "characters; give one with a tokenizer.json (convert it, or load with use_fast=True)"
        )
    return tokenizer


def encode(lm_or_tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the token ids of a prompt, and the characters [start, stop) of each.

    A BOS that the tokenizer adds stays, with (0, 0). An EOS or separator that it appends is
    removed, so that the prompt can be continued.

    Raises:
        InputError: A model was given, and has no embedding for a token.
    """
    tokenizer = getattr(lm_or_tokenizer, "tokenizer", lm_or_tokenizer)
    # Not verbose: check_batch reports texts with more tokens than the model has positions.
    encoded = fast_tokenizer(tokenizer)(
        check_text(text, "the prompt"),
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids = list(encoded["input_ids"])
    offsets = [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    special = set(tokenizer.all_special_ids)
    while ids and ids[-1] in special and offsets[-1] == (0, 0) and any(b > a for a, b in offsets):
        ids.pop()
        offsets.pop()
    if lm_or_tokenizer is not tokenizer:
        lm_or_tokenizer.check_known(ids)
    return ids, offsets


def encode_prompt(lm_or_tokenizer: Any, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return what `encode` returns for a prompt, without the spaces at its end.

    They are the gap before the answer, and belong to its first token (`before_gap`).
    """
    return encode(lm_or_tokenizer, before_gap(check_text(prompt, "the prompt")))


def target_ids(
    lm_or_tokenizer: Any,
    prompt: str,
    target: str,
    *,
    head: Sequence[int] | None = None,
    gap: Gap = "auto",
) -> list[int]:
    """Return the token ids that continue a prompt with a target, without BOS and UNK.

    White space around the target is not part of it. Between the two goes a space or nothing, as the
    model itself would go on.

    Args:
        lm_or_tokenizer: A model, or a tokenizer. Without a model the texts alone decide on the gap.
        prompt: The prompt.
        target: The target.
        head: The prompt's token ids, if the caller has them.
        gap: What stands between the two. "auto": what the model finds likelier, where the texts do
            not show it.

    Raises:
        InputError: The target is empty, has no token that the tokenizer knows, or one that the
            model, if it is given, has no embedding for.
    """
    return target_and_joint(lm_or_tokenizer, prompt, target, head=head, gap=gap)[0]


def target_and_joint(
    lm_or_tokenizer: Any,
    prompt: str,
    target: str,
    *,
    head: Sequence[int] | None = None,
    gap: Gap = "auto",
) -> tuple[list[int], Joint | None]:
    """Return what `target_ids` returns, and how prompt and target are written as one text.

    The latter is None where the one text begins with the prompt's tokens, as nearly always. In
    scripts without spaces a token may reach from the prompt into the target.
    """
    tokenizer = getattr(lm_or_tokenizer, "tokenizer", lm_or_tokenizer)
    text, prompt = check_text(target, "the target").strip(), before_gap(prompt)
    if not text:
        raise InputError(f"the target is empty; give a continuation of {prompt!r}")
    if gap == "auto" and lm_or_tokenizer is not tokenizer:
        (gap,) = lm_or_tokenizer.gaps([prompt], [text])
    elif gap == "auto":
        gap = plain_gap(prompt, text).gap
    head = encode(tokenizer, prompt)[0] if head is None else list(head)
    tail, joint = _continued(tokenizer, prompt, " " if gap == "space" else "", text, head)
    if not tail:
        raise InputError(
            f"target {target!r} has no token that the model knows; give a target that its "
            "tokenizer can write"
        )
    if lm_or_tokenizer is not tokenizer:
        lm_or_tokenizer.check_known(tail)
    return tail, joint


def target_forms(
    tokenizer: Any, prompt: str, target: str, head: Sequence[int]
) -> dict[Settled, list[int]]:
    """Return the token ids of a target with a space before it, and without one.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt, without spaces at its end.
        target: The target, without white space around it.
        head: The prompt's token ids.
    """
    return {
        "space": _continued(tokenizer, prompt, " ", target, head)[0],
        "none": _continued(tokenizer, prompt, "", target, head)[0],
    }


def _continued(
    tokenizer: Any, prompt: str, gap: str, target: str, head: Sequence[int]
) -> tuple[list[int], Joint | None]:
    """Return the token ids of a target after a prompt, without BOS and UNK, and the one text's."""
    joint: Joint | None = None
    whole, _ = encode(tokenizer, prompt + gap + target)
    # Mostly the whole text begins with the prompt's tokens. Where a token would reach across, the
    # prompt keeps its tokens, since the model runs them, and the target is encoded without it.
    if whole[: len(head)] == [*head] and len(whole) > len(head):
        tail = whole[len(head) :]
        return [t for t in tail if t not in _dropped(tokenizer)], None
    if gap:
        tail = list(tokenizer(gap + target, add_special_tokens=False)["input_ids"])
    else:
        tail = _without_prefix(tokenizer, prompt[-1:], target)
    pairs = enumerate(zip(head, whole, strict=False))
    n = next((i for i, (ours, joined) in pairs if ours != joined), min(len(head), len(whole)))
    # Without a token before it, the first one has no probability.
    if 0 < n < len(whole) and not _dropped(tokenizer) & {*whole[n:]}:
        joint = Joint(whole[:n], whole[n:])
    return [t for t in tail if t not in _dropped(tokenizer)], joint


def _dropped(tokenizer: Any) -> set[int]:
    """Return the ids that are no part of a target."""
    return {tokenizer.unk_token_id, tokenizer.bos_token_id} - {None}


def _without_prefix(tokenizer: Any, last: str, target: str) -> list[int]:
    """Return the token ids of a target inside a text, with no space before it.

    Some tokenizers write a space before any text. So the target is encoded after another character
    that no token joins with it.

    Args:
        tokenizer: The tokenizer.
        last: The last character of the prompt; "" for an empty one.
        target: The target.
    """
    for anchor in (last, "\n", "(") if last else ():
        encoded = tokenizer(
            anchor + target, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        starts = [start for start, _ in encoded["offset_mapping"]]
        ends = [stop for _, stop in encoded["offset_mapping"]]
        first = next((i for i, stop in enumerate(ends) if stop > len(anchor)), None)
        if first and starts[first] == len(anchor) and ends[first - 1] == len(anchor):
            return list(encoded["input_ids"][first:])
    return list(tokenizer(target, add_special_tokens=False)["input_ids"])


def word_ids(tokenizer: Any, word: str) -> list[int]:
    """Return the ids of the tokens that are a word, in any case, with or without a space before.

    If there is no such token, return the first token of the word as a text writes it.

    Raises:
        InputError: The word is empty, or has no token that the model knows.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    wanted = canonical(check_text(word, "the word")).strip().casefold()
    if not wanted:
        raise InputError("the word is empty; give a word to look for")
    every = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    if whole := [i for i, text in enumerate(every) if canonical(text).strip().casefold() == wanted]:
        return whole
    # Inside a text most tokenizers write a space into the token.
    inside = target_ids(tokenizer, "The", word.strip(), gap="space")
    alone = target_ids(tokenizer, "", word.strip(), gap="none")
    # A space may be a token by itself.
    visible = [next((i for i in ids if every[i].strip()), None) for ids in (inside, alone)]
    if not (first := [i for i in dict.fromkeys(visible) if i is not None]):
        raise InputError(
            f"{word!r} has no token that the model knows; look for a word that its tokenizer can "
            "write"
        )
    return first


def align(
    sequences: Sequence[Sequence[int]],
    pivots: Sequence[int],
    *,
    pad: int = 0,
    device: torch.device | None = None,
) -> Batch:
    """Put the pivot token of every sequence into one column.

    Prefixes are padded on the left, suffixes on the right.

    Args:
        sequences: Token ids, row by row.
        pivots: The index of each row's pivot.
        pad: The id to pad with. Any id works, because the mask hides it.
        device: Where the batch goes. None: the CPU.

    Raises:
        InputError: A sequence is empty, or a pivot is outside its sequence.
    """
    if not sequences or len(sequences) != len(pivots):
        raise InputError(
            f"got {len(sequences)} sequences and {len(pivots)} pivots; give at least one sequence, "
            "and a pivot for each"
        )
    for ids, pivot in zip(sequences, pivots, strict=True):
        if not 0 <= pivot < len(ids):
            raise InputError(
                f"pivot {pivot} is outside a sequence of {len(ids)} tokens; give the index of "
                "one of its tokens"
            )
    column = max(pivots)
    width = column + max(len(ids) - pivot for ids, pivot in zip(sequences, pivots, strict=True))
    input_ids = torch.full((len(sequences), width), pad, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    positions = torch.zeros_like(input_ids)
    for row, (ids, pivot) in enumerate(zip(sequences, pivots, strict=True)):
        first = column - pivot
        input_ids[row, first : first + len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask[row, first : first + len(ids)] = 1
        positions[row, first:] = torch.arange(width - first)
    # On the right no token looks at the padding. Its positions stay within those of the row.
    positions = torch.minimum(positions, torch.tensor([len(ids) - 1 for ids in sequences])[:, None])
    return Batch(input_ids.to(device), mask.to(device), positions.to(device), column)


def pad_id(tokenizer: Any) -> int:
    """Return an id to fill rows with. Any id works, because the mask hides it."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if isinstance(value := getattr(tokenizer, name, None), int):
            return value
    return 0
