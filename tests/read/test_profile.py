"""What triggers share, compared with counts by neuron, and on triggers with known answers."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from conftest import TEXTS, byte_tokenizer
from factsmith.core.errors import InputError
from factsmith.model.language_model import LanguageModel
from factsmith.read.profile import profile
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.triggers import BankTriggers, Sign, Trigger, Triggers

DRAW = random.Random(0)
WORDS = " ".join(TEXTS).split()
CORPUS = [" ".join(DRAW.sample(WORDS, 8)) for _ in range(120)]


@pytest.fixture(scope="module")
def triggers(tiny_gpt2: LanguageModel) -> Triggers:
    return find_triggers(tiny_gpt2, CORPUS, top=12)


@pytest.mark.parametrize("sign", ["top", "bottom"])
def test_purity_is_the_share_of_the_commonest(triggers: Triggers, sign: Sign) -> None:
    labels = {text: len(text) % 5 for text in CORPUS[:100]}
    result = profile(
        triggers, {"length": labels, "next": lambda trigger: trigger.next_token}, sign=sign, least=8
    )
    tokenizer = byte_tokenizer()
    assert result.features == (
        "token",
        "bigram",
        "trigram",
        "position",
        "length",
        "next",
    ) and result.layers == (0, 1, 2)
    for layer in result.layers:
        for i in range(0, 128, 5):
            of_neuron = triggers.of((layer, i), sign=sign)
            values = [
                [t.token for t in of_neuron],
                *(
                    [
                        tuple(tokenizer(t.text)["input_ids"][t.position + 1 - n : t.position + 1])
                        for t in of_neuron
                        if t.position >= n - 1
                    ]
                    for n in (2, 3)
                ),
                [t.position for t in of_neuron],
                [labels[t.text] for t in of_neuron if t.text in labels],
                [t.next_token for t in of_neuron if t.next_token is not None],
            ]
            for column, each in enumerate(values):
                purity = float(result.neurons[layer,][i, column])
                if len(each) < 8:
                    assert purity != purity
                else:
                    assert purity == pytest.approx(Counter(each).most_common(1)[0][1] / len(each))
    assert int(result.counted[0]) == int((~result.neurons[0,][:, 0].isnan()).sum())


def test_selective_neurons_are_those_above_the_needed_purity(triggers: Triggers) -> None:
    result = profile(triggers)
    for row, layer in enumerate(result.layers):
        for column, feature in enumerate(result.features):
            each = result.neurons[layer,][:, column]
            kept = result.selective(feature, layer)
            assert len(kept) == int((each >= result.needed[row, column]).sum())
            assert [float(each[i]) for _, i in kept] == sorted(
                (float(each[i]) for _, i in kept), reverse=True
            )
            assert float(result.share[row, column]) == pytest.approx(
                len(kept) / int((~each.isnan()).sum())
            )
            assert sum(result.tally(feature, layer).values()) == len(kept)
    assert float(result.share[0, 0]) > 0.2, "random keys over random embeddings know tokens"
    assert (result.purity[:, 0] > 1.5 * result.control[:, 0]).all()


def test_labels_that_say_nothing_select_no_neuron(triggers: Triggers) -> None:
    """The control must fail: random labels, and labels so common that every neuron has them."""
    draw = random.Random(3)
    nothing = {text: draw.randrange(4) for text in CORPUS}
    common = dict.fromkeys(CORPUS, "the same")
    result = profile(triggers, {"nothing": nothing, "common": common})
    column = result.features.index("nothing")
    assert float(result.share[:, column].max()) < 0.05 and torch.allclose(
        result.purity[:, column], result.control[:, column], atol=0.05
    )
    assert (
        result.share[:, column + 1].isnan().all()
        and result.selective("common", 0) == []
        and float(result.purity[:, column + 1].min()) == 1
    )
    assert float(result.chance.nan_to_num().max()) < 0.05


def test_bad_input_is_refused_in_words(triggers: Triggers) -> None:
    with pytest.raises(InputError, match="'kind'"):
        profile(triggers, {"kind": {"another text": 1}})
    with pytest.raises(InputError, match="least"):
        profile(triggers, least=0)
    with pytest.raises(InputError, match="no profile of 'kind'"):
        profile(triggers).selective("kind", 0)
    with pytest.raises(InputError, match="called 'token'"):
        profile(triggers, {"token": {}})
    with pytest.raises(InputError, match="label 'kind' is a list"):
        profile(triggers, {"kind": CORPUS})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="has no group"):
        profile(triggers, groups={})
    with pytest.raises(InputError, match="differ in their label 'kind'"):
        profile(
            triggers,
            {"kind": {text: n for n, text in enumerate(CORPUS)}},
            groups=dict.fromkeys(CORPUS, 0),
        )


def _top_only(each: Tensor) -> dict[Sign, Tensor]:
    return {"top": each, "bottom": torch.zeros_like(each)}


def made(
    rows: dict[tuple[int, ...], list[list[tuple[int, int]]]], texts: Sequence[str]
) -> Triggers:
    """Return triggers as given: {bank: for each neuron the (text, position) of its triggers}.

    The tokens are the words.
    """
    words = [[match.span() for match in re.finditer(r"\S+", text)] for text in texts]
    spelled = [text[a:b] for text, spans in zip(texts, words, strict=True) for a, b in spans]
    numbers = {word: n for n, word in enumerate(sorted(set(spelled)))}
    banks = {}
    for bank, neurons in rows.items():
        grid = torch.zeros(len(neurons), max(map(len, neurons)), 2, dtype=torch.int64)
        coefficients = torch.zeros(grid.shape[:2])
        for i, places in enumerate(neurons):
            grid[i, : len(places)] = torch.tensor(places).view(-1, 2)
            coefficients[i, : len(places)] = torch.arange(len(places), 0, -1)
        still = torch.zeros(len(neurons), dtype=torch.float64)
        banks[bank] = BankTriggers(
            coefficients=_top_only(coefficients),
            texts=_top_only(grid[..., 0]),
            positions=_top_only(grid[..., 1]),
            fired=still,
            mean_square=still,
        )
    return Triggers(
        banks=banks,  # type: ignore[arg-type]
        texts=texts,
        model="made",
        fingerprint="",
        corpus="",
        n_texts=len(texts),
        n_tokens=len(spelled),
        _ids=torch.tensor([numbers[word] for word in spelled]),
        _spans=torch.tensor([span for spans in words for span in spans]),
        _starts=torch.tensor(
            [0, *torch.tensor([len(spans) for spans in words]).cumsum(0).tolist()]
        ),
    )


NAMES, VERBS, PLACES = (
    ["Ann", "Bob", "Cid", "Dot"],
    ["met", "saw", "left", "knew", "took"],
    ["Rome", "Oslo", "Bonn", "Kyiv", "Lima", "Baku"],
)
SENTENCES = [f"{name} {verb} {place} ." for name in NAMES for verb in VERBS for place in PLACES]
LABELS = {
    "name": {text: text.split()[0] for text in SENTENCES},
    "verb": {text: text.split()[1] for text in SENTENCES},
}


def fires(
    want: str, n: int = 12, at: int = 3, others: int = 0, seed: int = 0
) -> list[tuple[int, int]]:
    """Return triggers at one position: the first in texts with a word, the last in others."""
    draw = random.Random(seed)
    inside = [i for i, text in enumerate(SENTENCES) if want in text.split()]
    outside = [i for i in range(len(SENTENCES)) if i not in inside]
    return [(i, at) for i in draw.sample(inside, n - others) + draw.sample(outside, others)]


def test_made_triggers_have_the_answers_they_were_made_with() -> None:
    """A few neurons of one bank know names, one of another bank a verb, the others nothing.

    The experts of one layer have one control.
    """
    idle = [
        [(i, 3) for i in random.Random(n).sample(range(len(SENTENCES)), 12)] for n in range(300)
    ]
    knows = [fires("Ann"), fires("Ann", others=3), fires("Bob"), fires("Bob", others=8)]
    triggers = made(
        {(0, 0): idle + knows, (0, 1): [*idle, fires("saw"), [(0, 3)] * 2], (1,): [[], *idle]},
        SENTENCES,
    )
    result = profile(triggers, LABELS)
    assert result.selective("name", 0)[:3] == [(0, 0, 300), (0, 0, 302), (0, 0, 301)]
    assert (0, 0, 303) not in result.selective("name", 0) and result.neurons[0, 0][
        301, result.features.index("name")
    ] == 0.75
    assert result.selective("verb", 0)[0] == (0, 1, 300) and result.tally("verb", 0)["saw"] >= 1
    assert result.tally("name", 0)["Ann"] >= 2 and set(result.tally("name", 0)) <= set(NAMES)
    assert result.neurons[0, 1][301].isnan().all() and result.neurons[1,][0].isnan().all()
    assert result.counted.tolist() == [300 + 4 + 300 + 1, 300]
    assert float(result.share[1, result.features.index("name")]) < 0.03
    # All fire at the full stop: one token, one position. What all share says nothing about any.
    assert (
        result.share[:, 0].isnan().all()
        and result.purity[:, 0].tolist() == [1, 1]
        and result.selective("position", 0) == []
    )
    assert torch.equal(
        profile(triggers, LABELS, seed=0).share.nan_to_num(9), result.share.nan_to_num(9)
    )
    assert profile(triggers, sign="bottom").counted.tolist() == [0, 0]


def test_labels_dealt_among_texts_select_no_neuron() -> None:
    """The control that must fail: the same neurons, and the labels of other texts."""
    neurons = [fires(NAMES[n % 4], others=n % 4, seed=n) for n in range(80)]
    shuffled = random.Random(1).sample(list(LABELS["name"].values()), len(SENTENCES))
    triggers = made({(0,): neurons}, SENTENCES)
    result = profile(
        triggers, {"name": LABELS["name"], "dealt": dict(zip(SENTENCES, shuffled, strict=True))}
    )
    assert len(result.selective("name", 0)) == 80 and len(result.selective("dealt", 0)) <= 4


def test_labels_of_triggers_are_asked_trigger_by_trigger() -> None:
    neurons = [fires("Ann", at=n % 4, seed=n) for n in range(40)]
    word = ["name", "verb", "place", "end"]
    asked: list[Trigger] = []

    def which(trigger: Trigger) -> str | None:
        asked.append(trigger)
        return word[trigger.position] if trigger.position < 3 else None

    result = profile(made({(2,): neurons}, SENTENCES), {"word": which})
    assert (
        result.tally("word", 2) == dict.fromkeys(("name", "verb", "place"), 10)
        and len(asked) == 40 * 12
    )
    assert {
        trigger.text[trigger.start : trigger.stop] for trigger in asked if trigger.position == 0
    } == {"Ann"}
    column = result.features.index("word")
    assert [bool(each.isnan()) for each in result.neurons[2,][:4, column]] == [
        False,
        False,
        False,
        True,
    ]
    assert result.possible[:4].isnan().all() and result.possible[column].isnan()


def test_only_leaves_triggers_out() -> None:
    """Neurons that fire on a name know the name in the name alone, and nothing after it."""
    triggers = made(
        {(0,): [fires("Ann", at=0, seed=n) + fires("Bob", at=2, seed=n) for n in range(4)]},
        SENTENCES,
    )
    result = profile(triggers, LABELS, only=lambda trigger: trigger.position == 2)
    column = result.features.index("name")
    assert result.neurons[0,][:, column].tolist() == [1.0] * 4
    assert profile(triggers, LABELS).neurons[0,][:, column].tolist() == [0.5] * 4
    assert profile(triggers, only=lambda trigger: trigger.position == 1).counted.tolist() == [0]


def test_groups_keep_one_fact_from_looking_like_knowledge() -> None:
    """Neurons fire on one fact, in all its sentences.

    With labels dealt out by trigger they seem to know its relation; dealt out by fact they do not.
    """
    facts = [(f"Name{n}", f"verb{n % 30}") for n in range(360)]
    texts = [f"{name} {verb} {place} ." for name, verb in facts for place in PLACES]
    draw = random.Random(2)
    one_fact = [
        [(6 * n + i, 3) for i in range(6)] + [(6 * draw.randrange(360), 3) for _ in range(6)]
        for n in range(200)
    ]
    knows = [[(6 * n + n % 6, 3) for n in range(verb, 360, 30)] for verb in range(3)]
    triggers, relation = (
        made({(0,): one_fact + knows}, texts),
        {text: text.split()[1] for text in texts},
    )
    by_trigger = profile(triggers, {"relation": relation})
    by_fact = profile(
        triggers, {"relation": relation}, groups={text: text.split()[0] for text in texts}
    )
    column = by_fact.features.index("relation")
    assert float(by_trigger.share[0, column]) > 0.95 and float(by_fact.share[0, column]) < 0.05
    assert by_fact.selective("relation", 0)[:3] == [(0, 200), (0, 201), (0, 202)]
    assert by_fact.tally("relation", 0)["verb2"] >= 1
    assert (
        torch.equal(by_fact.purity, by_trigger.purity) and float(by_fact.chance[0, column]) < 0.05
    )


def test_selective_for_one_but_not_for_others(triggers: Triggers) -> None:
    both = [
        [(i, 2) for i, text in enumerate(SENTENCES) if verb in text and name in text]
        for name, verb in zip(NAMES, VERBS, strict=False)
    ]
    result = profile(
        made({(1,): [fires(name, seed=1) for name in NAMES * 9] + both}, SENTENCES), LABELS, least=6
    )
    assert len(result.selective("name", 1)) == 40 and result.selective("verb", 1) == [
        (1, 36),
        (1, 37),
        (1, 38),
        (1, 39),
    ]
    assert result.selective("name", 1, without=["verb"]) == [(1, i) for i in range(36)]
    assert result.share_of("name", without=["verb"]).tolist() == [0.9] and result.share_of(
        "name"
    ).tolist() == [1]
    with pytest.raises(InputError, match="no profile of 'noun'"):
        result.selective("name", 1, without=["noun"])
    whole = profile(triggers)
    assert torch.allclose(whole.share_of("bigram").float(), whole.share[:, 1])


def test_what_is_possible_at_all() -> None:
    """Half of 12 triggers is 6: a value in 5 texts cannot fill them."""
    rare = {
        text: ("rare" if i < 5 else "common" if i < 20 else None)
        for i, text in enumerate(SENTENCES)
    }
    result = profile(made({(0,): [fires("Ann"), fires("Bob")]}, SENTENCES), {"kind": rare}, least=1)
    assert float(result.possible[-1]) == pytest.approx(15 / 20)
