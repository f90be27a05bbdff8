"""A masked language model of the BERT family: it fills blanks in a text that it reads as a whole.

    lm = load("bert-base-cased")                                        # or wrap(module, tokenizer)
    lm.fill("The capital of France is [MASK].")                         # [[("Paris", 0.42), ...]]
    lm.log_prob(["The capital of France is [MASK]."], ["Paris"])

A blank is the tokenizer's mask token, or "[MASK]" whatever the tokenizer calls it. A target of
several tokens needs as many blanks side by side. Whatever needs a text to be continued (answers,
tracing, editing by ROME) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from ..core.checks import check_count, check_text
from ..core.errors import InputError, UnsupportedModelError
from ..core.gap import Gap
from .language_model import LanguageModel
from .tokens import Batch
from .turns import asking

_BLANK = "[MASK]"


class MaskedLanguageModel(LanguageModel):
    """A LanguageModel in which every position sees all others.

    Its targets are at the masks of the prompt.
    """

    is_causal = False

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence the model has positions for.

        None: neither the model nor its tokenizer states one.
        """
        # Some of the family do not count positions from 0, so that fewer can be used than there
        # are. Their tokenizers know.
        stated = [
            n
            for n in (super().max_tokens, self.tokenizer.model_max_length)
            if n is not None and n < 10**9
        ]
        return min(stated, default=None)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a whole text, with the tokens that go around it.

        Raises:
            InputError: The text has no token that the model knows.
        """
        ids = list(self.tokenizer(self._with_masks(prompt))["input_ids"])
        if not set(ids) - set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}:
            raise InputError(
                f"the prompt {prompt!r} has no token that the model knows; give some text"
            )
        self.check_known(ids)
        return ids

    def text_batch(self, text: str) -> Batch:
        """Tokenize a whole text."""
        return self.batch([text])

    def batch(self, prompts: Sequence[str]) -> Batch:
        """Tokenize prompts and align them at their first token, with padding on the right."""
        sequences = [self.prompt_ids(p) for p in prompts]
        return self.align(sequences, [0] * len(sequences))

    def question(
        self, prompt: str, target: str, gap: Gap = "auto"
    ) -> tuple[list[int], list[int], list[int]]:
        """Return how to ask for a target in one pass.

        The text around the masks decides on the gap, so `gap` is not used.

        Returns:
            The token ids of the prompt, the columns of its masks, and the target's token ids. The
            last two have one length.

        Raises:
            InputError: The prompt has no mask, its masks are apart, or there are not as many as the
                target has tokens.
        """
        text, mask = self._with_masks(prompt), self.tokenizer.mask_token
        ids = self.prompt_ids(prompt)
        columns = self._masks(prompt, ids)
        first, last = text.index(mask), text.rindex(mask) + len(mask)
        if not check_text(target, "the target").strip():
            raise InputError(f"the target is empty; give the word for the mask of {prompt!r}")
        if text[first:last].replace(mask, "").strip():
            raise InputError(
                f"the masks of {prompt!r} are apart; put them side by side, one for each token of "
                "the target"
            )
        # The target as the tokenizer writes it in its place, or alone if it would merge with its
        # neighbours.
        whole = list(self.tokenizer(text[:first] + target.strip() + text[last:])["input_ids"])
        before, after = ids[: columns[0]], ids[columns[-1] + 1 :]
        wanted = whole[len(before) : len(whole) - len(after)]
        if not wanted or [*before, *wanted, *after] != whole:
            space = " " if text[:first][-1:].isspace() else ""
            wanted = list(
                self.tokenizer(space + target.strip(), add_special_tokens=False)["input_ids"]
            )
        self.check_known(wanted)
        if not wanted or self.tokenizer.unk_token_id in wanted:
            raise InputError(
                f"target {target!r} has tokens that the model does not know; give a target that "
                "its tokenizer can write"
            )
        if len(wanted) != len(columns):
            raise InputError(
                f"target {target!r} has {len(wanted)} tokens "
                f"({', '.join(self.tokenizer.convert_ids_to_tokens(wanted))}), so the prompt needs "
                f"{len(wanted)} masks; {prompt!r} has {len(columns)}. Write "
                f"{' '.join([_BLANK] * len(wanted))}"
            )
        return ids, columns, wanted

    @asking()
    def fill(self, prompt: str, k: int = 10) -> list[list[tuple[str, float]]]:
        """Return for each mask of the prompt the k likeliest tokens with their probabilities.

        The likeliest comes first.
        """
        k = check_count(k, "k", "the number of tokens")
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
        """Raise UnsupportedModelError: there is no next token. Use `fill`."""
        self._refuse("has no next token; put [MASK] into the prompt and call fill")

    def continue_greedily(
        self,
        sequences: Sequence[Sequence[int]],
        n_tokens: int,
        lines: Sequence[int] | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        """Raise UnsupportedModelError: the model does not continue text."""
        self._refuse(
            "cannot continue a text; put [MASK] into the prompt and call fill, or use a causal "
            "model"
        )

    def check_batch(self, batch: Batch) -> None:
        """Check that the model can run a batch.

        Raises:
            InputError: A row is longer than the model's positions.
            UnsupportedModelError: There is padding that the model does not hide.
        """
        super().check_batch(batch)
        if not self.hides_padding and bool((batch.attention_mask == 0).any()):
            self._refuse(
                "does not hide padding, so prompts of different lengths would change one another; "
                "give them one by one"
            )

    def _with_masks(self, prompt: str) -> str:
        return check_text(prompt, "the prompt").replace(_BLANK, self.tokenizer.mask_token)

    def _masks(self, prompt: str, ids: Sequence[int]) -> list[int]:
        """Return the columns of the masks. Raise InputError if there is none."""
        columns = [
            column for column, token in enumerate(ids) if token == self.tokenizer.mask_token_id
        ]
        if not columns:
            raise InputError(
                f"the prompt {prompt!r} has no mask; put {_BLANK} where the answer belongs"
            )
        return columns

    def _refuse(self, why: str) -> NoReturn:
        raise UnsupportedModelError(f"{self.name} is a masked language model, which {why}")
