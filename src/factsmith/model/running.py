"""A transformers model that can be run: what it is, how text becomes a batch, and passes over it.

    batch = lm.batch(["Paris is the capital of", "The Louvre is in"])
    lm.forward(batch).logits                # the model's own pass, (B, T, vocab)
    lm.head(lm.last_hidden(batch)[:, -1])   # the same numbers at one column, (B, vocab)

`RunnableModel` is the base of `LanguageModel`, which adds the questions. `selfcheck.discover` fills
in the structure.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..core.errors import InputError, UnsupportedModelError
from ..core.gap import Gap, Settled
from ..core.identity import same_model
from ..core.settled import settled
from .adapters import adapter_error, adapter_kind
from .ffn import FeedForward
from .fingerprint import Identity, identify, model_state
from .gaps import Gaps
from .logits import wide_unembedding
from .modes import check_weights, with_plain_weights
from .quantised import packed_format, quantised_error
from .tokens import (
    Batch,
    Joint,
    align,
    encode,
    encode_prompt,
    fast_tokenizer,
    pad_id,
    target_and_joint,
)
from .trace import Slot, recording, standing_in, with_first_tensor
from .turns import asking, turn

Question: TypeAlias = tuple[list[int], list[int], list[int]]
"""How to ask for a target in one pass: the token ids to run, the columns that predict the target,
and its token ids. The last two have one length."""


def question_of(head: list[int], tail: list[int]) -> Question:
    """Return the question whether some tokens follow those of a prompt."""
    return head + tail[:-1], list(range(len(head) - 1, len(head) + len(tail) - 1)), tail


@dataclass(frozen=True, eq=False, kw_only=True)
class Structure:
    """How a module is built, as its own dry run showed.

    Attributes:
        layers: The decoder layers, in order.
        slot: Where a layer takes its hidden state.
        ffn: Each layer's feed-forward memory.
        attention: Each layer's part in which positions meet; None if there is not exactly one.
        layer_result: What the first layer returned: the form in which this model's layers answer.
        d_model: Width of the hidden state.
    """

    layers: tuple[nn.Module, ...]
    slot: Slot
    ffn: tuple[FeedForward, ...]
    attention: tuple[nn.Module | None, ...]
    layer_result: Any
    d_model: int


class RunnableModel:
    """A model, its tokenizer and its structure.

    Attributes:
        module: The transformers model. It runs in evaluation mode, whatever mode it is in.
        tokenizer: A fast tokenizer.
        name: What it was loaded as.
        embedding: The input embedding.
        layers: The decoder layers, in order.
        slot: Where a layer takes its hidden state.
        ffn: Each layer's feed-forward memory.
        attention: Each layer's part in which positions meet; None if there is not exactly one.
        accepts: Names of the inputs that the model's forward takes.
        caches_prefix: Whether the keys and values of a prefix can be kept and used again.
        hides_padding: Whether padding changes nothing.
        plain_ids: Ids of some ordinary tokens.
    """

    is_causal = True
    """Whether a position sees only what comes before it, so that a text can be continued."""

    def __init__(self, module: Any, tokenizer: Any, name: str) -> None:
        """Take a module and its tokenizer. The structure comes from `selfcheck.discover`.

        Raises:
            TokenizerError: The tokenizer is not a fast one.
            UnsupportedModelError: The model is quantised, or some weights are not on a device.
        """
        self.module = module
        self.tokenizer = fast_tokenizer(tokenizer)
        self.name = name
        self.config: Any = module.config
        self._text_config: Any = self.config.get_text_config(decoder=True)
        self.accepts = _accepted(module)
        self._identities: list[tuple[object, Identity]] = []
        self.plain_ids: list[int] = []
        self.gap_choices = Gaps()
        self.caches_prefix = False
        self.hides_padding = True
        self.embedding: nn.Module = module.get_input_embeddings()
        if (adapter := adapter_kind(module)) is not None:
            raise adapter_error(name, adapter)
        if (packed := packed_format(module)) is not None:
            raise quantised_error(name, packed)
        check_weights(name, module)
        with_plain_weights(module)
        module.eval().requires_grad_(False)

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.name!r}, n_layers={self.n_layers}, d_model={self.d_model}, "
            f"{self.dtype}, {self.device})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds. It works out its fingerprint again."""
        return {**vars(self), "_identities": []}

    # ── what it is ────────────────────────────────────────────────────────────────────────────────

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def d_model(self) -> int:
        """Width of the hidden state."""
        return self._d_model

    @property
    def device(self) -> torch.device:
        """The device of the input embedding, where token ids go."""
        return next(self.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the weights."""
        dtype: torch.dtype = next(
            p.dtype for p in self.module.parameters() if p.is_floating_point()
        )
        return dtype

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has embeddings for; its tokenizer may have more."""
        return next(p for p in self.embedding.parameters() if p.dim() == 2).shape[0]

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence the model has positions for; None if it states none."""
        limit = getattr(self._text_config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    @asking()
    def fingerprint(self) -> str:
        """sha256 (hex) over what decides the answers.

        That is every weight (name, dtype, shape, bytes), the settings that change a number, the
        tokenizer, and the tokens that end an answer. It is computed once and kept until a weight, a
        setting or the tokenizer changes (`fingerprint.model_state`).
        """
        return self._identified().fingerprint

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Return whether a fingerprint is this model's, also if an earlier version computed it."""
        return same_model(fingerprint, self.fingerprint) or self._identified().is_also(fingerprint)

    def _identified(self) -> Identity:
        state = model_state(self.module, self.tokenizer)
        for known, identity in self._identities:
            if known == state:
                return identity
        earlier = self._identities[-1][1] if self._identities else None
        identity = identify(self.module, self.tokenizer, earlier)
        # Where layers stay on disk, the state of before a block comes back after it.
        self._identities = [*self._identities[-1:], (state, identity)]
        return identity

    def fresh_fingerprint(self) -> str:
        """Return the fingerprint after reading every weight again, whatever the counters say."""
        self._identities = []
        return self.fingerprint

    def adopt(self, structure: Structure) -> None:
        """Take over the structure that `selfcheck.discover` found."""
        self.layers, self.slot = structure.layers, structure.slot
        self.ffn, self.attention = structure.ffn, structure.attention
        self._layer_result, self._d_model = structure.layer_result, structure.d_model

    # ── text to batches ───────────────────────────────────────────────────────────────────────────

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, with the BOS that the tokenizer adds, if any.

        Spaces at its end are left out. They belong to what follows.

        Raises:
            InputError: The prompt has no token.
        """
        ids, _ = encode_prompt(self.tokenizer, prompt)
        if not ids:
            raise InputError(f"the prompt {prompt!r} has no token; give some text")
        self.check_known(ids)
        return ids

    def check_known(self, ids: Sequence[int]) -> None:
        """Check that the model has an embedding for every token.

        Raises:
            InputError: It has not: tokens were added to the tokenizer alone.
        """
        if ids and (highest := max(ids)) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise InputError(
                f"the token {token!r} has id {highest}, and {self.name} has embeddings for "
                f"{self.vocabulary:,} tokens: it was added to the tokenizer, and not to the model. "
                "Write the text without it, or call resize_token_embeddings on the model and train "
                "the new rows"
            )

    @asking()
    def gaps(
        self, prompts: Sequence[str], targets: Sequence[str], wanted: Sequence[Gap] | None = None
    ) -> list[Settled]:
        """Return what the model puts between each prompt and its target: "space" or "none".

        Args:
            prompts: The prompts.
            targets: As many targets.
            wanted: For each pair the gap that it must have; "auto" where the model decides. None:
                "auto" for all.
        """
        return self.gap_choices.of(self, prompts, targets, wanted)

    def question(self, prompt: str, target: str, gap: Gap = "auto") -> Question:
        """Return how to ask for a target in one pass.

        The target's earlier tokens are part of the sequence, so its joint probability is the
        product over the columns.

        Args:
            prompt: The prompt.
            target: The target.
            gap: What stands between the two. "auto": what the model itself would go on with.
        """
        return self.question_forms(prompt, target, gap)[0]

    def question_forms(
        self, prompt: str, target: str, gap: Gap = "auto"
    ) -> tuple[Question, Question | None]:
        """Return how to ask for a target after the prompt's tokens, and as one text with it.

        The second is None where it would be the first. It also asks for the prompt's last tokens,
        as far as the one text writes them otherwise.

        Args:
            prompt: The prompt.
            target: The target.
            gap: As for `question`.
        """
        if not self.is_causal:
            return self.question(prompt, target, gap), None
        head = self.prompt_ids(prompt)
        tail, joint = target_and_joint(self, prompt, target, head=head, gap=gap)
        return question_of(head, tail), self.joint_question(joint)

    def joint_question(self, joint: Joint | None) -> Question | None:
        """Return how to ask for a target as one text with its prompt; None where that cannot be."""
        if joint is None or max(joint.tail) >= self.vocabulary:
            return None
        joined = question_of(*joint)
        return joined if self.max_tokens is None or len(joined[0]) <= self.max_tokens else None

    @settled()
    def align(self, sequences: Sequence[Sequence[int]], pivots: Sequence[int]) -> Batch:
        """Put one token of each sequence, its pivot, into one column, on the model's device.

        Raises:
            InputError: The model has no embedding for a token.
        """
        for ids in sequences:
            self.check_known(ids)
        return align(sequences, pivots, pad=pad_id(self.tokenizer), device=self.device)

    def text_batch(self, text: str) -> Batch:
        """Tokenize a text that is read as it is, to its last space."""
        ids, _ = encode(self.tokenizer, text)
        return self.align([ids], [len(ids) - 1]) if ids else self.batch([text])

    def batch(self, prompts: Sequence[str]) -> Batch:
        """Tokenize prompts and align them at their last token, with padding on the left."""
        sequences = [self.prompt_ids(p) for p in prompts]
        return self.align(sequences, [len(ids) - 1 for ids in sequences])

    def groups(self, lengths: list[int], budget: int = 4096) -> list[list[int]]:
        """Group the indices of sequences by length, each group at most `budget` padded tokens.

        Lengths in a group are similar, or equal if the model does not hide padding.
        """
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        groups: list[list[int]] = []
        for i in order:
            group = groups[-1] if groups else []
            fits = group and (len(group) + 1) * lengths[i] <= budget
            alike = group and (
                lengths[i] <= 1.25 * lengths[group[0]] + 2
                if self.hides_padding
                else lengths[i] == lengths[group[0]]
            )
            if fits and alike:
                group.append(i)
            else:
                groups.append([i])
        return groups

    def has_room(self, prompt: str, n_tokens: int = 1) -> bool:
        """Return whether the model has positions for a prompt that is continued by some tokens."""
        # A token has a byte or more, nearly always, so a short text needs no tokenizer.
        if self.max_tokens is None or len(prompt.encode()) + n_tokens + 1 <= self.max_tokens:
            return True
        return len(self.prompt_ids(prompt)) + n_tokens - 1 <= self.max_tokens

    def check_batch(self, batch: Batch) -> None:
        """Check that the model can run a batch.

        Raises:
            InputError: A row is longer than the model's positions.
            UnsupportedModelError: A row begins with padding that the model does not hide.
        """
        longest = int(batch.attention_mask.sum(1).max())
        if self.max_tokens is not None and longest > self.max_tokens:
            raise InputError(
                f"the text has {longest} tokens; {self.name} has positions for {self.max_tokens}: "
                "shorten the text"
            )
        if not self.hides_padding and batch.left_padded:
            raise UnsupportedModelError(
                f"{self.name} does not hide padding on the left, so prompts of different lengths "
                "would change one another; give them one by one"
            )

    # ── passes ────────────────────────────────────────────────────────────────────────────────────

    def forward(self, batch: Batch, *, start: int = 0, cache: Any = None) -> Any:
        """Run the model's own pass over columns `start`..T, and return its own output.

        The model gets only the inputs that its forward declares, and never token types.

        Args:
            batch: The rows.
            start: The first column to run.
            cache: A key/value cache that holds the columns before `start`.
        """
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids[:, start:],
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids[:, start:],
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        with turn(self):
            return self.module(**{k: v for k, v in inputs.items() if k in self.accepts})

    def head(self, hidden: Tensor) -> Tensor:
        """Run the model's own tail on last-layer states: (..., d_model) to (..., vocab).

        The tail is everything after the last layer: final norm, unembedding, scale and softcap.
        """
        flat = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.full((len(flat), 1), self.plain_ids[0], dtype=torch.long, device=self.device)
        batch = Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), 0)

        def play(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.as_layer_output(flat)

        with turn(self), standing_in(self.layers, play), wide_unembedding(self.module, flat):
            logits = self.forward(batch).logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])  # type: ignore[no-any-return]

    def as_layer_output(self, hidden: Tensor) -> Any:
        """Return a hidden state in the form in which this model's layers return it."""
        return with_first_tensor(self._layer_result, hidden)

    @asking()
    def last_hidden(self, batch: Batch) -> Tensor:
        """Return the last layer's output, (B, T, d_model). The unembedding does not run.

        Raises:
            InputError, UnsupportedModelError: As `check_batch`.
        """
        self.check_batch(batch)
        with recording({"last": self.layers[-1]}, stop=True) as calls:
            self.forward(batch)
        return calls["last"][0].output

    @asking()
    def last_logits(self, batch: Batch) -> Tensor:
        """Return the logits after each row's pivot token: (B, vocab)."""
        return self.head(self.last_hidden(batch)[:, batch.pivot])


def _accepted(module: nn.Module) -> set[str]:
    """Return the names of the inputs that the model's forward takes.

    A forward with **kwargs hands them on to the model inside, so the names of that one count too.
    """
    names: set[str] = set()
    inner: Any = module
    while inner is not None:
        passes_on = False
        # A class may hand everything on to the class above, too.
        for kind in type(inner).__mro__:
            if kind is nn.Module:
                break
            if "forward" in vars(kind):
                parameters = inspect.signature(vars(kind)["forward"]).parameters
                names.update(parameters)
                passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
                if not passes_on:
                    break
        below = getattr(inner, "base_model", None)
        inner = below if passes_on and below is not inner else None
    return names
