"""model.language_model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..core.errors import InputError, UnsupportedModelError
from .address import check_layer
from .ffn import FeedForward, Routing
from .fingerprint import model_digest, weight_state
from .logits import wide_unembedding
from .quantised import packed_format, quantised_error
from .tokens import Batch, align, encode, fast_tokenizer, pad_id, target_ids
from .trace import Slot, recording, standing_in, with_first_tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Structure:
    """How a module is built, as its own dry run showed it.

    layers        the decoder layers, in order
    slot          where a layer takes its hidden state
    ffn           each layer's feed-forward memory
    attention     each layer's part in which positions meet (None where there is not exactly one)
    layer_result  what the first layer returned: the form in which this model's layers answer
    d_model       width of the hidden state
    """

    layers: tuple[nn.Module, ...]
    slot: Slot
    ffn: tuple[FeedForward, ...]
    attention: tuple[nn.Module | None, ...]
    layer_result: Any
    d_model: int


class LanguageModel:
    """A model, its tokenizer, and what was found out about its structure.

    module       the transformers model, in evaluation mode, its parameters not asking for gradients
    tokenizer    a fast tokenizer
    name         what it was loaded as
    layers       the decoder layers, in order
    ffn          each layer's feed-forward memory
    attention    each layer's part in which positions meet (None where there is not exactly one)
    embedding    the input embedding
    """

    is_causal = True  # whether a position sees only what comes before it, so that text can be continued and its prefix kept

    def __init__(self, module: Any, tokenizer: Any, name: str) -> None:
        self.module = module
        self.tokenizer = fast_tokenizer(tokenizer)
        self.name = name
        self.config: Any = module.config
        self._text_config: Any = self.config.get_text_config(decoder=True)
        self.accepts = _accepted(module)
        self._fingerprint: tuple[object, str] | None = None
        self.plain_ids: list[int] = []
        self.caches_prefix = False
        self.hides_padding = True
        self.embedding: nn.Module = module.get_input_embeddings()
        if (packed := packed_format(module)) is not None:
            raise quantised_error(name, packed)
        if absent := next((path for path, p in module.named_parameters() if p.is_meta), None):
            raise UnsupportedModelError(
                f"{name} keeps weights outside any device ({absent}, offloaded or never loaded), so they cannot be read or edited; spread "
                "it over devices that hold all of it, or load it on the CPU"
            )
        module.eval().requires_grad_(False)

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, n_layers={self.n_layers}, d_model={self.d_model}, {self.dtype}, {self.device})"

    # ── what it is ──────────────────────────────────────────────────────────────────────────────────────────────────────

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
        """Where the input embedding lies: token ids go there."""
        return next(self.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the weights."""
        dtype: torch.dtype = next(
            p.dtype for p in self.module.parameters() if p.is_floating_point()
        )
        return dtype

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence the model has positions for; None when it states none."""
        limit = getattr(self._text_config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over every weight (name, dtype, shape, bytes), the config and the tokenizer.

        Remembered as long as no weight has changed: a change is noticed by tensor identity, PyTorch's in-place version counter, and
        a few sampled entries of every tensor (for writes that go round the counter).
        """
        state = weight_state(self.module)
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = (state, model_digest(self.module, self.config, self.tokenizer))
        return self._fingerprint[1]

    # ── running it ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def forward(self, batch: Batch, *, start: int = 0, cache: Any = None) -> Any:
        """The model's own pass over columns `start`..T, with only the inputs its forward declares (never token types).

        cache: a key/value cache holding the columns before `start`. Returns the model's own output.
        """
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids[:, start:],
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids[:, start:],
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        return self.module(**{k: v for k, v in inputs.items() if k in self.accepts})

    def head(self, hidden: Tensor) -> Tensor:
        """The model's own tail (final norm, unembedding, scale, softcap) on last-layer states: (..., d_model) -> (..., vocab)."""
        flat = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.full((len(flat), 1), self.plain_ids[0], dtype=torch.long, device=self.device)
        batch = Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), 0)

        def play(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.as_layer_output(flat)

        with standing_in(self.layers, play), wide_unembedding(self.module, flat):
            logits = self.forward(batch).logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])  # type: ignore[no-any-return]

    def adopt(self, structure: Structure) -> None:
        """Take over what `selfcheck.discover` found out about the module."""
        self.layers, self.slot = structure.layers, structure.slot
        self.ffn, self.attention = structure.ffn, structure.attention
        self._layer_result, self._d_model = structure.layer_result, structure.d_model

    def as_layer_output(self, hidden: Tensor) -> Any:
        """A hidden state in the form in which this model's layers return it."""
        return with_first_tensor(self._layer_result, hidden)

    def align(self, sequences: Sequence[Sequence[int]], pivots: Sequence[int]) -> Batch:
        """Put one token of every sequence, its pivot, into one column; the batch lies on the model's device."""
        return align(sequences, pivots, pad=pad_id(self.tokenizer), device=self.device)

    def batch(self, prompts: Sequence[str]) -> Batch:
        """Tokenize prompts and align them at their last token (padding on the left)."""
        sequences = [self.prompt_ids(p) for p in prompts]
        return self.align(sequences, [len(ids) - 1 for ids in sequences])

    def prompt_ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt, BOS included where the tokenizer adds one. Raises InputError when there are none."""
        ids, _ = encode(self.tokenizer, prompt)
        if not ids:
            raise InputError(f"prompt {prompt!r} has no token; expected some text")
        return ids

    def question(self, prompt: str, target: str) -> tuple[list[int], list[int], list[int]]:
        """How to ask for a target in one pass: (token ids to run, columns that predict it, its token ids), the last two of one length.

        The target's earlier tokens stand in the sequence, so its joint probability is the product over the columns.
        """
        head, tail = self.prompt_ids(prompt), target_ids(self.tokenizer, prompt, target)
        return head + tail[:-1], list(range(len(head) - 1, len(head) + len(tail) - 1)), tail

    def check_batch(self, batch: Batch) -> None:
        """Raises InputError for rows longer than the model's positions, UnsupportedModelError for padding it would see."""
        longest = int(batch.attention_mask.sum(1).max())
        if self.max_tokens is not None and longest > self.max_tokens:
            raise InputError(
                f"a text of {longest} tokens was given; {self.name} has positions for {self.max_tokens}: shorten it"
            )
        if not self.hides_padding and batch.left_padded:
            raise UnsupportedModelError(
                f"{self.name} does not hide padding on the left, so prompts of different lengths would change one another; "
                "give them one by one"
            )

    # ── asking it ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def coefficients(self, prompt: str, layers: Iterable[int] | None = None) -> Tensor:
        """The coefficient of every neuron at every token of a prompt: (n_layers or the layers asked for, n_tokens, d_ff).

        Raises LayerError for a layer that does not exist, UnsupportedModelError for one with experts, InputError when the layers asked
        for differ in their number of neurons.
        """
        wanted = (
            list(range(self.n_layers))
            if layers is None
            else [check_layer(layer, self.n_layers) for layer in layers]
        )
        if not wanted:
            raise InputError("no layer was asked for; expected at least one, or None for all")
        routed = [layer for layer in wanted if self.ffn[layer].n_experts]
        if routed:
            raise UnsupportedModelError(
                f"layers {routed} have experts, each with coefficients of its own; use lm.routing(prompt, layer)"
            )
        widths = {self.ffn[layer].d_ff for layer in wanted}
        if len(widths) > 1:
            raise InputError(
                f"the layers asked for have {sorted(widths)} neurons; ask for layers of one width at a time"
            )
        batch = self.batch([prompt])
        self.check_batch(batch)
        with recording(
            {layer: self.ffn[layer].down for layer in wanted}, stop=True, copy=False
        ) as calls:
            self.forward(batch)
        return torch.stack([calls[layer][0].input.reshape(batch.width, -1) for layer in wanted])

    @torch.no_grad()
    def routing(self, prompt: str, layer: int) -> Routing:
        """Which experts each token of a prompt goes to in a layer, with what weights, and their coefficients.

        Raises LayerError for a layer that does not exist or has no experts.
        """
        batch = self.batch([prompt])
        self.check_batch(batch)
        return self.ffn[check_layer(layer, self.n_layers)].routing(lambda: self.forward(batch))

    @torch.no_grad()
    def next_tokens(self, prompt: str, k: int = 10) -> list[tuple[str, float]]:
        """The k likeliest next tokens with their probabilities, likeliest first."""
        if k < 1:
            raise InputError(f"asked for the {k} likeliest tokens; expected at least 1")
        logits = self.last_logits(self.batch([prompt]))[0].float()
        top = logits.softmax(-1).topk(min(k, len(logits)))
        return [
            (self.tokenizer.decode([int(i)]), float(p))
            for p, i in zip(top.values, top.indices, strict=True)
        ]

    @torch.no_grad()
    def last_logits(self, batch: Batch) -> Tensor:
        """Logits after each row's pivot token: (B, vocab)."""
        return self.head(self.last_hidden(batch)[:, batch.pivot])

    @torch.no_grad()
    def last_hidden(self, batch: Batch) -> Tensor:
        """The last layer's output, (B, T, d_model), without the unembedding."""
        self.check_batch(batch)
        with recording({"last": self.layers[-1]}, stop=True) as calls:
            self.forward(batch)
        return calls["last"][0].output

    @torch.no_grad()
    def log_prob(
        self, prompts: Sequence[str], targets: Sequence[str], *, per_token: bool = False
    ) -> Tensor:
        """log p(target | prompt) for each pair, in nats, summed over the target's tokens (or their mean): (n,) float32.

        Raises InputError when the lists differ in length or are empty.
        """
        total, lengths = (
            torch.zeros(len(prompts), device=self.device),
            torch.zeros(len(prompts), device=self.device),
        )
        for pairs, wanted, logits in self._target_logits(prompts, targets):
            picked = logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            total.index_add_(0, pairs, picked.to(self.device))
            lengths.index_add_(0, pairs, torch.ones_like(pairs, dtype=lengths.dtype))
        return total / lengths if per_token else total

    @torch.no_grad()
    def says(self, prompts: Sequence[str], targets: Sequence[str]) -> list[bool]:
        """Whether greedy decoding of each prompt gives its whole target: each of its tokens is the likeliest after those before it.

        One pass a pair, where `answer` decodes token by token. Raises InputError as `log_prob`.
        """
        wrong = torch.zeros(len(prompts), device=self.device)
        for pairs, wanted, logits in self._target_logits(prompts, targets):
            wrong.index_add_(0, pairs, (logits.argmax(-1) != wanted).to(wrong))
        return (wrong == 0).tolist()

    def _target_logits(
        self, prompts: Sequence[str], targets: Sequence[str]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Where each target token is due: (which pair (N,), the token's id (N,), logits (N, vocab)), a few hundred at a time."""
        if (
            isinstance(prompts, str)
            or isinstance(targets, str)
            or len(prompts) != len(targets)
            or not prompts
        ):
            raise InputError("expected as many prompts as targets, at least one, as two lists")
        asked = [self.question(p, t) for p, t in zip(prompts, targets, strict=True)]
        for group in self.groups([len(ids) for ids, _, _ in asked]):
            hidden = self.last_hidden(self.align([asked[i][0] for i in group], [0] * len(group)))
            rows = torch.tensor(
                [r for r, i in enumerate(group) for _ in asked[i][1]], device=hidden.device
            )
            columns = torch.tensor(
                [column for i in group for column in asked[i][1]], device=hidden.device
            )
            wanted = torch.tensor(
                [token for i in group for token in asked[i][2]], device=hidden.device
            )
            pairs = torch.tensor([i for i in group for _ in asked[i][2]], device=self.device)
            # A large vocabulary makes logits the largest tensors of all: a few hundred positions at a time.
            for part in torch.split(torch.arange(len(rows), device=hidden.device), 256):
                logits = self.head(hidden[rows[part], columns[part]])
                yield pairs[part.to(pairs.device)], wanted[part].to(logits.device), logits

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], max_new_tokens: int = 8) -> list[str]:
        """Greedy continuation of each prompt as text, without white space around it; ends before an EOS or a line break."""
        if isinstance(prompts, str) or not prompts:
            raise InputError("answer takes a list of prompts, at least one")
        sequences = [self.prompt_ids(p) for p in prompts]
        answers = [""] * len(sequences)
        for group in self.groups([len(ids) for ids in sequences]):
            for index, ids in zip(
                group,
                self.continue_greedily([sequences[i] for i in group], max_new_tokens),
                strict=True,
            ):
                answers[index] = self.as_answer(ids)
        return answers

    def as_answer(self, ids: Sequence[int]) -> str:
        """New token ids as an answer: the first line that says something, without white space around it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip().split("\n")[0].strip()

    @torch.no_grad()
    def continue_greedily(
        self, sequences: Sequence[Sequence[int]], n_tokens: int
    ) -> list[list[int]]:
        """Greedy new ids for sequences that share a batch, each up to (not including) its EOS, or to the end of its first line."""
        batch = self.align(sequences, [len(ids) - 1 for ids in sequences])
        if n_tokens < 1:
            return [[] for _ in sequences]
        return self.continue_from(batch, *self.begin(batch), n_tokens)

    @torch.no_grad()
    def begin(self, batch: Batch) -> tuple[Tensor, DynamicCache | None]:
        """One pass over a batch whose rows end together: the logits (B, vocab) behind them, and their keys and values, if those serve.

        Raises what `check_batch` raises.
        """
        self.check_batch(batch)
        # A cache of plain growing layers serves sliding windows too: the model's own masks hide what is out of reach.
        cache = DynamicCache() if self.caches_prefix else None
        return self._next_logits(batch, 0, cache), cache

    @torch.no_grad()
    def continue_from(
        self, batch: Batch, logits: Tensor, cache: DynamicCache | None, n_tokens: int
    ) -> list[list[int]]:
        """`continue_greedily` from what `begin` gave; the cache grows, and loses rows that have ended."""
        ends = self.end_ids
        new: list[list[int]] = [[] for _ in range(batch.size)]
        rows = list(range(batch.size))  # which of them each row of the batch is
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
                rows, batch, chosen = (
                    [rows[at] for at in still],
                    batch.keep(kept),
                    chosen[kept.to(chosen.device)],
                )
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

    def groups(self, lengths: list[int], budget: int = 4096) -> list[list[int]]:
        """Indices in groups of similar length (equal length where padding shows), each at most `budget` tokens wide."""
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

    @property
    def end_ids(self) -> set[int]:
        """Ids that end a text, as the tokenizer and the model's generation settings know them."""
        ends: set[int] = set()
        generation = getattr(self.module, "generation_config", None)
        for value in (self.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
            ends.update(
                value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            )
        return ends


def check_model(lm: object) -> None:
    """Raises InputError unless this is a LanguageModel."""
    if not isinstance(lm, LanguageModel):
        what = f"the name {lm!r}" if isinstance(lm, str) else f"a {type(lm).__name__}"
        raise InputError(
            f"expected a model, got {what}; load it first: lm = factsmith.load(...), or factsmith.wrap(module, tokenizer)"
        )


def _accepted(module: nn.Module) -> set[str]:
    """Names of the inputs the model's forward declares, and those of the model inside that it hands all others on to."""
    names: set[str] = set()
    inner: Any = module
    while inner is not None:
        parameters = inspect.signature(type(inner).forward).parameters
        names.update(parameters)
        below = getattr(inner, "base_model", None)
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        inner = below if passes_on and below is not inner else None
    return names
