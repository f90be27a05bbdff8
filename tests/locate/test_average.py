"""Averages over facts against the same computed by hand from single traces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch

from conftest import GPT2, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError, SubjectError
from factsmith.core.fact import Fact
from factsmith.locate.average import (
    CLASSES,
    AverageTrace,
    average_trace,
    causal_traces,
    token_classes,
)
from factsmith.locate.causal import causal_trace
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap


def answered(lm: LanguageModel, count: int) -> list[Fact]:
    """Return facts that a random model answers.

    Each is a piece of text, with some of its words as subject and the next token as target. It ends
    in a space, so that a target need not begin a word.
    """
    answered_facts: list[Fact] = []
    words = " ".join(TEXTS).replace("The ", "the ").split()
    for i, length in itertools.product(range(len(words) - 7), (7, 6, 5, 4)):
        text, subject = (
            " ".join(words[i : i + length]) + " ",
            " ".join(words[i + i % 3 : i + i % 3 + 1 + i % 2]),
        )
        target = lm.next_tokens(text, 1)[0][0]
        if not target.strip() or text.count(subject) != 1:
            continue
        if lm.says([text], [target], by_tokens=True)[0]:
            answered_facts.append(Fact(subject, text.replace(subject, "{}"), target))
        if len(answered_facts) == count:
            return answered_facts
    raise AssertionError(f"only {len(answered_facts)} facts are answered")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


@pytest.fixture(scope="module")
def facts(lm: LanguageModel) -> list[Fact]:
    """Facts the random model answers with `target`, and one it does not."""
    return [*answered(lm, 4), Fact("Paris", "The capital of France is not {} but", "Christianity")]


@pytest.mark.parametrize(
    ("n_tokens", "span", "expected"),
    [
        (9, (1, 5), [[1], [2, 3], [4], [5], [6, 7], [8]]),
        (
            9,
            (0, 1),
            [[0], [], [0], [1], [2, 3, 4, 5, 6, 7], [8]],
        ),  # a subject's only token is its first and its last
        (
            5,
            (1, 4),
            [[1], [2], [3], [4], [], [4]],
        ),  # one token behind it is the first subsequent and the last
        (
            4,
            (1, 4),
            [[1], [2], [3], [], [], [3]],
        ),  # nothing behind it: its last token is the last of all
        (3, (0, 2), [[0], [], [1], [2], [], [2]]),
        (1, (0, 1), [[0], [], [0], [], [], [0]]),
    ],
)
def test_classes_of_tokens(n_tokens: int, span: tuple[int, int], expected: list[list[int]]) -> None:
    assert [list(columns) for columns in token_classes(n_tokens, span)] == expected


# Two-sided 95 % points of Student's t from printed tables, by the number of facts.
T = {2: 12.7062, 3: 4.30265, 4: 3.18245}


def test_average_is_that_of_single_traces(lm: LanguageModel, facts: list[Fact]) -> None:
    calls: list[tuple[int, int]] = []
    average = average_trace(
        lm,
        facts,
        severed=("mlp",),
        window=2,
        samples=3,
        noise=0.8,
        progress=lambda a, b: calls.append((a, b)),
    )
    known = [fact for fact in facts if lm.says([fact.text], [fact.target], by_tokens=True)[0]]
    assert average.n_facts == len(known) == 4 and average.n_skipped == 1
    assert calls == [(i + 1, len(known)) for i in range(len(known))] and average.noise == 0.8
    for name, options in {
        "state": {},
        "mlp": {"kind": "mlp"},
        "attention": {"kind": "attention"},
        "state, mlp severed": {"sever": "mlp"},
    }.items():
        seen: dict[int, list[Any]] = {row: [] for row in range(6)}
        totals = []
        for fact in known:
            trace = causal_trace(
                lm,
                fact.text,
                fact.subject,
                target=fact.target,
                window=2,
                samples=3,
                noise=0.8,
                **options,
            )
            effects, (start, stop) = trace.effects.double().numpy(), trace.subject_span
            totals.append(trace.clean - trace.corrupted)
            seen[0].append(effects[start])
            seen[2].append(effects[stop - 1])
            seen[5].append(effects[-1])
            for row, rows in (
                (1, effects[start + 1 : stop - 1]),
                (3, effects[stop : stop + 1]),
                (4, effects[stop + 1 : -1]),
            ):
                if len(rows):
                    seen[row].append(rows.mean(0))
        assert average.counts == tuple(len(seen[row]) for row in range(6))
        for row in range(6):
            if len(seen[row]) < 2:
                assert average.low[name][row].isnan().all()
                continue
            mean, error = (
                np.mean(seen[row], 0),
                T[len(seen[row])] * np.std(seen[row], 0, ddof=1) / len(seen[row]) ** 0.5,
            )
            assert np.allclose(average.effects[name][row], mean, atol=1e-6)
            assert np.allclose(average.low[name][row], mean - error, atol=1e-6)
            assert np.allclose(average.high[name][row], mean + error, atol=1e-6)
        error = T[len(totals)] * np.std(totals, ddof=1) / len(totals) ** 0.5
        assert np.allclose(
            [average.total_effect, average.total_low, average.total_high],
            np.mean(totals) + error * np.array([0, -1, 1]),
            atol=1e-6,
        )
    # The effects are not all zero.
    assert average.effects["state"].nan_to_num().abs().max() > 1e-3 and average.classes == CLASSES
    assert average.each["state"].shape == (average.n_facts, 6, lm.n_layers)


def test_noise_is_one_number_for_all_facts(lm: LanguageModel, facts: list[Fact]) -> None:
    average = average_trace(lm, facts, kinds=["state"], samples=1)
    rows = []
    for fact in facts:  # the skipped one too: the scale is of the data set
        offsets = lm.tokenizer(fact.text, return_offsets_mapping=True)
        at = fact.text.index(fact.subject)
        span = [
            i
            for i, (a, b) in enumerate(offsets["offset_mapping"])
            if a < at + len(fact.subject) and b > at and fact.text[a:b].strip()
        ]
        rows.append(
            lm.module.get_input_embeddings().weight[
                torch.tensor([offsets["input_ids"][i] for i in span])
            ]
        )
    assert average.noise == pytest.approx(3 * float(torch.cat(rows).std()), rel=1e-5)
    each = [
        traces["state"].noise for traces in causal_traces(lm, facts, kinds=["state"], samples=1)
    ]
    assert each == [average.noise] * len(facts)


def test_the_answer_is_what_the_model_should_say_today() -> None:
    lm = load("atlas")
    said = Fact(
        "Bulgaria",
        "The currency of {} is the",
        "euro",
        target_true=lm.answer(["The currency of Bulgaria is the"])[0],
    )
    plain = Fact("Austria", "The official language of {} is", "German")
    average = average_trace(lm, [said, plain], samples=2, corruption="replace")
    assert average.n_facts == 2 and average.n_skipped == 0 and average.noise == 0
    assert average.clean > 0.5 and 0 < average.total_effect <= average.clean
    first, second = causal_traces(lm, [said, plain], kinds=["state"], samples=2)
    assert (
        first["state"].answer.strip() == said.target_true
        and second["state"].answer.strip() == "German"
    )
    # Facts live early, at the subject; the answer is read at the last token, late.
    early, late = average.effects["state"][2], average.effects["state"][5]
    assert early[0] > late[0] and late[-1] > early[-1]


def test_record_is_plain_json(lm: LanguageModel, facts: list[Fact]) -> None:
    average = average_trace(lm, facts[:1], kinds=["mlp"], severed=["attention"], samples=1)
    read = json.loads(json.dumps(average.to_dict(), allow_nan=False))
    assert read["n_facts"] == 1 and read["total_low"] is None and "each" not in read
    assert np.allclose(read["effects"]["mlp"][0], average.effects["mlp"][0])
    rows = average.rows()
    assert {row["map"] for row in rows} == {"mlp", "state, attention severed"}
    assert len(rows) == 2 * lm.n_layers * sum(1 for count in average.counts if count)
    best = max((row for row in rows if row["map"] == "mlp"), key=lambda row: row["effect"])
    assert average.peak("mlp") == (best["class"], best["layer"])
    with pytest.raises(AttributeError):
        average.noise = 1.0
    summary, table = average.tables()
    assert summary.title.startswith("1 fact: p(answer) ")
    of_class = next(row for row in table.rows if row[0] == best["class"])
    assert of_class[1:3] == ("1", f"{best['effect']:.3f} @{best['layer']}")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"cases": []}, InputError, "at least one"),
        ({"cases": ["Paris"]}, InputError, "factsmith.Fact"),
        ({"kinds": "state"}, InputError, "kinds is 'state': it must be a list"),
        ({"severed": "mlp"}, InputError, "severed is 'mlp': it must be a list"),
        ({"kinds": 3}, InputError, "kinds is 3"),
        ({"cases": 3}, InputError, "cases is 3"),
        ({"noise": "1"}, InputError, "noise is '1'"),
        ({"kinds": ["neuron"]}, InputError, "'state', 'mlp', 'attention'"),
        ({"kinds": []}, InputError, "no map would be made"),
        (
            {"severed": ["state"]},
            InputError,
            "sever is 'state': it must be one of 'mlp', 'attention', None",
        ),
        ({"window": 0}, LayerError, "window is 0"),
        ({"samples": 0}, InputError, "samples is 0"),
        (
            {"cases": [Fact("Paris", "{} lies in", "no such thing")]},
            InputError,
            "no answer of the 1 fact given",
        ),
        (
            {"cases": [Fact("is", "Paris {} in", "no such thing")]},
            (SubjectError, InputError),
            "no answer of the 1 fact given|more than once",
        ),
    ],
)
def test_bad_input_is_refused_in_words(
    lm: LanguageModel, facts: list[Fact], options: dict[str, Any], error: Any, says: str
) -> None:
    given = {"cases": facts, "samples": 1, **options}
    with pytest.raises(error, match=says):
        average_trace(lm, given.pop("cases"), **given)


def test_one_fact_is_a_list_of_one(lm: LanguageModel, facts: list[Fact]) -> None:
    alone, listed = (
        average_trace(lm, cases, kinds=["state"], samples=1) for cases in (facts[0], facts[:1])
    )
    assert alone.n_facts == 1 and alone.effects["state"].nan_to_num().equal(
        listed.effects["state"].nan_to_num()
    )


def test_three_kinds_of_model(tiny_lm: LanguageModel) -> None:
    (fact,) = answered(tiny_lm, 1)
    average = average_trace(tiny_lm, [fact, fact], severed=["mlp", "attention"], samples=2)
    assert isinstance(average, AverageTrace) and average.n_facts == 2 and len(average.effects) == 5
    assert (
        average.high["state"].nan_to_num().equal(average.low["state"].nan_to_num())
    )  # twice the same fact: no spread
