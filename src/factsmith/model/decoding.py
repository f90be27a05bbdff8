"""Greedy decoding: continue a batch of sequences token by token, with a key/value cache.

    batch = lm.align(sequences, [len(ids) - 1 for ids in sequences])
    lm.continue_from(batch, *lm.begin(batch), 8)     # up to 8 new ids for each sequence

`begin` is apart so that its pass can answer other questions too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .running import RunnableModel
from .tokens import Batch
from .trace import recording


class DecodingModel(RunnableModel):
    """A model that continues text."""

    @property
    def end_ids(self) -> set[int]:
        """Ids that end a text, from the tokenizer and from the model's generation settings."""
        ends: set[int] = set()
        generation = getattr(self.module, "generation_config", None)
        for value in (self.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
            ends.update(
                value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            )
        return ends

    def as_answer(self, ids: Sequence[int]) -> str:
        """Return new token ids as an answer: the first line with text, stripped of white space."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip().split("\n")[0].strip()

    @torch.no_grad()
    def continue_greedily(
        self, sequences: Sequence[Sequence[int]], n_tokens: int
    ) -> list[list[int]]:
        """Return greedy new ids, up to `n_tokens` for each sequence of a batch.

        A sequence ends before its EOS, or with its first line.
        """
        batch = self.align(sequences, [len(ids) - 1 for ids in sequences])
        if n_tokens < 1:
            return [[] for _ in sequences]
        return self.continue_from(batch, *self.begin(batch), n_tokens)

    @torch.no_grad()
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

    @torch.no_grad()
    def continue_from(
        self, batch: Batch, logits: Tensor, cache: DynamicCache | None, n_tokens: int
    ) -> list[list[int]]:
        """Return what `continue_greedily` does, from what `begin` returned.

        The cache grows, and loses the rows that have ended.
        """
        ends = self.end_ids
        new: list[list[int]] = [[] for _ in range(batch.size)]
        rows = list(range(batch.size))  # the sequence of each row that is still in the batch
        if self.max_tokens is not None:
            n_tokens = min(n_tokens, self.max_tokens - int(batch.attention_mask.sum(1).max()) + 1)
        for step in range(n_tokens):
            chosen = logits.argmax(-1)
            still = []
            for at, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                if token not in ends:
                    new[row].append(token)
                    if "\n" not in self.tokenizer.decode(new[row]).lstrip():
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
        return new

    def _next_logits(self, batch: Batch, start: int, cache: DynamicCache | None) -> Tensor:
        with recording({"last": self.layers[-1]}, stop=True) as calls:
            self.forward(batch, start=start, cache=cache)
        return self.head(calls["last"][0].output[:, -1])
