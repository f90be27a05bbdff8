"""Layers: the race by hand-made tables, and what is measured is what plain questions give."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from factsmith import atlas
from factsmith.core.errors import InputError, LayerError, UnsupportedModelError
from factsmith.core.fact import Fact, Probe
from factsmith.corpus.moments import second_moments
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import applied
from factsmith.edit.methods import rome
from factsmith.edit.published import PublishedLayers
from factsmith.edit.rome import rome_each
from factsmith.locate.causal import causal_trace
from factsmith.model.answers import begins_with
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.patch.layer_choice import LayerChoice, LayerScore, Trial, published
from factsmith.patch.layer_choice import depth_choice as by_depth
from factsmith.patch.layer_trials import candidates, choose, mlp_effects, race, trace_window
from factsmith.patch.layers import recommend_layers
from factsmith.patch.trial_facts import judge, trial_facts

# ---- what is known without work -----------------------------------------------------------------


def test_what_came_with_the_model_goes_before_its_preset(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert published(tiny_gpt2) is None
    layers = PublishedLayers(8, (), "GPT-2 medium", "a file")
    monkeypatch.setattr("factsmith.patch.layer_choice.published_layers", lambda lm: layers)
    preset, shipped = published(tiny_gpt2), published(tiny_gpt2, 2)
    assert (
        preset is not None
        and (preset.source, preset.rome, preset.memit) == ("preset", 8, ())
        and "GPT-2 medium" in preset.reason
    )
    assert shipped is not None and (shipped.source, shipped.rome, shipped.fingerprint) == (
        "model",
        2,
        tiny_gpt2.fingerprint,
    )
    with pytest.raises(LayerError, match="layer 3"):
        published(tiny_gpt2, 3)


# ---- the choice ------------------------------------------------------------------------------------------------------------------------


def table(scores: dict[int, float], n: int = 4) -> dict[int, list[Trial]]:
    """Trials whose harmonic mean is the given score, the same for every edit."""
    return {layer: [(score, score, score)] * n for layer, score in scores.items()}


FLAT = [0.0] * 12


@pytest.mark.parametrize(
    ("scores", "effects", "expected"),
    [
        ({0: 0.5, 1: 0.9, 2: 0.7}, FLAT, (1, (1,))),
        (
            {0: 0.5, 1: 0.9, 2: 0.7},
            [9.0, 0.0, 8.0],
            (1, (1,)),
        ),  # effects do not outweigh what is measured
        ({0: 0.9, 1: 0.9, 2: 0.9}, FLAT, (0, (0, 1, 2))),  # a tie: the earliest
        (
            {0: 0.9, 1: 0.9, 2: 0.9},
            [0.0, 0.1, 0.2],
            (2, (0, 1, 2)),
        ),  # a tie: where the MLPs matter most
        (
            {3: 0.8, 4: 0.97, 5: 1.0, 6: 0.96, 7: 0.96, 8: 0.8},
            FLAT,
            (5, (4, 5, 6, 7)),
        ),  # a plateau has edges
        (
            {layer: 1.0 - 0.001 * abs(layer - 6) for layer in range(12)},
            FLAT,
            (6, (4, 5, 6, 7, 8)),
        ),  # five at most
        ({4: 1.0, 5: 0.5, 6: 1.0}, FLAT, (4, (4,))),  # a gap ends the run
        ({2: 0.7}, FLAT, (2, (2,))),
        ({0: 0.0, 1: 0.0}, [0.1, 0.2], (1, (1,))),  # nothing holds anywhere
    ],
)
def test_choice_from_tables(
    scores: dict[int, float], effects: Sequence[float], expected: tuple[int, tuple[int, ...]]
) -> None:
    assert choose(table(scores), effects) == expected


def test_what_the_trials_cannot_tell_apart_is_decided_by_the_trace() -> None:
    sure, missed, partly = (1.0, 1.0, 1.0), (0.0, 0.8, 1.0), (1.0, 0.6, 1.0)
    held, once, often = [sure] * 24, [partly] * 3 + [sure] * 21, [partly] * 12 + [sure] * 12
    assert choose({0: once, 1: held}, [1.0, 0.0])[0] == 0, (
        "three slips of twenty-four may be chance"
    )
    assert choose({0: once, 1: held}, [0.0, 1.0])[0] == 1
    assert choose({0: often, 1: held}, [1.0, 0.0])[0] == 1, "twelve are not"
    # In pairs: behind a little, but on every edit alike, is behind; the same means with their edits shuffled are not.
    low = [(1.0, 1.0, 0.5 + 0.1 * (i % 5)) for i in range(16)]
    high = [(a, b, min(1.0, c + 0.03)) for a, b, c in low]
    assert choose({0: low, 1: high}, [1.0, 0.0])[0] == 1
    assert choose({0: low, 1: high[1:] + high[:1]}, [1.0, 0.0])[0] == 0
    # However far from certain, more than three points are not given away.
    assert choose({0: [missed] * 2 + [sure] * 14, 1: [sure] * 16}, [1.0, 0.0])[0] == 1


def test_a_layer_that_left_the_race_is_not_chosen() -> None:
    trials = {**table({0: 0.9, 1: 0.8}, 8), **table({2: 1.0}, 2)}  # two lucky edits
    assert choose(trials, FLAT) == (0, (0,))
    assert choose({**table({0: 0.9}, 8), **table({1: 0.9}, 2)}, FLAT) == (0, (0, 1)), (
        "but it can belong to MEMIT's run"
    )


class Tries:
    """What a race asks for, answered from each layer's list of efficacies; the last figure of a trial tells the edits apart."""

    def __init__(self, quality: dict[int, list[float]]) -> None:
        self.quality = quality
        self.asked: list[tuple[list[int], range]] = []

    def __call__(self, layers: Sequence[int], which: range) -> dict[int, list[Trial]]:
        self.asked.append((list(layers), which))
        return {
            layer: [(self.quality[layer][i], None, 1 - i / 1000) for i in which] for layer in layers
        }


def test_the_race_spends_its_edits_on_the_better_layers() -> None:
    # Layer 0 is behind at once, layer 3 from the seventh edit on.
    tries = Tries({0: [0.2] * 24, 1: [0.9] * 24, 2: [0.9] * 24, 3: [0.9] * 6 + [0.1] * 18})
    trials = race(range(4), 24, tries)
    assert tries.asked == [
        ([0, 1, 2, 3], range(6)),
        ([1, 2, 3], range(6, 12)),
        ([1, 2], range(12, 24)),
    ]
    assert {layer: len(some) for layer, some in trials.items()} == {0: 6, 1: 24, 2: 24, 3: 12}
    assert [t[2] for t in trials[1]] == [1 - i / 1000 for i in range(24)], (
        "in the order of the edits, none twice"
    )
    assert race([5], 1, lambda layers, which: {5: [(1.0, None, None)] * len(which)}) == {
        5: [(1.0, None, None)]
    }


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6])
def test_no_layer_leaves_a_race_of_few_edits(count: int) -> None:
    """Not even after the first edit failed and one edit is all that a quarter of them is."""
    worst = Tries({0: [0.0] * count, 1: [1.0] * count})
    assert {layer: len(some) for layer, some in race([0, 1], count, worst).items()} == {
        0: count,
        1: count,
    }
    unlucky = Tries({0: [0.0] + [1.0] * (count - 1), 1: [1.0] + [0.0] * (count - 1)})
    trials = race([0, 1], count, unlucky)
    assert choose(trials, FLAT)[0] == (1 if count == 1 else 0)


@pytest.mark.parametrize("count", [8, 16, 24])
@pytest.mark.parametrize("lucky", [2, 4, 6])
def test_a_few_lucky_edits_do_not_end_the_race(count: int, lucky: int) -> None:
    """A layer that is nearly always right, and one that is right at first and then never: equal outcomes of a few are no certainty."""
    tries = Tries({0: [0.93] * count, 1: [1.0] * lucky + [0.0] * (count - lucky)})
    trials = race([0, 1], count, tries)
    assert len(trials[0]) == count
    assert choose(trials, [0.0, 1.0])[0] == 0
    # A control: one that fails from the start does leave, where there are edits to save.
    left = race([0, 1], count, Tries({0: [0.93] * count, 1: [0.0] * count}))
    assert len(left[1]) == min(count, 6) and len(left[0]) == count


def test_a_layer_that_left_comes_back_when_the_best_falls_behind_it() -> None:
    lucky = [1.0] * 12 + [0.0] * 12
    steady = [0.5] * 24
    tries = Tries({0: steady, 1: lucky, 2: [0.1] * 24})
    trials = race([0, 1, 2], 24, tries)
    assert tries.asked == [
        ([0, 1, 2], range(6)),
        ([1], range(6, 12)),
        ([1], range(12, 24)),
        ([0], range(6, 24)),  # 1 has fallen to 0.5, where 0 may be too; 2 is still behind
    ]
    assert {layer: len(some) for layer, some in trials.items()} == {0: 24, 1: 24, 2: 6}
    assert [t[2] for t in trials[0]] == [1 - i / 1000 for i in range(24)], (
        "in the order of the edits, none twice"
    )
    # A control: when the best stays the best, nobody comes back.
    tries = Tries({0: steady, 1: [1.0] * 24, 2: [0.1] * 24})
    race([0, 1, 2], 24, tries)
    assert [layers for layers, _ in tries.asked] == [[0, 1, 2], [1], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_trials_the_race_ends_with_its_best_measured_in_full(seed: int) -> None:
    """No layer that left has a better score than the choice unless what it tried is within its error of it; the cost is bounded."""
    draw = random.Random(seed)
    rates = {layer: draw.random() for layer in range(6)}
    tries = Tries(
        {layer: [float(draw.random() < rate) for _ in range(24)] for layer, rate in rates.items()}
    )
    trials = race(range(6), 24, tries)
    assert (
        sum(len(layers) * len(which) for layers, which in tries.asked)
        == sum(map(len, trials.values()))
        <= 6 * 24
    )
    chosen = choose(trials, FLAT)[0]
    assert len(trials[chosen]) == 24
    score = {layer: LayerScore.of(layer, some).score for layer, some in trials.items()}
    best = max(score[layer] for layer, some in trials.items() if len(some) == 24)
    assert all(score[layer] < best for layer, some in trials.items() if len(some) < 24)


def test_scores_are_harmonic_means_of_what_could_be_asked() -> None:
    score = LayerScore.of(3, [(1.0, 0.5, None), (0.0, 1.0, 0.8)])
    assert (score.layer, score.trials, score.efficacy, score.generalization, score.specificity) == (
        3,
        2,
        0.5,
        0.75,
        0.8,
    )
    assert score.score == pytest.approx(3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.8))
    alone = LayerScore.of(0, [(1.0, None, None)])
    assert (alone.generalization, alone.specificity, alone.score) == (None, None, 1.0)
    assert LayerScore.of(0, [(1.0, 0.0, 1.0)]).score == 0.0


def test_candidates_are_bounded_and_dense(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert candidates(tiny_gpt2, [0.0, 9.0, 0.0]) == [0, 1, 2]

    class Ffn:
        def __init__(self, n_experts: int) -> None:
            self.n_experts = n_experts

    class Deep:
        name, n_layers = "deep", 40
        ffn = tuple(Ffn(8 if layer == 20 else 0) for layer in range(40))

    effects = [1 / (1 + abs(layer - 16.6)) for layer in range(40)]
    assert candidates(Deep(), effects) == [11, 12, 13, 14, 15, 16, 17, 18, 19, 21, 22]  # type: ignore[arg-type]
    Deep.ffn = (Ffn(8),) * 40
    with pytest.raises(UnsupportedModelError, match="experts"):
        candidates(Deep(), effects)  # type: ignore[arg-type]


def test_windows_stay_small_beside_the_depth() -> None:
    assert [trace_window(n) for n in (1, 3, 6, 12, 24, 28, 32, 48, 80)] == [
        1,
        1,
        1,
        2,
        5,
        6,
        6,
        10,
        10,
    ]


@pytest.mark.parametrize("n_layers", [1, 2, 3, 6, 12, 28, 32, 48])
def test_without_knowledge_the_depth_decides(n_layers: int) -> None:
    class Model:
        fingerprint = "00"

    Model.n_layers = n_layers  # type: ignore[attr-defined]
    found = by_depth(Model(), n_layers // 6, "it knows nothing")  # type: ignore[arg-type]
    assert found.source == "depth" and "it knows nothing" in found.reason
    assert found.rome in found.memit and max(found.memit) < n_layers and len(found.memit) <= 5
    if n_layers == 32:
        assert found.memit == (4, 5, 6, 7, 8)


# ---- the record ------------------------------------------------------------------------------------------------------------------------

FACT = Fact(
    "Edwin", "{} is a", "king", paraphrases=("{} was a",), neighbours=(Probe("Paris is", "x"),)
)
CHOICE = LayerChoice(
    rome=1, memit=(0, 1), source="trials", reason="because", fingerprint="ab", effects=(0.5, 0.25), window=1, facts=(FACT,), seed=3,
    scores=(LayerScore(layer=1, trials=4, efficacy=1.0, generalization=None, specificity=0.5),),
)  # fmt: skip


def test_a_choice_there_and_back() -> None:
    written = json.loads(json.dumps(CHOICE.to_dict()))
    assert LayerChoice.from_dict(written) == CHOICE and CHOICE.trials == 4
    assert written["scores"][0]["score"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "change",
    [
        {"rome": -1},
        {"rome": True},
        {"memit": [0, 2]},
        {"memit": [1, 0]},
        {"memit": "01"},
        {"source": "a dream"},
        {"scores": [{"layer": 1}]},
        {
            "scores": [
                {
                    "layer": 1,
                    "trials": 4,
                    "efficacy": "all",
                    "generalization": None,
                    "specificity": None,
                }
            ]
        },
        {"scores": None},
        {"effects": ["x"]},
        {"facts": [{"subject": "x"}]},
        {"more": 1},
    ],
)
def test_what_is_no_choice_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        LayerChoice.from_dict({**CHOICE.to_dict(), **change})
    fields = CHOICE.to_dict()
    del fields["reason"]
    with pytest.raises(InputError):
        LayerChoice.from_dict(fields)


# ---- measured --------------------------------------------------------------------------------------------------------------------------

TRIALS = [
    Fact(
        "Edwin", "{} is", "Paris", paraphrases=("{} was",), neighbours=("Paris is the capital of",)
    ),
    Fact(
        "Edwin",
        "{} of Northumbria is a",
        "the",
        paraphrases=("{} was a",),
        neighbours=("LeBron James plays",),
    ),
]
CONTEXTS = ["{}", "Well. {}"]
TEXTS = [
    f"{a} of {b} is {c}. {c}, not {b}."
    for a in ("Paris", "The king")
    for b in ("Brazil", "Zürich 12")
    for c in "abcdefghijkl"
]


def test_a_random_model_knows_no_facts_and_is_asked_once(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = tiny_lm.says
    monkeypatch.setattr(
        tiny_lm,
        "says",
        lambda prompts, targets: asked.append(len(prompts)) or plain(prompts, targets),
    )
    assert trial_facts(tiny_lm, 8) == []
    assert len(asked) == 1 and 200 < asked[0] <= 256


def test_the_whole_way_agrees_with_edits_one_by_one(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every score against rome() for one fact and answers decoded token by token; the effects against whole traces."""
    monkeypatch.setattr(
        tiny_lm.config,
        "factsmith",
        {"rome": {"scale": "auto", "steps": 40, "clamp": 20.0}},
        raising=False,
    )
    before = tiny_lm.fingerprint
    seen: list[str] = []
    found = recommend_layers(
        tiny_lm,
        TRIALS,
        texts=TEXTS,
        contexts=CONTEXTS,
        progress=lambda what, done, total: seen.append(what),
    )
    assert tiny_lm.fingerprint == before and found.fingerprint == before
    assert [score.layer for score in found.scores] == [0, 1, 2] and all(
        score.trials == 2 for score in found.scores
    )
    moments = second_moments(tiny_lm, TEXTS, [0, 1, 2])
    held: list[bool] = []
    for score in found.scores:
        config = RomeConfig(layer=score.layer, scale="auto", steps=40, clamp=20.0)
        efficacy, generalization = [], []
        for fact in TRIALS:
            with applied(tiny_lm, rome(tiny_lm, fact, config, moments=moments, contexts=CONTEXTS)):
                efficacy.append(begins_with(tiny_lm.answer([fact.text])[0], fact.target))
                generalization.append(
                    begins_with(tiny_lm.answer([fact.paraphrase_texts[0]])[0], fact.target)
                )
        assert (score.efficacy, score.generalization) == (
            statistics.fmean(efficacy),
            statistics.fmean(generalization),
        )
        held += efficacy
    assert 0 < sum(held) < len(held), "a control: some edits hold and some do not"
    traces = [causal_trace(tiny_lm, f.text, f.subject, kind="mlp", window=1) for f in TRIALS]
    expected = torch.stack([t.effects[t.subject_span[1] - 1] for t in traces]).mean(0)
    assert torch.allclose(torch.tensor(found.effects), expected, atol=1e-5)
    assert (
        list(dict.fromkeys(seen))[:2] == ["tracing", "second moments"]
        and "trial edits at layer 2" in seen
    )
    json.dumps(found.to_dict())


def test_facts_that_are_said_already_are_no_trials(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tiny_gpt2,
        "answer",
        lambda prompts: ["Paris, of course" if p == "Edwin is" else "nothing" for p in prompts],
    )
    found = recommend_layers(tiny_gpt2, TRIALS, texts=TEXTS, contexts=["{}"])
    assert [fact.text for fact in found.facts] == [TRIALS[1].text]
    with pytest.raises(InputError, match="already"):
        recommend_layers(tiny_gpt2, TRIALS[:1], texts=TEXTS, contexts=["{}"])


def test_when_no_trial_edit_holds_it_is_said(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tiny_gpt2.config, "factsmith", {"rome": {"steps": 1, "layer": 2}}, raising=False
    )
    found = recommend_layers(tiny_gpt2, TRIALS, texts=TEXTS, contexts=["{}"])
    assert (found.source, found.rome) == ("depth", 2) and "none of 2 trial edits" in found.reason
    assert [score.score for score in found.scores] == [0, 0, 0]


@pytest.mark.parametrize("trials", [0, -1])
def test_no_trials_is_no_recommendation(tiny_gpt2: LanguageModel, trials: int) -> None:
    with pytest.raises(InputError, match="trials"):
        recommend_layers(tiny_gpt2, trials=trials)
    with pytest.raises(InputError, match="at least one"):
        recommend_layers(tiny_gpt2, [])


bundled = pytest.mark.skipif("atlas" not in atlas.names(), reason="the bundled model is not built")


@bundled
def test_trial_facts_of_the_atlas_are_known_and_their_edits_are_judged_as_plain_answers_are() -> (
    None
):
    lm = load("atlas")
    facts = trial_facts(lm, 3, seed=5)
    assert facts == trial_facts(lm, 3, seed=5) != trial_facts(lm, 3, seed=6)
    table = {(f.subject, f.relation): f.object for f in atlas.facts()}
    for fact in facts:
        assert fact.target_true == table[fact.subject, fact.relation or ""] != fact.target
        assert 1 <= len(fact.paraphrases) <= 5 and 1 <= len(fact.neighbours) <= 13
        asked = [fact.text, *fact.paraphrase_texts]
        assert all(
            begins_with(answer, fact.target_true or "")
            for answer in lm.answer(asked, max_new_tokens=12)
        )
        near = [probe.prompt for probe in fact.neighbours]
        answers = lm.answer(near, max_new_tokens=12)
        assert all(
            begins_with(answer, probe.expected or "")
            for answer, probe in zip(answers, fact.neighbours, strict=True)
        )
        assert judge(lm, fact)[:2] == (0.0, 0.0) and judge(lm, fact)[2] == 1.0, "unedited"
    assert mlp_effects(lm, facts, samples=3)[0] > 0.02
    moments = second_moments(lm, [f"{fact.text} {fact.target_true}." for fact in facts] * 8, [0, 5])
    (early,) = rome_each(
        lm, facts[:1], RomeConfig(layer=0, scale="auto", steps=40), moments=moments, contexts=["{}"]
    )
    (late,) = rome_each(
        lm, facts[:1], RomeConfig(layer=5, scale="auto", steps=3), moments=moments, contexts=["{}"]
    )
    with applied(lm, early):
        assert judge(lm, facts[0])[0] == 1.0
    with applied(lm, late):
        assert judge(lm, facts[0])[0] == 0.0, "control: the last layer cannot"
