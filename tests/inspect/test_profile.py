"""What triggers share, against counting one neuron at a time."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from conftest import TEXTS, byte_tokenizer
from factsmith.errors import InputError
from factsmith.inspect.profile import profile
from factsmith.inspect.triggers import Triggers, find_triggers
from factsmith.model.load import LanguageModel

DRAW = random.Random(0)
WORDS = " ".join(TEXTS).split()
CORPUS = [" ".join(DRAW.sample(WORDS, 8)) for _ in range(120)]


@pytest.fixture(scope="module")
def triggers(tiny_gpt2: LanguageModel) -> Triggers:
    return find_triggers(tiny_gpt2, CORPUS, top=12)


def test_purity_is_the_share_of_the_commonest(triggers: Triggers) -> None:
    labels = {text: len(text) % 5 for text in CORPUS[:100]}
    found = profile(triggers, {"length": labels}, least=8)
    tokenizer = byte_tokenizer()
    assert found.features == ("token", "bigram", "position", "length") and found.layers == (0, 1, 2)
    for layer in found.layers:
        for i in range(0, 128, 5):
            own = triggers.of((layer, i))
            values = [
                [t.token for t in own],
                [(tokenizer(t.text)["input_ids"][t.position - 1], t.token) for t in own if t.position],
                [t.position for t in own],
                [labels[t.text] for t in own if t.text in labels],
            ]
            for column, each in enumerate(values):
                purity = float(found.neurons[layer,][i, column])
                if len(each) < 8:
                    assert purity != purity
                else:
                    assert purity == pytest.approx(Counter(each).most_common(1)[0][1] / len(each))
    assert int(found.counted[0]) == int((~found.neurons[0,][:, 0].isnan()).sum())


def test_who_is_selective(triggers: Triggers) -> None:
    found = profile(triggers)
    for row, layer in enumerate(found.layers):
        for column, feature in enumerate(found.features):
            each = found.neurons[layer,][:, column]
            kept = found.selective(feature, layer)
            assert len(kept) == int((each >= found.needed[row, column]).sum())
            assert [float(each[i]) for _, i in kept] == sorted((float(each[i]) for _, i in kept), reverse=True)
            assert float(found.share[row, column]) == pytest.approx(len(kept) / int((~each.isnan()).sum()))
    assert float(found.share[0, 0]) > 0.2, "random keys over random embeddings know tokens"
    assert (found.purity[:, 0] > 1.5 * found.control[:, 0]).all()


def test_labels_that_say_nothing_select_nobody(triggers: Triggers) -> None:
    """The control must fail: labels dealt out at random, and labels so common that every neuron has them."""
    draw = random.Random(3)
    nothing = {text: draw.randrange(4) for text in CORPUS}
    common = dict.fromkeys(CORPUS, "the same")
    found = profile(triggers, {"nothing": nothing, "common": common})
    assert float(found.share[:, 3].max()) < 0.05 and torch.allclose(found.purity[:, 3], found.control[:, 3], atol=0.05)
    assert float(found.share[:, 4].max()) == 0 and float(found.purity[:, 4].min()) == 1


def test_bad_input_is_refused_in_words(triggers: Triggers) -> None:
    with pytest.raises(InputError, match="'kind'"):
        profile(triggers, {"kind": {"another text": 1}})
    with pytest.raises(InputError, match="least"):
        profile(triggers, least=0)
    with pytest.raises(InputError, match="no profile of 'kind'"):
        profile(triggers).selective("kind", 0)
