"""The sets of knowledge neurons, coarse and refined, on scores written by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.locate import neurons
from factsmith.locate.neurons import KnowledgeNeurons, knowledge_neurons, refine, refine_relation
from factsmith.model.load import wrap

PROMPT = "The mother tongue of Danielle Darrieux is"


@lru_cache
def one_step() -> KnowledgeNeurons:
    """Return a record of a tiny model. The tests replace its scores and sets."""
    lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    return knowledge_neurons(lm, PROMPT, "is", steps=1)


def hand_made(
    scores: list[list[list[float]]], share: float = 0.7, threshold: float = 0.25
) -> KnowledgeNeurons:
    """Return a record of given scores, with sets as `knowledge_neurons` makes them."""
    values = torch.tensor(scores)
    n, n_layers, width = values.shape
    coarse = neurons._coarse(values, threshold, [0] * n_layers, [width] * n_layers)
    return replace(
        one_step(), scores=values, coarse=coarse, baseline_coarse=coarse, prompts=("",) * n
    ).with_share(share)


def test_coarse_and_refined_sets_by_hand() -> None:
    located = hand_made(
        [
            [[1.0, 0.25, 0.125], [0.0, 0.5, -3.0]],  # from 0.25 on
            [[0.125, 0.0625, 0.0], [0.0, 0.03125, 0.03]],  # from 0.03125 on
            [[0.0, 4.0, 0.0], [0.0, 1.0, 0.0]],  # from 1 on
            [[0.0, 0.0, 2.0], [0.0, 0.25, 0.0]],  # from 0.5 on
            [[-1.0, -2.0, -0.5], [-1.0, 0.0, -4.0]],  # nothing adds to the probability
        ]
    )
    assert located.coarse == (
        ((0, 0), (1, 1), (0, 1)),
        ((0, 0), (0, 1), (1, 1)),
        ((0, 1), (1, 1)),
        ((0, 2),),
        (),
    )
    assert located.with_share(0.6).refined == ((0, 1), (1, 1))  # in 3 of 5
    assert located.with_share(0.61).refined == ()  # in 4 of 5
    assert located.with_share(0.2).refined == ((0, 1), (1, 1))  # three prompts at least
    assert located.with_share(0.2, 0.9).baseline == ()
    assert refine(located.coarse[:2], 0.7) == ((0, 0), (0, 1), (1, 1))
    assert refine(located.coarse[:1], 0.7) == ((0, 0), (0, 1), (1, 1))  # one prompt: its coarse set
    ten = [((0, 0),)] * 7 + [((0, 1),)] * 3
    assert refine(ten, 0.7) == ((0, 0),)  # 0.7 * 10 is 7 and not a little more


def test_a_relation_is_refined_by_one_share() -> None:
    # Ten prompts; neuron (0, i) is in i of the coarse sets.
    sets = tuple(tuple((0, i) for i in range(1, 11) if prompt < i) for prompt in range(10))
    # At 0.7: 7, 8, 9, 10 are kept by both facts: 4 on average, within [2, 5].
    record = replace(one_step(), coarse=sets, baseline_coarse=sets).with_share(0.7)
    assert [len(r.refined) for r in refine_relation([record, record])] == [4, 4]
    assert refine_relation([record])[0].share == 0.7
    # At least 9 wanted: the share falls by six steps to 0.4 and no further, where 7 are kept.
    wider = refine_relation([record], low=9, high=10)
    assert wider[0].share == pytest.approx(0.4) and len(wider[0].refined) == 7
    # At most 2: 0.75 still keeps 8, 9, 10; 0.85 keeps 9 and 10.
    narrower = refine_relation([record], low=1, high=2)
    assert narrower[0].share == pytest.approx(0.85) and narrower[0].refined == ((0, 10), (0, 9))
    # The mean over the facts decides, not each fact.
    empty = replace(record, coarse=((),) * 10)
    mixed = refine_relation([record, empty])
    assert (
        mixed[0].share == pytest.approx(0.7)
        and len(mixed[0].refined) == 4
        and mixed[1].refined == ()
    )
    assert mixed[1].baseline == record.refined
    with pytest.raises(InputError, match="records is empty"):
        refine_relation([])


def test_a_tiny_attribution_is_not_shown_as_zero() -> None:
    located = hand_made([[[0.25, 5.4e-12, -3e-7, 0.0]]])
    assert [row[2] for row in located.tables(4)[0].rows] == [
        "0.2500",
        "5.4e-12",
        "0.0000",
        "-3.0e-07",
    ]
