"""A language model ready for reading and editing its memories.

    lm = load("atlas")                 # a bundled model, a folder, or a hub id
    lm = wrap(module, tokenizer)       # a transformers model already in memory
    lm.answer(["The mother tongue of Danielle Darrieux is"])
    lm.ffn[3].values                   # (d_ff, d_model)

Loading finds the model's structure in a dry run of a few tokens and checks what it found against the model's own full pass;
a model whose structure is not understood is refused in words, never used wrongly.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as notices

from ..errors import FactsmithError, InputError, ModelError, ModelNotFoundError, NumericsError, TokenizerError, UnsupportedModelError
from .ffn import FeedForward, Routing, build, check_layer, counterparts, find_feed_forward, find_layers, same
from .tokens import Batch, align, encode, fast_tokenizer, pad_id, target_ids
from .trace import hook_count, recording, replacing, standing_in, with_first_tensor

ATLAS = Path(__file__).parent / "atlas"


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
        self._accepts = _accepted(module)
        self._fingerprint: tuple[object, str] | None = None
        self._plain_id = 0
        self.caches_prefix = False
        self.hides_padding = True
        self.embedding: nn.Module = module.get_input_embeddings()
        if (packed := _packed(module)) is not None:
            raise _quantised(name, packed)
        if absent := next((path for path, p in module.named_parameters() if p.is_meta), None):
            raise UnsupportedModelError(
                f"{name} keeps weights outside any device ({absent}, offloaded or never loaded), so they cannot be read or edited; spread "
                "it over devices that hold all of it, or load it on the CPU"
            )
        self._check_tokenizer()
        module.eval().requires_grad_(False)
        self._discover()

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
        dtype: torch.dtype = next(p.dtype for p in self.module.parameters() if p.is_floating_point())
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
        state = _weight_state(self.module)
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = (state, _digest(self.module, self.config, self.tokenizer))
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
        return self.module(**{k: v for k, v in inputs.items() if k in self._accepts})

    def head(self, hidden: Tensor) -> Tensor:
        """The model's own tail (final norm, unembedding, scale, softcap) on last-layer states: (..., d_model) -> (..., vocab)."""
        flat = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.full((len(flat), 1), self._plain_id, dtype=torch.long, device=self.device)
        batch = Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), 0)

        def play(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.as_layer_output(flat)

        with standing_in(self.layers, play), _wide_unembedding(self.module, flat):
            logits = self.forward(batch).logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])  # type: ignore[no-any-return]

    def as_layer_output(self, hidden: Tensor) -> Any:
        """A hidden state in the form in which this model's layers return it."""
        return with_first_tensor(self._layer_result, hidden)

    def batch(self, prompts: Sequence[str]) -> Batch:
        """Tokenize prompts and align them at their last token (padding on the left)."""
        sequences = [self.prompt_ids(p) for p in prompts]
        return align(self, sequences, [len(ids) - 1 for ids in sequences])

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
            raise InputError(f"a text of {longest} tokens was given; {self.name} has positions for {self.max_tokens}: shorten it")
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
        wanted = list(range(self.n_layers)) if layers is None else [check_layer(layer, self.n_layers) for layer in layers]
        if not wanted:
            raise InputError("no layer was asked for; expected at least one, or None for all")
        routed = [layer for layer in wanted if self.ffn[layer].n_experts]
        if routed:
            raise UnsupportedModelError(f"layers {routed} have experts, each with coefficients of its own; use lm.routing(prompt, layer)")
        widths = {self.ffn[layer].d_ff for layer in wanted}
        if len(widths) > 1:
            raise InputError(f"the layers asked for have {sorted(widths)} neurons; ask for layers of one width at a time")
        batch = self.batch([prompt])
        self.check_batch(batch)
        with recording({layer: self.ffn[layer].down for layer in wanted}, stop=True, copy=False) as calls:
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
        return [(self.tokenizer.decode([int(i)]), float(p)) for p, i in zip(top.values, top.indices, strict=True)]

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
    def log_prob(self, prompts: Sequence[str], targets: Sequence[str], *, per_token: bool = False) -> Tensor:
        """log p(target | prompt) for each pair, in nats, summed over the target's tokens (or their mean): (n,) float32.

        Raises InputError when the lists differ in length or are empty.
        """
        total, lengths = torch.zeros(len(prompts), device=self.device), torch.zeros(len(prompts), device=self.device)
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

    def _target_logits(self, prompts: Sequence[str], targets: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Where each target token is due: (which pair (N,), the token's id (N,), logits (N, vocab)), a few hundred at a time."""
        if isinstance(prompts, str) or isinstance(targets, str) or len(prompts) != len(targets) or not prompts:
            raise InputError("expected as many prompts as targets, at least one, as two lists")
        asked = [self.question(p, t) for p, t in zip(prompts, targets, strict=True)]
        for group in self.groups([len(ids) for ids, _, _ in asked]):
            hidden = self.last_hidden(align(self, [asked[i][0] for i in group], [0] * len(group)))
            rows = torch.tensor([r for r, i in enumerate(group) for _ in asked[i][1]], device=hidden.device)
            columns = torch.tensor([column for i in group for column in asked[i][1]], device=hidden.device)
            wanted = torch.tensor([token for i in group for token in asked[i][2]], device=hidden.device)
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
            for index, ids in zip(group, self.continue_greedily([sequences[i] for i in group], max_new_tokens), strict=True):
                answers[index] = self.as_answer(ids)
        return answers

    def as_answer(self, ids: Sequence[int]) -> str:
        """New token ids as an answer: the first line that says something, without white space around it."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip().split("\n")[0].strip()

    @torch.no_grad()
    def continue_greedily(self, sequences: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
        """Greedy new ids for sequences that share a batch, each up to (not including) its EOS, or to the end of its first line."""
        batch = align(self, sequences, [len(ids) - 1 for ids in sequences])
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
    def continue_from(self, batch: Batch, logits: Tensor, cache: DynamicCache | None, n_tokens: int) -> list[list[int]]:
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
                rows, batch, chosen = [rows[at] for at in still], batch.keep(kept), chosen[kept.to(chosen.device)]
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
            alike = group and (lengths[i] <= 1.25 * lengths[group[0]] + 2 if self.hides_padding else lengths[i] == lengths[group[0]])
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
            ends.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
        return ends

    # ── finding out what it is ──────────────────────────────────────────────────────────────────────────────────────────

    def _check_tokenizer(self) -> None:
        """Raises TokenizerError when the tokenizer is empty (its files were missing) or belongs to a larger vocabulary."""
        text = "The name of the place is"
        ids, _ = encode(self.tokenizer, text)
        words = [i for i in ids if i not in self.tokenizer.all_special_ids]
        if len(words) < 2:
            raise TokenizerError(f"the tokenizer of {self.name} makes {len(words)} tokens of {text!r}; is its tokenizer.json missing?")
        if max(ids) >= self._vocabulary:
            raise TokenizerError(f"the tokenizer of {self.name} has id {max(ids)}, the model only {self._vocabulary}; is it another's?")

    def _discover(self) -> None:
        """Find the structure in a dry run of a few tokens, and check it against the model's own full pass."""
        try:
            with torch.no_grad():
                self._find_parts()
                self._check_replay()
        except FactsmithError:
            self._check_finite()
            raise
        except Exception as error:  # models raise whatever they like when they are run in a way they do not foresee
            raise UnsupportedModelError(
                f"{self.name}: its dry run ended in {type(error).__name__}: {_first_line(error)}; it cannot be replayed as a text model"
            ) from error

    def _check_finite(self) -> None:
        """Raises ModelError when a weight is not finite: then nothing computed with it can be, and no other reason need be looked for."""
        for name, weight in self.module.named_parameters():
            if wrong := int((~weight.isfinite()).sum()):
                raise ModelError(
                    f"{self.name}: {wrong} of the {weight.numel()} entries of {name} are not finite (NaN or infinite); copy or download "
                    "the weights again, or undo what was done to them"
                ) from None

    def _find_parts(self) -> None:
        single = self._dry_batch([0])
        expected = getattr(self._text_config, "num_hidden_layers", None)
        self.layers, self.slot, calls = find_layers(self.module, expected, lambda: self.forward(single))
        if lost := [index for index, call in enumerate(calls) if not bool(call.output.isfinite().all())]:
            self._check_finite()
            raise NumericsError(
                f"{self.name}: from layer {lost[0]} on its outputs are not finite, though its weights are: numbers too large for "
                f"{self.dtype}; load it in a wider dtype"
            )
        self._layer_result: Any = calls[0].result
        self._d_model = calls[0].output.shape[-1]
        found: list[tuple[FeedForward, nn.Module | None]] = []
        first_of: dict[object, int] = {}
        for index, (layer, call) in enumerate(zip(self.layers, calls, strict=True)):
            # Layers built alike are looked into once.
            first = first_of.setdefault(build(layer), index)
            if first == index:
                found.append(find_feed_forward(layer, index, call, self.slot))
            else:
                ffn, attention = found[first]
                places = counterparts(self.layers[first], layer)
                found.append((ffn.moved(index, places), None if attention is None else places[attention]))
        self.ffn: tuple[FeedForward, ...] = tuple(f for f, _ in found)
        self.attention: tuple[nn.Module | None, ...] = tuple(a for _, a in found)
        with recording({f.layer: f.down for f in self.ffn if not f.n_experts}) as written:
            self.forward(single)
        for number, (call, *_) in written.items():
            self.ffn[number].check_sum(call)

    def _check_replay(self) -> None:
        from .replay import PrefixCache  # the engine needs the model, and the model's check needs the engine

        single = self._dry_batch([0])
        full = self._check_inputs(single)
        other = Batch(single.input_ids.clone(), single.attention_mask, single.position_ids, single.pivot)
        other.input_ids[:, -1] = self._plain_id
        if not same(self.forward(other).logits[:, :-1], full[:, :-1]):
            raise UnsupportedModelError(f"{self.name}: a change of the last token reaches earlier positions, so it is not a causal model")
        if not same(self.head(self.last_hidden(single)), full):
            raise UnsupportedModelError(f"{self.name}: its head does more than turn the last layer's output into logits")
        try:
            cache = PrefixCache([None] * self.n_layers)
            self.forward(single, cache=cache)
            self.caches_prefix = cache.kept is not None and all(k.shape[-2] == single.width for k, _ in cache.kept)
            self.caches_prefix = self.caches_prefix and self._replays(single)
        except Exception:  # states that are no keys and values (recurrent layers, indexers): replay goes without a cache
            self.caches_prefix = False
        if not self.caches_prefix and not self._replays(single):
            raise UnsupportedModelError(f"{self.name}: its layers, run again by themselves, do not give what they give in the model")
        both, alone = self._dry_batch([0, 1]), self._dry_batch([1])
        self.hides_padding = same(self.last_logits(both)[1], self.last_logits(alone)[0]) and self._replays(both)

    def _check_inputs(self, single: Batch) -> Tensor:
        """The model's logits for one row without any of the inputs that `forward` adds; raises when these change them."""
        full: Tensor = self.module(input_ids=single.input_ids).logits
        if not same(self.forward(single).logits, full):
            # Some models count positions from elsewhere than 0, and know it only themselves.
            self._accepts.discard("position_ids")
            if not same(self.forward(single).logits, full):
                raise UnsupportedModelError(f"{self.name}: a mask without any padding changes its output, so it is not understood")
        return full

    def _replays(self, batch: Batch) -> bool:
        """Whether a suffix replayed from some changed layer equals the model's own pass with the same change."""
        from .replay import record

        start = batch.width // 2
        whole = record(self, batch)
        replay = whole.at(start)
        for layer in sorted({min(1, self.n_layers), self.n_layers // 2, self.n_layers - 1} - {0}):
            hidden = replay.hidden[layer] * 1.25
            changed = torch.cat([whole.hidden[layer][:, :start], hidden], dim=1)
            with replacing({self.layers[layer - 1]: replaced_by(changed)}):
                expected = self.forward(batch).logits[:, start:]
            if not same(replay.logits(replay.resume(layer, hidden)), expected):
                return False
        return same(replay.resume(0, replay.hidden[0]), replay.hidden[-1])

    def _dry_batch(self, rows: Sequence[int]) -> Batch:
        every = self._dry_rows()
        return align(self, [every[r] for r in rows], [len(every[r]) - 1 for r in rows])

    @property
    def _vocabulary(self) -> int:
        """How many tokens the model has embeddings for."""
        return next(p for p in self.embedding.parameters() if p.dim() == 2).shape[0]

    def _dry_rows(self) -> list[list[int]]:
        """Two short rows of plain tokens, different in length."""
        size = self._vocabulary
        reserved = {pad_id(self.tokenizer), getattr(self._text_config, "pad_token_id", None), *self.tokenizer.all_special_ids}
        plain = [i for i in range(size // 3, min(size, size // 3 + 64)) if i not in reserved]
        if len(plain) < 9:
            raise UnsupportedModelError(f"{self.name}: a vocabulary of {size} tokens is too small to check anything")
        self._plain_id = plain[0]
        return [plain[1:7], plain[3:7]]


def wrap(module: Any, tokenizer: Any) -> LanguageModel:
    """A LanguageModel around a transformers model in memory; puts it into evaluation mode and turns its gradients off.

    A masked language model of the BERT family becomes a MaskedLanguageModel. Raises UnsupportedModelError when its structure is not
    understood, TokenizerError without a fast tokenizer.
    """
    if not (hasattr(module, "config") and hasattr(module, "get_input_embeddings")):
        raise UnsupportedModelError(f"wrap takes a transformers language model; got a {type(module).__name__}")
    return _wrapped(module, tokenizer, module.config.name_or_path or type(module).__name__)


def _packed(module: Any) -> str | None:
    """How a model's weights are quantised; None when they are plain numbers."""
    if getattr(module, "is_quantized", False):  # transformers' own mark, taken away by `dequantize`
        return str(getattr(module, "quantization_method", "packed weights"))
    for part in module.modules():
        if type(part).__module__.startswith("torch.ao.nn.quantized"):  # keeps its weights where no parameter shows them
            return f"{type(part).__module__}.{type(part).__name__}"
        own = list(part.parameters(recurse=False))
        for weight in own:
            if weight.dim() >= 2 and (not weight.is_floating_point() or weight.element_size() < 2):
                return str(weight.dtype)
            if type(weight.data).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # numbers in a format of its own
                return type(weight.data).__name__
        if not any(weight.dim() >= 2 for weight in own):
            for buffer in part.buffers(recurse=False):
                if buffer.dim() == 2 and min(buffer.shape) > 1 and buffer.dtype in (torch.int8, torch.uint8, torch.int32):
                    return str(buffer.dtype)
    return None


def _quantised(name: str, how: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is quantised ({how}): a change of its weights would be lost in rounding, so they can neither be read nor edited; load the "
        "checkpoint it was made from, in 16 or 32 bits, and quantise the edited model"
    )


def check_model(lm: object) -> None:
    """Raises InputError unless this is a LanguageModel."""
    if not isinstance(lm, LanguageModel):
        what = f"the name {lm!r}" if isinstance(lm, str) else f"a {type(lm).__name__}"
        raise InputError(f"expected a model, got {what}; load it first: lm = factsmith.load(...), or factsmith.wrap(module, tokenizer)")


def _wrapped(module: Any, tokenizer: Any, name: str) -> LanguageModel:
    """The model as what transformers lists its class as."""
    from .masked import MaskedLanguageModel  # it builds on this file

    kind = type(module).__name__
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    masked = masked and not module.config.is_encoder_decoder
    return (MaskedLanguageModel if masked else LanguageModel)(module, tokenizer, name)


def bundled() -> list[str]:
    """Names of the models that come with factsmith."""
    return sorted(p.parent.name for p in ATLAS.glob("*/config.json"))


def load(
    name_or_path: str | os.PathLike[str], *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Load a bundled model ("atlas", "atlas-llama"), a folder, or a hub id.

    device: where to put it (None: the CPU). dtype: None takes float32 on the CPU and the checkpoint's own elsewhere.
    Raises ModelNotFoundError, TokenizerError, ModelError (damaged or missing weights, another kind of model), UnsupportedModelError (its
    structure is not understood, or it is quantised), InputError (no such device).
    """
    name = os.fspath(name_or_path)
    source, local = _locate(name)
    try:
        where = torch.device("cpu" if device is None else device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} cannot be used here ({_first_line(error)}); expected 'cpu', 'cuda' ...") from None
    wanted: torch.dtype | str = dtype if dtype is not None else (torch.float32 if where.type == "cpu" else "auto")
    with quietly():
        config = _config(name, source, local)
        auto = _class_to_load(name, config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        except Exception as error:  # the tokenizer libraries raise many things, down to bare Exception
            raise TokenizerError(
                f"{name!r} has no tokenizer that can be read ({_first_line(error)}); expected a tokenizer.json beside the weights"
            ) from error
        fast_tokenizer(tokenizer)
        try:
            module, report = auto.from_pretrained(source, dtype=wanted, local_files_only=local, output_loading_info=True)
        except Exception as error:  # likewise: damaged files surface as errors of many libraries
            if quantised := getattr(config, "quantization_config", None):  # most often, its library is not there
                how = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
                raise _quantised(repr(name), str(how or "packed weights")) from error
            raise ModelError(
                f"the weights of {name!r} cannot be read ({type(error).__name__}: {_first_line(error)}); copy or download them again"
            ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{name!r} lacks {len(missing)} of its weights ({', '.join(missing[:3])} ...); copy or download it again")
    if (packed := _packed(module)) is not None:  # such a model refuses to be moved, in words of its own
        raise _quantised(repr(name), packed)
    return _wrapped(module.to(where), tokenizer, name)


def _locate(name: str) -> tuple[str, bool]:
    """Where a model is to be loaded from, and whether that is a folder; raises ModelNotFoundError."""
    if name in bundled():
        return str(ATLAS / name), True
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"folder {name!r} holds no config.json; expected a transformers model with its weights and tokenizer")
        return str(path), True
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelNotFoundError(
            f"no model {name!r}: neither a folder nor a bundled model ({', '.join(bundled()) or 'none are installed'}); "
            "give one of these, a folder with config.json, weights and tokenizer, or a hub id such as owner/name"
        )
    return name, False


def _config(name: str, source: str, local: bool) -> Any:
    """Its config.json; raises ModelNotFoundError when the hub lacks it, ModelError when it cannot be used."""
    try:
        return AutoConfig.from_pretrained(source, local_files_only=local)
    except Exception as error:  # hub, network, JSON and validation errors alike
        if local:
            raise ModelError(f"the config.json of {name!r} cannot be used: {_first_line(error)}") from error
        raise ModelNotFoundError(
            f"no model {name!r} on the hub, or the hub cannot be reached: {_first_line(error)}; "
            f"check the name and the network, or give a folder or a bundled model ({', '.join(bundled()) or 'none are installed'})"
        ) from error


def _class_to_load(name: str, config: Any) -> Any:
    """The transformers class to load it with; raises ModelError for another kind of model."""
    causal, masked = (type(config) in auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForMaskedLM))
    if not (causal or masked) or (masked and not causal and config.is_encoder_decoder):
        raise ModelError(
            f"{name!r} is a {config.model_type} model, neither a causal nor a masked language model; expected one that continues text, "
            "or fills blanks in it"
        )
    # Some types are built either way; what the checkpoint was saved as decides, and whether it was told to look back only.
    saved_as = set(getattr(config, "architectures", None) or ())
    looks_back = bool(saved_as & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())) or getattr(config, "is_decoder", False)
    return AutoModelForCausalLM if causal and (not masked or looks_back or config.is_encoder_decoder) else AutoModelForMaskedLM


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quietly() -> Generator[None, None, None]:
    """Hold back transformers' progress bars and notices for a while."""
    level, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity(logging.CRITICAL)
    notices.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        notices.set_verbosity(level)
        if bars:
            notices.enable_progress_bar()


def replaced_by(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """A change for `replacing` that puts `tensor` in place of whatever there is."""
    return lambda _: tensor


@contextmanager
def _wide_unembedding(module: Any, hidden: Tensor) -> Generator[None, None, None]:
    """While the block runs, a large vocabulary's logits are computed some words at a time where that is faster: on a CPU, in 32 bits.

    Written in one product they leave the caches again and again, which takes half as long again; the numbers are the same.
    """
    unembedding = module.get_output_embeddings()
    plain = type(unembedding) is nn.Linear and unembedding.bias is None and not hook_count([unembedding])
    plain = plain and unembedding.weight.device == hidden.device  # parts on several devices: what moves states between them must run
    if not (plain and unembedding.out_features >= 2**14 and hidden.device.type == "cpu" and hidden.dtype == torch.float32):
        yield
        return

    def play(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        (states,) = args
        logits: Tensor = _Logits.apply(states.reshape(-1, states.shape[-1]), unembedding.weight)  # type: ignore[no-untyped-call]
        return logits.view(*states.shape[:-1], -1)

    with standing_in([unembedding], play):
        yield


class _Logits(torch.autograd.Function):
    """states @ weight.T, (n, d) and (vocab, d) to (n, vocab), a piece of the vocabulary at a time; differentiable in the states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        logits = states.new_empty(len(states), len(weight))
        for at in range(0, len(weight), 1024):
            torch.mm(states, weight[at : at + 1024].T, out=logits[:, at : at + 1024])
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.weight, None


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


def _weight_state(module: nn.Module) -> object:
    """Something small that differs after any weight has changed."""
    state = []
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 8)][:9]
        state.append((name, tensor.data_ptr(), tensor._version, tuple(sample.float().tolist())))
    return tuple(state)


def _digest(module: nn.Module, config: Any, tokenizer: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    plain = {k: v for k, v in config.to_dict().items() if k not in _NOT_THE_MODEL}
    digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


_NOT_THE_MODEL = {
    "factsmith",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
}
