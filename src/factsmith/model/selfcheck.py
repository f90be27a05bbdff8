"""Find out how a model is built, and prove it: a dry run of a few tokens against the model's own full pass.

    discover(lm)        # fills in lm.layers, lm.ffn, lm.attention ..., or refuses the model in words

Nothing is believed because of a name. What is found is used at once, as the rest of factsmith uses it, and compared with the
plain forward pass: the values weighed by the coefficients, the head, layers run again from a changed state, padding, the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from .ffn import FeedForward
from .language_model import LanguageModel
from .prefix import PrefixCache
from .replay import record
from .running import Structure
from .structure import build, counterparts, find_feed_forward, find_layers
from .tokens import Batch, encode, pad_id
from .tolerance import same
from .trace import recording, replaced_by, replacing

_DRY_TOKENS = 9
"""Plain tokens that the dry run needs: two rows of different length, and one token that is in neither."""


def discover(lm: LanguageModel) -> None:
    """Find the model's structure in a dry run, give it to the model, and check it against the model's own pass.

    Raises TokenizerError when the tokenizer is empty or another model's, ModelError when a weight is not finite, NumericsError when
    the layers' outputs are not, UnsupportedModelError when the structure is not understood.
    """
    _check_tokenizer(lm)
    try:
        with torch.no_grad():
            lm.plain_ids = _plain_ids(lm)
            lm.adopt(_find_structure(lm))
            _check_sums(lm)
            (_check_causal if lm.is_causal else _check_masked)(lm)
    except FactsmithError:
        _check_finite(lm)
        raise
    except (
        Exception
    ) as error:  # models raise whatever they like when they are run in a way they do not foresee
        raise UnsupportedModelError(
            f"{lm.name}: its dry run ended in {type(error).__name__}: {first_line(error)}; it cannot be replayed as a text model"
        ) from error


def _check_tokenizer(lm: LanguageModel) -> None:
    """Raises TokenizerError when the tokenizer is empty (its files were missing) or belongs to a larger vocabulary."""
    text = "The name of the place is"
    ids, _ = encode(lm.tokenizer, text)
    words = [i for i in ids if i not in lm.tokenizer.all_special_ids]
    if len(words) < 2:
        raise TokenizerError(
            f"the tokenizer of {lm.name} makes {len(words)} tokens of {text!r}; is its tokenizer.json missing?"
        )
    if max(ids) >= _vocabulary(lm):
        raise TokenizerError(
            f"the tokenizer of {lm.name} has id {max(ids)}, the model only {_vocabulary(lm)}; is it another's?"
        )
    if not lm.is_causal and lm.tokenizer.mask_token_id is None:
        raise TokenizerError(
            f"the tokenizer of {lm.name} has no mask token; expected one, to ask a masked language model with"
        )


def _check_finite(lm: LanguageModel) -> None:
    """Raises ModelError when a weight is not finite: then nothing computed with it can be, and no other reason need be looked for."""
    for name, weight in lm.module.named_parameters():
        if wrong := int((~weight.isfinite()).sum()):
            raise ModelError(
                f"{lm.name}: {wrong} of the {weight.numel()} entries of {name} are not finite (NaN or infinite); copy or download "
                "the weights again, or undo what was done to them"
            ) from None


def _find_structure(lm: LanguageModel) -> Structure:
    single = _dry_batch(lm, [0])
    expected = getattr(lm.config.get_text_config(decoder=True), "num_hidden_layers", None)
    layers, slot, calls = find_layers(lm.module, expected, lambda: lm.forward(single))
    if broken := [
        index for index, call in enumerate(calls) if not bool(call.output.isfinite().all())
    ]:
        _check_finite(lm)
        raise NumericsError(
            f"{lm.name}: from layer {broken[0]} on its outputs are not finite, though its weights are: numbers too large for "
            f"{lm.dtype}; load it in a wider dtype"
        )
    parts: list[tuple[FeedForward, nn.Module | None]] = []
    first_of: dict[object, int] = {}
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        # Layers built alike are looked into once.
        first = first_of.setdefault(build(layer), index)
        if first == index:
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


def _check_sums(lm: LanguageModel) -> None:
    """Raises UnsupportedModelError unless each dense memory writes its values weighed by its coefficients."""
    with recording({ffn.layer: ffn.down for ffn in lm.ffn if not ffn.n_experts}) as written:
        lm.forward(_dry_batch(lm, [0]))
    for layer, (call, *_) in written.items():
        lm.ffn[layer].check_sum(call)


def _check_causal(lm: LanguageModel) -> None:
    """Prove that the model is causal and that replay gives what it gives; find out whether it caches and hides padding."""
    single = _dry_batch(lm, [0])
    full = _check_inputs(lm, single)
    if not same(lm.forward(_other_ending(lm, single)).logits[:, :-1], full[:, :-1]):
        raise UnsupportedModelError(
            f"{lm.name}: a change of the last token reaches earlier positions, so it is not a causal model"
        )
    _check_head(lm, single, full)
    try:
        cache = PrefixCache([None] * lm.n_layers)
        lm.forward(single, cache=cache)
        lm.caches_prefix = cache.kept is not None and all(
            k.shape[-2] == single.width for k, _ in cache.kept
        )
        lm.caches_prefix = lm.caches_prefix and _replays(lm, single)
    except Exception:  # states that are no keys and values (recurrent layers, indexers): replay goes without a cache
        lm.caches_prefix = False
    if not lm.caches_prefix:
        _check_replays(lm, single)
    both, alone = _dry_batch(lm, [0, 1]), _dry_batch(lm, [1])
    lm.hides_padding = same(lm.last_logits(both)[1], lm.last_logits(alone)[0]) and _replays(
        lm, both
    )


def _check_masked(lm: LanguageModel) -> None:
    """Prove that the model reads from both sides and that replay gives what it gives; find out whether it hides padding."""
    single = _dry_batch(lm, [0])
    full = _check_inputs(lm, single)
    if same(lm.forward(_other_ending(lm, single)).logits[:, :-1], full[:, :-1]):
        raise UnsupportedModelError(
            f"{lm.name}: a change of the last token does not reach earlier positions, so it is no masked language model; "
            "load it as a causal one"
        )
    _check_head(lm, single, full)
    _check_replays(lm, single)
    rows = _dry_rows(lm)
    both, alone = lm.align(rows, [0, 0]), lm.align(rows[1:], [0])
    padded = lm.forward(both).logits[1:, : alone.width]
    lm.hides_padding = same(padded, lm.forward(alone).logits) and _replays(lm, both)


def _check_inputs(lm: LanguageModel, single: Batch) -> Tensor:
    """The model's logits for one row without any of the inputs that `forward` adds; raises when these change them."""
    full: Tensor = lm.module(input_ids=single.input_ids).logits
    if not same(lm.forward(single).logits, full):
        # Some models count positions from elsewhere than 0, and know it only themselves.
        lm.accepts.discard("position_ids")
        if not same(lm.forward(single).logits, full):
            raise UnsupportedModelError(
                f"{lm.name}: a mask without any padding changes its output, so it is not understood"
            )
    return full


def _check_head(lm: LanguageModel, single: Batch, full: Tensor) -> None:
    if not same(lm.head(lm.last_hidden(single)), full):
        raise UnsupportedModelError(
            f"{lm.name}: its head does more than turn the last layer's output into logits"
        )


def _check_replays(lm: LanguageModel, batch: Batch) -> None:
    if not _replays(lm, batch):
        raise UnsupportedModelError(
            f"{lm.name}: its layers, run again by themselves, do not give what they give in the model"
        )


def _replays(lm: LanguageModel, batch: Batch) -> bool:
    """Whether replay from some changed layer equals the model's own pass with the same change.

    A causal model is replayed from the middle column on. One that reads from both sides is replayed whole; what it gives at padding
    is nobody's business.
    """
    start = batch.width // 2 if lm.is_causal else 0
    seen: Any = slice(None) if lm.is_causal else batch.attention_mask.bool()
    whole = record(lm, batch)
    replay = whole.at(start)
    for layer in sorted({min(1, lm.n_layers), lm.n_layers // 2, lm.n_layers - 1} - {0}):
        hidden = replay.hidden[layer] * 1.25
        changed = torch.cat([whole.hidden[layer][:, :start], hidden], dim=1)
        with replacing({lm.layers[layer - 1]: replaced_by(changed)}):
            expected = lm.forward(batch).logits[:, start:]
        if not same(replay.logits(replay.resume(layer, hidden))[seen], expected[seen]):
            return False
    return same(replay.resume(0, replay.hidden[0])[seen], replay.hidden[-1][seen])


def _other_ending(lm: LanguageModel, batch: Batch) -> Batch:
    """The batch with another last token."""
    ids = batch.input_ids.clone()
    ids[:, -1] = lm.plain_ids[0]
    return Batch(ids, batch.attention_mask, batch.position_ids, batch.pivot)


def _dry_batch(lm: LanguageModel, rows: Sequence[int]) -> Batch:
    """Some of the dry rows, aligned at their last token."""
    every = _dry_rows(lm)
    return lm.align([every[row] for row in rows], [len(every[row]) - 1 for row in rows])


def _dry_rows(lm: LanguageModel) -> list[list[int]]:
    """Two short rows of plain tokens, different in length."""
    return [lm.plain_ids[1:7], lm.plain_ids[3:7]]


def _plain_ids(lm: LanguageModel) -> list[int]:
    """Ids of ordinary tokens, from a third of the vocabulary on: neither special nor padding."""
    size = _vocabulary(lm)
    text_config = lm.config.get_text_config(decoder=True)
    reserved = {
        pad_id(lm.tokenizer),
        getattr(text_config, "pad_token_id", None),
        *lm.tokenizer.all_special_ids,
    }
    plain = [i for i in range(size // 3, min(size, size // 3 + 64)) if i not in reserved]
    if len(plain) < _DRY_TOKENS:
        raise UnsupportedModelError(
            f"{lm.name}: a vocabulary of {size} tokens is too small to check anything"
        )
    return plain


def _vocabulary(lm: LanguageModel) -> int:
    """How many tokens the model has embeddings for."""
    return next(p for p in lm.embedding.parameters() if p.dim() == 2).shape[0]
