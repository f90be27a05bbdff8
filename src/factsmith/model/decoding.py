"""Greedy decoding: continue a batch of sequences token by token, with a key/value cache.

    batch = lm.align(sequences, [len(ids) - 1 for ids in sequences])
    lm.continue_from(batch, *lm.begin(batch), 8)     # up to 8 new ids for each sequence

`begin` is apart so that its pass can answer other questions too.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..core.lines import first_lines
from .fingerprint import end_ids
from .running import RunnableModel
from .tokens import Batch
from .trace import recording
from .turns import asking


class DecodingModel(RunnableModel):
    """A model that continues text."""

    @property
    def end_ids(self) -> set[int]:
        """Ids that end a text, from the tokenizer and from the model's generation settings."""
        return end_ids(self.module, self.tokenizer)

    def as_answer(self, ids: Sequence[int], lines: int = 1) -> str:
        """Return new token ids as an answer: the first lines with text, without space around them.

        A character of which the last bytes are missing is left out. Such an answer was cut inside
        a character of several tokens.

        Args:
            ids: The new ids.
            lines: The number of lines with text.
        """
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        if half := half_character(self.tokenizer, ids) if text.endswith("\ufffd") else 0:
            text = text[:-half]
        return first_lines(text, lines)

    @asking()
    def greedy_ids(
        self,
        sequences: Sequence[Sequence[int]],
        n_tokens: int,
        lines: Sequence[int] | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        """Return what `continue_greedily` does, for any number of sequences of any length.

        Args:
            sequences: Token ids.
            n_tokens: The most new ids of a sequence.
            lines: How many lines with text each sequence gets. None: one.
            progress: Called after every token with the number of sequences done. A group that runs
                together counts by its tokens.
        """
        new: list[list[int]] = [[] for _ in sequences]
        done = 0
        for group in self.answer_groups([len(ids) for ids in sequences], n_tokens):
            of_group = None if lines is None else [lines[i] for i in group]
            part = None if progress is None else _in_tokens(progress, done, len(group), n_tokens)
            continued = self.continue_greedily(
                [sequences[i] for i in group], n_tokens, of_group, progress=part
            )
            done += len(group)
            for i, ids in zip(group, continued, strict=True):
                new[i] = ids
        return new

    def answer_groups(
        self, lengths: Sequence[int], n_tokens: int, budget: int = 4096
    ) -> Iterator[list[int]]:
        """Yield the numbers of the prompts that are continued together.

        They are similar in length and have room for equally long answers, so no answer is cut short
        for the sake of another prompt.

        Args:
            lengths: The number of tokens of each prompt.
            n_tokens: The length of the answers in tokens.
            budget: Padded tokens in one pass.
        """
        by_room: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            room = n_tokens
            if self.max_tokens is not None:
                room = min(n_tokens, self.max_tokens - length + 1)
            by_room.setdefault(room, []).append(i)
        for members in by_room.values():
            for group in self.groups([lengths[i] for i in members], budget):
                yield [members[i] for i in group]

    @asking()
    def continue_greedily(
        self,
        sequences: Sequence[Sequence[int]],
        n_tokens: int,
        lines: Sequence[int] | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        """Return greedy new ids, up to `n_tokens` for each sequence of a batch.

        A sequence ends before its EOS, or with its last line.

        Args:
            sequences: Token ids.
            n_tokens: The most new ids of a sequence.
            lines: How many lines with text each sequence gets. None: one.
            progress: Called with the number of tokens done, after each, and with `n_tokens` at the
                end.
        """
        batch = self.align(sequences, [len(ids) - 1 for ids in sequences])
        if n_tokens < 1:
            return [[] for _ in sequences]
        return self.continue_from(batch, *self.begin(batch), n_tokens, lines, progress=progress)

    @asking()
    def begin(self, batch: Batch) -> tuple[Tensor, DynamicCache | None]:
        """Run a batch whose rows end together.

        Returns:
            The logits after the last column, (B, vocab), and the keys and values, or None if the
            model cannot use them again.

        Raises:
            InputError, UnsupportedModelError: As `check_batch`.
        """
        self.check_batch(batch)
        # Plain growing layers serve sliding windows too: the model's masks hide what is too far.
        cache = DynamicCache() if self.caches_prefix else None
        return self._next_logits(batch, 0, cache), cache

    @asking()
    def continue_from(
        self,
        batch: Batch,
        logits: Tensor,
        cache: DynamicCache | None,
        n_tokens: int,
        lines: Sequence[int] | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        """Return what `continue_greedily` does, from what `begin` returned.

        The cache grows, and loses the rows that have ended.
        """
        ends, lines = self.end_ids, lines or [1] * batch.size
        new: list[list[int]] = [[] for _ in range(batch.size)]
        rows = list(range(batch.size))  # the sequence of each row that is still in the batch
        report, most = progress or (lambda _: None), n_tokens
        if self.max_tokens is not None:
            n_tokens = min(n_tokens, self.max_tokens - int(batch.attention_mask.sum(1).max()) + 1)
        for step in range(n_tokens):
            chosen = logits.argmax(-1)
            still = []
            for at, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                if token not in ends:
                    new[row].append(token)
                    if _n_lines(self.tokenizer.decode(new[row])) < lines[row]:
                        still.append(at)
            if not still or step + 1 == n_tokens:
                break
            if len(still) < len(rows):
                kept = torch.tensor(still)
                rows = [rows[at] for at in still]
                batch, chosen = batch.keep(kept), chosen[kept.to(chosen.device)]
                if cache is not None:
                    cache.batch_select_indices(kept)
            start = batch.width if cache is not None else 0
            batch = batch.extended(chosen)
            logits = self._next_logits(batch, start, cache)
            report(step + 1)
        report(most)
        return new

    def _next_logits(self, batch: Batch, start: int, cache: DynamicCache | None) -> Tensor:
        with recording({"last": self.layers[-1]}, stop=True) as calls:
            self.forward(batch, start=start, cache=cache)
        return self.head(calls["last"][0].output[:, -1])


def _in_tokens(
    report: Callable[[int], object], done: int, size: int, n_tokens: int
) -> Callable[[int], object]:
    """Return what takes reports of tokens, and reports sequences: those before, and a share."""
    return lambda tokens: report(done + size * tokens // max(n_tokens, 1))


def half_character(tokenizer: Any, ids: Sequence[int]) -> int:
    """Return with how many replacement characters a text ends for one that is not complete.

    0: The last character is complete, or its bytes are of no character.
    """
    tail = tokenizer.convert_ids_to_tokens(list(ids[-4:]))
    levels = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tail:
        decoder.decode(_bytes_of(token, levels))
    pending = len(decoder.getstate()[0])
    # A tokenizer with tokens such as <0xE6> writes a character for each byte.
    return pending if not levels else min(pending, 1)


def _bytes_of(token: str, levels: bool) -> bytes:
    """Return the bytes that a token stands for.

    Args:
        token: As the vocabulary has it.
        levels: Whether each of its characters stands for a byte, as in GPT-2.
    """
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(byte.group(1))
    if levels and all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode(errors="replace")


def _byte_letters() -> dict[str, int]:
    """Return the byte of each letter in the vocabulary of a byte-level tokenizer.

    Bytes that print stand for themselves, the others for the letters from U+0100 on. Radford et al.
    2019, gpt-2 src/encoder.py:8-28.
    """
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


_BYTES = _byte_letters()


def _n_lines(text: str) -> int:
    """Return how many lines with text are complete."""
    return sum(bool(line.strip()) for line in text.split("\n")[:-1])
