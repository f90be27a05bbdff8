"""A proof of a model that says known sentences: what stays, what changes, what is not asked."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from factsmith.core.fact import Fact, Probe
from factsmith.core.tables import Table
from factsmith.patch.bench import Scratch
from factsmith.patch.plan import plan
from factsmith.patch.proof import ask, prove
from factsmith.patch.verification import Check, Verification
from reciting import SENTENCES, change, reciter

NEAR = [prompt for prompt in SENTENCES if prompt != "Money of Bulgaria:"]
MONEY = Fact("Bulgaria", "Money of {}:", "leva", neighbours=tuple(NEAR))


def near(proof: Verification) -> dict[str, Check]:
    return {check.prompt: check for check in proof.checks if check.role == "neighbour"}


def test_nothing_changed_is_nothing_changed() -> None:
    proof = prove(reciter(), [MONEY], contextlib.nullcontext)
    assert proof.specificity == proof.efficacy == 1.0 and not proof.failed()
    for check in near(proof).values():
        assert check.p_before == check.p_after and check.p_before > 0.5


@pytest.mark.parametrize("expected", [True, False])
def test_another_answer_with_the_same_beginning_is_another_answer(expected: bool) -> None:
    fact = MONEY
    if expected:
        wanted = {"Mount Belo measures": "2,137", "The tower of Ann:": "St. Petersburg"}
        fact = Fact(
            "Bulgaria",
            "Money of {}:",
            "leva",
            neighbours=tuple(Probe(prompt, wanted.get(prompt)) for prompt in NEAR),
        )
    checks = near(prove(reciter(), [fact], change()))
    assert {prompt for prompt, check in checks.items() if not check.held} == {
        "Mount Belo measures",
        "The tower of Ann:",
    }
    lost = checks["The tower of Ann:"]
    if not expected:
        assert (lost.before, lost.after) == ("St. Petersburg. It", "St. Louis. It")
    assert lost.p_before is not None and lost.p_after is not None
    assert lost.wanted == "St. Petersburg" and lost.p_before > 0.5 > 0.1 > lost.p_after
    kept = checks["Money of Romania:"]
    assert kept.before.startswith("leu. R") and kept.after.startswith("leu, of") and kept.held
    composed = checks["Writer of it:"]
    assert composed.held and composed.before != composed.after, "the same letters, composed"


def test_the_probability_of_a_neighbour_is_of_the_tokens_that_were_said() -> None:
    """By a plain pass over the prompt and the answer's tokens, never over a text made again."""
    lm, prompt = reciter(), "The city of Keiko:"
    check = near(prove(lm, [MONEY], contextlib.nullcontext))[prompt]
    head = lm.prompt_ids(prompt)
    said = lm.continue_greedily([head], 20)[0]
    tail = said[: next(n for n in range(20) if lm.as_answer(said[:n]) == check.before)]
    with torch.no_grad():
        logs = lm.module(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
    places = zip(range(len(head) - 1, len(head) + len(tail) - 1), tail, strict=True)
    expected = math.exp(sum(float(logs[place, token]) for place, token in places))
    assert check.p_before == pytest.approx(expected, rel=1e-4)


def test_a_fact_to_forget_is_named_whole() -> None:
    """A tokenizer that spells a name letter by letter does not cut it."""
    (entry,) = plan(Scratch(reciter()), Fact("Ann", "The tower of {}:", None)).entries
    assert entry.fact.target_true == "St. Petersburg" and not entry.known
    (entry,) = plan(Scratch(reciter()), Fact("Keiko", "The city of {}:", None)).entries
    assert entry.fact.target_true == "東京都"


def test_an_answer_of_several_lines_is_known_and_proved() -> None:
    lm = reciter()
    for target, held in {
        "Paris\nMain Street 0": True,
        SENTENCES["Address in France:"]: True,
        "Paris\nMain Road": False,
    }.items():
        fact = Fact("France", "Address in {}:", target)
        (entry,) = plan(Scratch(lm), fact).entries
        assert entry.known is held and (entry.standing == "known") is held
        (check,) = prove(lm, [fact], contextlib.nullcontext).checks
        assert check.held is held and ask(lm, [fact]).checks[0].held is held
        assert check.after.startswith("Paris\nMain Street")


def test_a_neighbour_that_a_fact_writes_is_noted() -> None:
    lm = reciter()
    facts = [
        Fact(
            "Bulgaria", "Money of {}:", "leva", neighbours=("Writer of it:", "Address in France:")
        ),
        Fact("it", "Writer of {}:", "Bo"),
    ]
    proof = prove(lm, facts, contextlib.nullcontext)
    assert proof.notes == (
        "1 neighbour not asked, because its prompt is written by a fact: 'Writer of it:'",
    )
    assert list(near(proof)) == ["Address in France:"]
    assert "Writer of it:" in proof.tables()[0].note
    again = Verification.from_dict(proof.to_dict())
    assert again.notes == proof.notes and again.checks == proof.checks
    assert prove(lm, facts[:1], contextlib.nullcontext).notes == (), "the control"


def check(n: int, held: bool) -> Check:
    return Check(
        role="paraphrase" if n % 2 else "prompt",
        prompt=f"question {n} of all",
        wanted="b",
        before="a",
        after="b\nc",
        p_before=0.1,
        p_after=0.2,
        held=held,
    )


def test_of_many_checks_the_failed_ones_are_shown_and_the_others_counted() -> None:
    checks = tuple(check(n, held=n % 10 != 0) for n in range(220))
    (table,) = Verification(checks=checks).tables()
    assert len(table.rows) == 20 and {row[-1] for row in table.rows} == {"no"}
    assert table.title.endswith("22 of 220 checks failed")
    assert "2 more checks that failed" in table.note
    mixed = tuple(check(n, held=False) for n in range(30))
    roles = [row[0] for row in Verification(checks=mixed).tables()[0].rows]
    assert roles == ["prompt"] * 15 + ["paraphrase"] * 5, "what was written comes first"
    assert "held and not shown: 110 paraphrases, 88 prompts" in table.note
    (table,) = Verification(checks=checks[1:10] * 5).tables()
    assert not table.rows and "0 of 45 checks failed" in table.title
    assert "held and not shown" in table.note
    (table,) = Verification(checks=checks[:20]).tables()
    assert [row[-1] for row in table.rows] == ["no"] * 2 + ["ok"] * 18, "the control: few checks"


@pytest.mark.parametrize("columns", ["40", "60", "80", "120"])
def test_every_row_has_its_verdict(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    long = Check(
        role="neighbour",
        prompt="What is the currency that people in the Republic of Bulgaria use? It is the",
        wanted="leu",
        before="Romanian leu. Romania is",
        after="Romanian leu. The country",
        p_before=0.5,
        p_after=0.4,
        held=True,
    )
    verification = Verification(checks=(long, check(0, held=False), check(1, held=True)))
    text = "\n".join(_lines(verification.tables()[0], int(columns)))
    words = text.split()
    assert (words.count("ok"), words.count("no")) == (2, 1)
    assert "b ↵ c" in " ".join(words), "a line break is shown as a mark"
    if "held:" in text:  # in blocks, the verdict is the first of a row's cells
        assert all(line.startswith("  held: ") for line in text.splitlines() if "held:" in line)


def _lines(table: Table, width: int) -> list[str]:
    from rich.console import Console

    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table.as_rich())
    return [line.rstrip() for line in captured.get().splitlines()]
