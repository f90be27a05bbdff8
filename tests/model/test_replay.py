"""Replay against the plain full pass of the model, row by row, without padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from factsmith.core.errors import InputError, LayerError
from factsmith.model.language_model import LanguageModel
from factsmith.model.replay import record
from factsmith.model.tokens import Batch

ROWS = [[5, 90, 33, 61, 17, 200, 44], [70, 21, 150, 9], [8, 120, 77, 31, 66]]
PIVOTS = [4, 1, 3]


def plain_logits(
    lm: LanguageModel,
    ids: list[int],
    layer: int | None = None,
    change: Tensor | None = None,
    column: int = 0,
) -> Tensor:
    """One sequence through the plain model, (T, vocab), with `change` added to a layer's input."""

    def hook(
        module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> object:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[0, column:] += change
        return (
            ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        )

    handle = (
        lm.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
        if layer is not None
        else None
    )
    try:
        return lm.module(input_ids=torch.tensor([ids])).logits[0]
    finally:
        if handle is not None:
            handle.remove()


def aligned(lm: LanguageModel) -> Batch:
    return lm.align(ROWS, PIVOTS)


def own_columns(batch: Batch, row: int) -> Tensor:
    return batch.attention_mask[row].nonzero()[:, 0]


@pytest.mark.parametrize("start", [0, 2, 4])
def test_every_layer_of_an_aligned_batch_equals_each_row_alone(
    tiny_lm: LanguageModel, start: int
) -> None:
    batch = aligned(tiny_lm)
    replay = record(tiny_lm, batch, start=start)
    torch.manual_seed(1)
    for layer in range(tiny_lm.n_layers + 1):
        change = (
            torch.randn(len(ROWS), replay.n_live, tiny_lm.d_model)
            if layer < tiny_lm.n_layers
            else torch.zeros(1)
        )
        logits = replay.logits(replay.resume(layer, replay.hidden[layer] + change))
        for row, ids in enumerate(ROWS):
            columns = own_columns(batch, row)
            live = columns[columns >= start]
            first = int(live[0]) - int(columns[0])
            added = change[row, live - start] if layer < tiny_lm.n_layers else None
            expected = plain_logits(
                tiny_lm, ids, layer if added is not None else None, added, first
            )[first:]
            torch.testing.assert_close(logits[row, live - start], expected, atol=1e-5, rtol=1e-5)


def test_the_comparison_notices_a_wrong_layer(tiny_lm: LanguageModel) -> None:
    replay = record(tiny_lm, aligned(tiny_lm), start=2)
    right = replay.resume(1, replay.hidden[1])
    wrong = replay.resume(2, replay.hidden[1])
    assert (right - wrong).abs().max() > 1e-2


def test_rows_pick_prefixes_and_at_moves_the_start(tiny_lm: LanguageModel) -> None:
    replay = record(tiny_lm, aligned(tiny_lm))
    later = replay.at(1).at(4)
    rows = torch.tensor([2, 0, 2, 1])
    out = later.resume(1, later.hidden[1][rows], rows)
    torch.testing.assert_close(out, replay.hidden[-1][rows, 4:], atol=1e-5, rtol=1e-5)
    kept = later.keep(torch.tensor([2, 1]))
    torch.testing.assert_close(
        kept.resume(0, kept.hidden[0]), replay.hidden[-1][[2, 1], 4:], atol=1e-5, rtol=1e-5
    )
    swapped = later.resume(1, later.hidden[1][rows], torch.tensor([0, 2, 0, 1]))
    assert (swapped[:3] - replay.hidden[-1][rows[:3], 4:]).abs().max() > 1e-3


def test_gradients_equal_the_full_pass(tiny_lm: LanguageModel) -> None:
    replay = record(tiny_lm, tiny_lm.align(ROWS[:1], PIVOTS[:1]), start=4)
    delta = torch.zeros(tiny_lm.d_model, requires_grad=True)
    hidden = replay.hidden[1].clone()
    hidden[:, 0] += delta
    replayed = torch.autograd.grad(
        replay.logits(replay.resume(1, hidden)[0, -1]).log_softmax(-1)[7], delta
    )[0]
    full_delta = torch.zeros(tiny_lm.d_model, requires_grad=True)
    change = torch.cat([full_delta[None], torch.zeros(2, tiny_lm.d_model)])
    full = torch.autograd.grad(
        plain_logits(tiny_lm, ROWS[0], 1, change, 4)[-1].log_softmax(-1)[7], full_delta
    )[0]
    torch.testing.assert_close(replayed, full, atol=1e-5, rtol=1e-4)
    assert full.abs().max() > 1e-3


def test_corrupted_embeddings_reach_prefix_and_suffix(tiny_lm: LanguageModel) -> None:
    ids = ROWS[0]
    noise = torch.randn(2, 3, tiny_lm.d_model, generator=torch.Generator().manual_seed(3))

    def corrupt(embeddings: Tensor) -> Tensor:
        embeddings = embeddings.clone()
        embeddings[1:, 1:4] += noise
        return embeddings

    replay = record(tiny_lm, tiny_lm.align([ids] * 3, [2] * 3), start=2, embed=corrupt)
    logits = replay.logits(replay.resume(1, replay.hidden[1]))
    embeddings = corrupt(tiny_lm.embedding(torch.tensor([ids] * 3)))
    torch.testing.assert_close(
        logits, tiny_lm.module(inputs_embeds=embeddings).logits[:, 2:], atol=1e-5, rtol=1e-5
    )
    assert (logits[0] - logits[1]).abs().max() > 1e-2


# Two openings with several rows each, a row that begins another, two equal ones, and a row with
# nothing before its pivot.
SHARING = [
    [*range(10, 20), 40, 41, 42, 90, 91],
    [*range(10, 20), 40, 41, 43, 44, 45, 92],
    [*range(10, 20), 50, 93],
    [*range(10, 20), 50, 94],
    [*range(60, 68), 51, 95],
    [*range(60, 68), 52, 53, 96, 97],
    [10, 11, 12, 98],
    [99, 98],
]
SHARING_PIVOTS = [13, 15, 11, 11, 9, 11, 3, 0]


def test_what_rows_begin_with_in_common_is_run_once(tiny_lm: LanguageModel) -> None:
    batch = tiny_lm.align(SHARING, SHARING_PIVOTS)
    tokens: list[int] = []
    handle = tiny_lm.layers[0].register_forward_hook(
        lambda m, args, out: tokens.append(args[0].shape[0] * args[0].shape[1])
    )
    replay = record(tiny_lm, batch, start=batch.pivot)
    handle.remove()
    if tiny_lm.caches_prefix:
        distinct = {
            tuple(ids[: i + 1])
            for ids, pivot in zip(SHARING, SHARING_PIVOTS, strict=True)
            for i in range(pivot)
        }
        live = batch.size * replay.n_live
        assert sum(tokens) - live < 1.6 * len(distinct) < 0.7 * sum(SHARING_PIVOTS)
    torch.manual_seed(1)
    change = torch.randn(batch.size, replay.n_live, tiny_lm.d_model)
    for layer in range(tiny_lm.n_layers):
        logits = replay.logits(replay.resume(layer, replay.hidden[layer] + change))
        for row, (ids, pivot) in enumerate(zip(SHARING, SHARING_PIVOTS, strict=True)):
            live = len(ids) - pivot
            expected = plain_logits(tiny_lm, ids, layer, change[row, :live], pivot)[pivot:]
            torch.testing.assert_close(logits[row, :live], expected, atol=1e-5, rtol=1e-5)


def test_a_pass_may_be_recorded_as_far_as_it_is_needed(tiny_lm: LanguageModel) -> None:
    batch = aligned(tiny_lm)
    whole = record(tiny_lm, batch, start=4)
    part = record(tiny_lm, batch, start=4, until=1)
    change = torch.randn_like(whole.hidden[1])
    torch.testing.assert_close(part.hidden[1], whole.hidden[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        part.resume(1, part.hidden[1] + change),
        whole.resume(1, whole.hidden[1] + change),
        atol=1e-5,
        rtol=1e-5,
    )
    low = record(tiny_lm, batch, start=4, until=1, top=2)
    torch.testing.assert_close(low.layer(1, whole.hidden[1]), whole.hidden[2], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="recorded for 2 layers"):
        low.resume(1, low.hidden[1])
    if tiny_lm.caches_prefix:
        assert len(part.hidden) == 2
        with pytest.raises(InputError, match="up to layer 1 only"):
            part.at(5)
    with pytest.raises(LayerError):
        record(tiny_lm, batch, until=9)


def test_bad_input_is_refused(tiny_lm: LanguageModel) -> None:
    batch = aligned(tiny_lm)
    with pytest.raises(InputError, match="first live column"):
        record(tiny_lm, batch, start=batch.width)
    replay = record(tiny_lm, batch, start=3)
    with pytest.raises(InputError, match="expected 3 to"):
        replay.at(2)
    with pytest.raises(InputError, match="live columns"):
        replay.resume(0, torch.zeros(1, 2, tiny_lm.d_model))
    with pytest.raises(LayerError, match="layers 0 to 2"):
        replay.resume(7, replay.hidden[0])
    long = tiny_lm.align([[5] * 65], [0])
    with pytest.raises(InputError, match="65 tokens"):
        record(tiny_lm, long)
