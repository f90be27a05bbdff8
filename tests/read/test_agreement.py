"""Key-value agreement, counted neuron by neuron."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import TEXTS
from factsmith.core.errors import InputError
from factsmith.model.language_model import LanguageModel
from factsmith.read.agreement import agreement
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.triggers import SIGNS, Sign
from factsmith.read.values import value_tokens

CORPUS = [" ".join(text.split()[n:]) for n in range(9) for text in TEXTS]


@pytest.mark.parametrize("sign", SIGNS)
def test_agreement_is_the_share_of_neurons_whose_value_has_the_next_token(
    tiny_gpt2: LanguageModel, sign: Sign
) -> None:
    triggers, values = (
        find_triggers(tiny_gpt2, CORPUS, [0, 2], top=3),
        value_tokens(tiny_gpt2, [0, 1, 2], top=20),
    )
    result = agreement(triggers, values, sign=sign)
    assert result.layers == (0, 2)
    promoted = values.top_ids if sign == "top" else values.bottom_ids
    for row, layer in enumerate(result.layers):
        strongest = [triggers.of((layer, i), sign=sign, k=1) for i in range(128)]
        pairs = [
            (trigger.next_token, tokens)
            for of_neuron, tokens in zip(strongest, promoted[layer,].tolist(), strict=True)
            for trigger in of_neuron
            if trigger.next_token is not None
        ]
        n = len(pairs)
        assert int(result.counted[row]) == n > 50
        assert float(result.share[row]) == pytest.approx(
            sum(f == tokens[0] for f, tokens in pairs) / n
        )
        assert (
            float(result.within[row]) == pytest.approx(sum(f in tokens for f, tokens in pairs) / n)
            and float(result.within[row]) > 0
        )
        assert float(result.chance[row]) == pytest.approx(
            sum(f == tokens[0] for f, _ in pairs for _, tokens in pairs) / n**2
        )


def test_values_made_of_the_next_tokens_agree(tiny_gpt2: LanguageModel) -> None:
    triggers, values = (
        find_triggers(tiny_gpt2, CORPUS, [1], top=1),
        value_tokens(tiny_gpt2, [1], top=5),
    )
    following = triggers.next_tokens((1,))
    knowing = dataclasses.replace(
        values, top_ids={(1,): torch.where(following >= 0, following, 0).expand(-1, 5)}
    )
    result = agreement(triggers, knowing)
    assert float(result.share) == 1 and float(result.chance) < 0.5
    assert float(agreement(triggers, values).share) < 0.5


def test_without_a_layer_in_common(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(InputError, match="no layer in common"):
        agreement(find_triggers(tiny_gpt2, TEXTS, [0], top=1), value_tokens(tiny_gpt2, [1], top=1))
