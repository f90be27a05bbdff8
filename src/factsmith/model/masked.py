"""A masked language model of the BERT family: it fills blanks in a text it reads from both sides.

    lm = load("bert-base-cased")                                        # or wrap(module, tokenizer)
    lm.fill("The capital of France is [MASK].")                         # [[("Paris", 0.42), ...]]
    lm.log_prob(["The capital of France is [MASK]."], ["Paris"])

A blank is the tokenizer's mask token, or "[MASK]" whatever the tokenizer calls it; a target of several tokens needs as many of them, side
by side. What needs a text to be continued (answers, tracing, editing by ROME) is refused in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from ..core.checks import check_text
from ..core.errors import InputError, UnsupportedModelError
from .language_model import LanguageModel
from .tokens import Batch

_BLANK = "[MASK]"


class MaskedLanguageModel(LanguageModel):
    """A LanguageModel whose every position sees all others; its targets stand where the prompt has masks."""

    is_causal = False

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence the model has positions for; None when neither it nor its tokenizer states one."""
        # Some of the family count positions from beyond 0, so that fewer can be used than there are; their tokenizers know.
        stated = [
            n
            for n in (super().max_tokens, self.tokenizer.model_max_length)
            if n is not None and n < 10**9
        ]
        return min(stated, default=None)

    # ── asking it ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def prompt_ids(self, prompt: str) -> list[int]:
        """The token ids of a whole text, the tokens put around it included."""
        ids = list(self.tokenizer(self._with_masks(prompt))["input_ids"])
        if not set(ids) - set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}:
            raise InputError(f"prompt {prompt!r} has no token the model knows; expected some text")
        return ids

    def batch(self, prompts: Sequence[str]) -> Batch:
        """Tokenize prompts and align them at their first token (padding on the right)."""
        sequences = [self.prompt_ids(p) for p in prompts]
        return self.align(sequences, [0] * len(sequences))

    def question(self, prompt: str, target: str) -> tuple[list[int], list[int], list[int]]:
        """(token ids of the prompt, columns of its masks, the target's token ids), the last two of one length.

        Raises InputError when the prompt has no mask, masks apart from one another, or not as many as the target has tokens.
        """
        text, mask = self._with_masks(prompt), self.tokenizer.mask_token
        ids = self.prompt_ids(prompt)
        columns = self._masks(prompt, ids)
        first, last = text.index(mask), text.rindex(mask) + len(mask)
        if not check_text(target, "the target").strip():
            raise InputError(
                f"the target is empty; expected what belongs into the mask of {prompt!r}"
            )
        if text[first:last].replace(mask, "").strip():
            raise InputError(
                f"the masks of {prompt!r} stand apart; expected one place, with a mask for each token of the target"
            )
        # As the tokenizer writes the target in its place; where it would merge with its neighbours, as it writes it alone.
        whole = list(self.tokenizer(text[:first] + target.strip() + text[last:])["input_ids"])
        before, after = ids[: columns[0]], ids[columns[-1] + 1 :]
        wanted = whole[len(before) : len(whole) - len(after)]
        if not wanted or [*before, *wanted, *after] != whole:
            gap = " " if text[:first][-1:].isspace() else ""
            wanted = list(
                self.tokenizer(gap + target.strip(), add_special_tokens=False)["input_ids"]
            )
        if not wanted or self.tokenizer.unk_token_id in wanted:
            raise InputError(
                f"target {target!r} has tokens the model does not know; choose one its tokenizer can write"
            )
        if len(wanted) != len(columns):
            raise InputError(
                f"target {target!r} has {len(wanted)} tokens ({', '.join(self.tokenizer.convert_ids_to_tokens(wanted))}) and {prompt!r} "
                f"{len(columns)} masks; expected as many: write {' '.join([_BLANK] * len(wanted))}"
            )
        return ids, columns, wanted

    @torch.no_grad()
    def fill(self, prompt: str, k: int = 10) -> list[list[tuple[str, float]]]:
        """For each mask of the prompt the k likeliest tokens with their probabilities, likeliest first."""
        if k < 1:
            raise InputError(f"asked for the {k} likeliest tokens; expected at least 1")
        ids = self.prompt_ids(prompt)
        columns = self._masks(prompt, ids)
        logits = self.head(self.last_hidden(self.align([ids], [0]))[0, columns]).float()
        top = logits.softmax(-1).topk(min(k, logits.shape[-1]))
        return [
            [
                (self.tokenizer.decode([token]).strip(), p)
                for p, token in zip(values, tokens, strict=True)
            ]
            for values, tokens in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]

    def next_tokens(self, prompt: str, k: int = 10) -> list[tuple[str, float]]:
        """Refused: there is no next token; use `fill`."""
        self._refuse("has no next token: put [MASK] into the prompt and call fill")

    def continue_greedily(
        self, sequences: Sequence[Sequence[int]], n_tokens: int
    ) -> list[list[int]]:
        """Refused: it does not continue text."""
        self._refuse(
            "cannot continue a text: put [MASK] into the prompt and call fill, or use a causal model"
        )

    def check_batch(self, batch: Batch) -> None:
        """Raises InputError for rows longer than the model's positions, UnsupportedModelError for padding it would see."""
        super().check_batch(batch)
        if not self.hides_padding and bool((batch.attention_mask == 0).any()):
            self._refuse(
                "does not hide padding, so prompts of different lengths would change one another; give them one by one"
            )

    def _with_masks(self, prompt: str) -> str:
        return check_text(prompt, "the prompt").replace(_BLANK, self.tokenizer.mask_token)

    def _masks(self, prompt: str, ids: Sequence[int]) -> list[int]:
        """The columns of the masks; raises InputError when there is none."""
        columns = [
            column for column, token in enumerate(ids) if token == self.tokenizer.mask_token_id
        ]
        if not columns:
            raise InputError(
                f"prompt {prompt!r} has no mask; put {_BLANK} where the answer belongs"
            )
        return columns

    def _refuse(self, why: str) -> NoReturn:
        raise UnsupportedModelError(f"{self.name} is a masked language model, which {why}")
