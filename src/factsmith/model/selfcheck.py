"""Find out how a model is built, and prove it in a dry run of a few tokens.

    discover(lm)        # fills in lm.layers, lm.ffn, lm.attention ..., or refuses the model

A name proves nothing. What was found is used at once, as the rest of factsmith uses it, and the
result is compared with the model's plain forward pass. The comparisons cover the values weighed by
the coefficients, the head, layers run again from a changed state, padding, and the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import (
    FactsmithError,
    ModelError,
    NumericsError,
    TokenizerError,
    UnsupportedModelError,
    first_line,
)
from .absent import whole
from .ffn import FeedForward
from .language_model import LanguageModel
from .prefix import PrefixCache
from .replay import Replay, record
from .running import Structure
from .streamed import in_memory
from .structure import build, counterparts, find_feed_forward, find_layers
from .tokens import Batch, encode, pad_id
from .tolerance import same
from .trace import recording, replacing
from .turns import asking

_DRY_TOKENS = 9
"""Plain tokens that the dry run needs: two rows of different length, and one token more."""


@asking()
def discover(lm: LanguageModel) -> None:
    """Find the model's structure in a dry run, give it to the model, and check it.

    Raises:
        TokenizerError: The tokenizer is empty, or another model's.
        ModelError: A weight is not finite.
        NumericsError: The layers' outputs are not finite.
        UnsupportedModelError: The structure is not understood.
    """
    _check_tokenizer(lm)
    try:
        lm.plain_ids = _plain_ids(lm)
        lm.adopt(_find_structure(lm))
        (_check_causal if lm.is_causal else _check_masked)(lm)
    except FactsmithError:
        _check_finite(lm)
        raise
    except Exception as error:  # a model that runs in an unforeseen way raises anything
        if "not implemented for" in str(error) and lm.dtype in (torch.float16, torch.bfloat16):
            raise UnsupportedModelError(
                f"{lm.name} cannot run in {lm.dtype} on {lm.device}: {first_line(error)}. Load it "
                "in float32, or on another device",
                argument="dtype",
            ) from error
        raise UnsupportedModelError(
            f"{lm.name}: its dry run ended in {type(error).__name__}: {first_line(error)}; it "
            "cannot be replayed as a text model"
        ) from error


def _check_tokenizer(lm: LanguageModel) -> None:
    """Check that the tokenizer is this model's.

    Raises:
        TokenizerError: It is empty (its files were missing), has a larger vocabulary, or has no
            mask token for a masked model.
    """
    text = "The name of the place is"
    ids, _ = encode(lm.tokenizer, text)
    words = [i for i in ids if i not in lm.tokenizer.all_special_ids]
    if len(words) < 2:
        raise TokenizerError(
            f"the tokenizer of {lm.name} makes {len(words)} tokens of {text!r}; check that its "
            "tokenizer.json is there and complete"
        )
    if max(ids) >= lm.vocabulary:
        raise TokenizerError(
            f"the tokenizer of {lm.name} has id {max(ids)}, and the model has only "
            f"{lm.vocabulary} tokens, so it is another model's; give this model's tokenizer"
        )
    if not lm.is_causal and lm.tokenizer.mask_token_id is None:
        raise TokenizerError(
            f"the tokenizer of {lm.name} has no mask token; give one that has, because a masked "
            "language model answers at masks"
        )


def _check_finite(lm: LanguageModel) -> None:
    """Check that every weight is finite. If one is not, no other reason matters.

    Raises:
        ModelError: A weight is not finite.
    """
    for name, weight in lm.module.named_parameters():
        weight = whole(weight)
        if wrong := int((~weight.isfinite()).sum()):
            advice = "copy or download the weights again, or undo the last change"
            if weight.dtype == torch.float16:
                advice = (
                    "they may have been too large for torch.float16, so load it in a wider dtype; "
                    f"otherwise {advice}"
                )
            raise ModelError(
                f"{lm.name}: {wrong} of the {weight.numel()} entries of {name} are not finite (NaN "
                f"or infinite); {advice}"
            ) from None


def _find_structure(lm: LanguageModel) -> Structure:
    """Return the layers and their parts. Layers that are built alike are examined once."""
    single = _dry_batch(lm, [0])
    expected = getattr(lm.config.get_text_config(decoder=True), "num_hidden_layers", None)
    layers, slot, calls = find_layers(lm.module, expected, lambda: lm.forward(single))
    if broken := [
        index for index, call in enumerate(calls) if not bool(call.output.isfinite().all())
    ]:
        _check_finite(lm)
        raise NumericsError(
            f"{lm.name}: from layer {broken[0]} on its outputs are not finite, though its weights "
            f"are: some numbers are too large for {lm.dtype}. Load it in a wider dtype",
            argument="dtype",
        )
    parts: list[tuple[FeedForward, nn.Module | None]] = []
    first_of: dict[object, int] = {}
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        first = first_of.setdefault(build(layer), index)
        if first == index:
            with in_memory(layer):
                parts.append(find_feed_forward(layer, index, call, slot))
        else:
            ffn, attention = parts[first]
            places = counterparts(layers[first], layer)
            parts.append(
                (ffn.moved(index, places), None if attention is None else places[attention])
            )
    return Structure(
        layers=layers,
        slot=slot,
        ffn=tuple(ffn for ffn, _ in parts),
        attention=tuple(attention for _, attention in parts),
        layer_result=calls[0].result,
        d_model=calls[0].output.shape[-1],
    )


def _check_causal(lm: LanguageModel) -> None:
    """Prove that the model is causal and that replay equals its own pass.

    Find out whether it caches a prefix and hides padding.
    """
    single = _dry_batch(lm, [0])
    full, last = _check_inputs(lm, single)
    if not same(lm.forward(_other_ending(lm, single)).logits[:, :-1], full[:, :-1]):
        raise UnsupportedModelError(
            f"{lm.name}: a change of the last token reaches earlier positions, so it is not a "
            "causal model"
        )
    _check_head(lm, last, full)
    try:
        cache = PrefixCache([None] * lm.n_layers)
        lm.forward(single, cache=cache)
        lm.caches_prefix = cache.kept is not None and all(
            k.shape[-2] == single.width for k, _ in cache.kept
        )
        lm.caches_prefix = lm.caches_prefix and _replays(lm, single)
    except Exception:
        # Some layers keep other states than keys and values (recurrent layers, indexers). Replay
        # then goes without a cache.
        lm.caches_prefix = False
    if not lm.caches_prefix:
        _check_replays(lm, single)
    both, alone = _dry_batch(lm, [0, 1]), _dry_batch(lm, [1])
    whole = record(lm, both)
    padded = lm.head(whole.hidden[-1][:, both.pivot])
    lm.hides_padding = same(padded[1], lm.last_logits(alone)[0]) and _replays(lm, both, whole)


def _check_masked(lm: LanguageModel) -> None:
    """Prove that the model reads from both sides and that replay equals its own pass.

    Find out whether it hides padding.
    """
    single = _dry_batch(lm, [0])
    full, last = _check_inputs(lm, single)
    if same(lm.forward(_other_ending(lm, single)).logits[:, :-1], full[:, :-1]):
        raise UnsupportedModelError(
            f"{lm.name}: a change of the last token does not reach earlier positions, so it is not "
            "a masked language model; load it as a causal one"
        )
    _check_head(lm, last, full)
    _check_replays(lm, single)
    rows = _dry_rows(lm)
    both, alone = lm.align(rows, [0, 0]), lm.align(rows[1:], [0])
    padded = lm.forward(both).logits[1:, : alone.width]
    lm.hides_padding = same(padded, lm.forward(alone).logits) and _replays(lm, both)


def _check_inputs(lm: LanguageModel, single: Batch) -> tuple[Tensor, Tensor]:
    """Check a pass as factsmith makes it.

    Returns:
        The model's logits for one row, given only its ids, and the last layer's output.

    Raises:
        UnsupportedModelError: A dense memory does not write its values weighed by its coefficients,
            or the other inputs that `forward` gives change the logits.
    """
    full: Tensor = lm.module(input_ids=single.input_ids).logits
    downs: dict[Any, nn.Module] = {x.layer: x.down for x in lm.ffn if not x.n_experts}
    with recording(downs | {"last": lm.layers[-1]}) as calls:
        logits = lm.forward(single).logits
    for layer in downs:
        lm.ffn[layer].check_sum(calls[layer][0])
    if not same(logits, full):
        # Some models do not count positions from 0, and only they know.
        lm.accepts.discard("position_ids")
        with recording({"last": lm.layers[-1]}) as calls:
            logits = lm.forward(single).logits
        if not same(logits, full):
            raise UnsupportedModelError(
                f"{lm.name}: a mask without padding changes its output, so it is not understood"
            )
    return full, calls["last"][0].output


def _check_head(lm: LanguageModel, last: Tensor, full: Tensor) -> None:
    """Check that the head of the last layer's output gives the logits."""
    if not same(lm.head(last), full):
        raise UnsupportedModelError(
            f"{lm.name}: its head does more than turn the last layer's output into logits, so it "
            "is not understood"
        )


def _check_replays(lm: LanguageModel, batch: Batch) -> None:
    """Check that the layers, run again by themselves, give what they give in the model."""
    if not _replays(lm, batch):
        raise UnsupportedModelError(
            f"{lm.name}: its layers, run again by themselves, do not give what they give in the "
            "model, so they cannot be replayed"
        )


def _replays(lm: LanguageModel, batch: Batch, whole: Replay | None = None) -> bool:
    """Return whether replay from some changed layers equals the model's own pass.

    A causal model is replayed from the middle column on. One that reads from both sides is replayed
    whole, and its states at padding do not count. All layers are tried in one pass of each kind:
    there is a copy of the batch for each.

    Args:
        lm: The model.
        batch: The rows.
        whole: Their recorded pass. None: it is recorded now.
    """
    start = batch.width // 2 if lm.is_causal else 0
    whole = record(lm, batch) if whole is None else whole
    replay, n = whole.at(start), batch.size
    layers = sorted({min(1, lm.n_layers), lm.n_layers // 2, lm.n_layers - 1} - {0})
    hidden, rows = replay.hidden[0], torch.arange(n)
    changes: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    below = 0
    for copy, layer in enumerate(layers, start=1):
        changed = replay.hidden[layer] * 1.25
        state = torch.cat([whole.hidden[layer][:, :start], changed], dim=1)
        changes[lm.layers[layer - 1]] = _in_rows(slice(copy * n, (copy + 1) * n), state)
        hidden = torch.cat([replay.resume(below, hidden, rows, until=layer), changed])
        rows, below = torch.arange(n).repeat(copy + 1), layer
    resumed = replay.resume(below, hidden, rows)
    with replacing(changes):
        expected = lm.forward(batch.keep(rows)).logits[:, start:]
    mask = batch.attention_mask.bool().repeat(len(layers) + 1, 1)
    seen = (torch.ones_like(mask[:, start:]) if lm.is_causal else mask).to(resumed.device)
    first = seen.clone()
    first[n:] = False
    if not same(resumed[first], replay.hidden[-1][first[:n]]):
        return False
    logits = replay.logits(resumed)
    seen = seen.to(logits.device)
    return all(
        same(logits[one][seen[one]], expected[one][seen[one]])
        for one in (slice(copy * n, (copy + 1) * n) for copy in range(1, len(layers) + 1))
    )


def _in_rows(rows: slice, state: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a change for `replacing` that puts a state in place of what some rows have."""

    def change(output: Tensor) -> Tensor:
        output = output.clone()
        output[rows] = state.to(output.device)
        return output

    return change


def _other_ending(lm: LanguageModel, batch: Batch) -> Batch:
    """Return the batch with another last token."""
    ids = batch.input_ids.clone()
    ids[:, -1] = lm.plain_ids[0]
    return Batch(ids, batch.attention_mask, batch.position_ids, batch.pivot)


def _dry_batch(lm: LanguageModel, rows: Sequence[int]) -> Batch:
    """Return some of the dry rows, aligned at their last token."""
    every = _dry_rows(lm)
    return lm.align([every[row] for row in rows], [len(every[row]) - 1 for row in rows])


def _dry_rows(lm: LanguageModel) -> list[list[int]]:
    """Return two short rows of plain tokens, different in length."""
    return [lm.plain_ids[1:7], lm.plain_ids[3:7]]


def _plain_ids(lm: LanguageModel) -> list[int]:
    """Return ids of ordinary tokens, from a third of the vocabulary on.

    They are neither special nor padding.
    """
    size = lm.vocabulary
    text_config = lm.config.get_text_config(decoder=True)
    reserved = {
        pad_id(lm.tokenizer),
        getattr(text_config, "pad_token_id", None),
        *lm.tokenizer.all_special_ids,
    }
    plain = [i for i in range(size // 3, min(size, size // 3 + 64)) if i not in reserved]
    if len(plain) < _DRY_TOKENS:
        raise UnsupportedModelError(
            f"{lm.name}: a vocabulary of {size} tokens is too small for a dry run"
        )
    return plain
