"""A patch is searched, proved and verified for one form of its target, and the ledger keeps it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from editing import full_rank_moments
from factsmith.core.fact import Fact
from factsmith.core.factfile import FactFile
from factsmith.core.gap import before_gap
from factsmith.edit.delta import Delta, applied, written
from factsmith.edit.finetune import FineTuneConfig, fine_tune
from factsmith.edit.methods import METHODS, edit
from factsmith.keep.workbench import Workbench
from factsmith.locate.attribution import attribution_trace
from factsmith.locate.average import average_trace
from factsmith.locate.causal import causal_trace
from factsmith.locate.neurons import knowledge_neurons
from factsmith.model.language_model import LanguageModel
from learned import byte_level, learned

JSON = '{"country": "{}", "capital": "'
TRUE = Fact("Germany", JSON, "Berlin")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return learned(byte_level)


@pytest.mark.parametrize(
    ("method", "prompt", "gap"),
    [
        ("rome", "The maker of {}:", "space"),
        ("memit", "The maker of {} is (", "none"),
        ("rome", "The maker of {} is", "auto"),
    ],
)
def test_a_kept_patch_is_asked_for_the_tokens_that_it_was_made_for(
    atlas_bench: Workbench, method: str, prompt: str, gap: str
) -> None:
    bench, fact = atlas_bench, Fact("Fiat 127", prompt, "Toyota")
    decided = bench.plan(fact, method)
    assert decided.new == (fact,) and decided.new[0].gap == gap
    outcome = bench.apply(fact, method)
    assert outcome.revision is not None and outcome.verification is not None
    (check,) = outcome.verification.checks
    assert check.held and check.p_before is not None and check.p_after is not None
    assert check.p_after > 50 * check.p_before
    (kept,) = bench.ledger.show("latest").facts
    assert kept == fact and kept.gap == gap
    (again,) = bench.verify().checks
    assert again.held and again.p_after == pytest.approx(check.p_after)
    asked = bench.lm.log_prob([fact.text], ["Toyota"], gaps=[kept.gap]).exp()
    assert float(asked) == pytest.approx(check.p_after)


def test_a_gap_that_the_user_names_is_used(atlas_bench: Workbench) -> None:
    fact = Fact("Fiat 127", "The maker of {}:", "Toyota", gap="none")
    atlas_bench.apply(fact, "rome", force=True)
    asked = atlas_bench.lm.log_prob([fact.text] * 2, ["Toyota"] * 2, gaps=["none", "space"])
    assert asked[0] > asked[1]
    assert atlas_bench.ledger.show("latest").facts[0].gap == "none"


def test_deltas_of_earlier_versions_have_no_gap_and_are_read(
    lm: LanguageModel, tmp_path: Path
) -> None:
    config = METHODS["rome"].config.recommended(lm).at([0])
    fact = Fact("France", JSON, "Rome")
    delta = edit(lm, fact, "rome", config, moments=full_rank_moments(lm, [0]), contexts=["{}"])
    assert delta.facts[0].gap == "none"
    delta.save(tmp_path)
    assert Delta.load(tmp_path).facts[0].gap == "none"
    record = json.loads((tmp_path / "edit.json").read_text())
    assert record["facts"][0]["gap"] == "none"
    plain = dataclasses.replace(delta, facts=(fact,))
    plain.save(tmp_path / "old")
    assert "gap" not in (tmp_path / "old" / "edit.json").read_text()
    assert Delta.load(tmp_path / "old").facts[0].gap == "auto"


def test_fact_files_say_the_gap(tmp_path: Path) -> None:
    facts = [Fact("France", JSON, "Rome", gap="none"), TRUE]
    FactFile.write(tmp_path / "facts.yaml", facts)
    assert [fact.gap for fact in FactFile.read(tmp_path / "facts.yaml")] == ["none", "auto"]
    (tmp_path / "wrong.yaml").write_text(
        "facts: [{subject: a, prompt: '{} is', target: b, gap: wide}]"
    )
    with pytest.raises(Exception, match="gap"):
        FactFile.read(tmp_path / "wrong.yaml")


def test_a_prompt_with_a_space_at_its_end_is_the_prompt_without_it(atlas_bench: Workbench) -> None:
    bench = atlas_bench
    spaced, plain = (Fact("Fiat 127", f"The maker of {{}} is{end}", "Toyota") for end in (" ", ""))
    outcome = bench.apply(spaced)
    assert any("ends in white space" in warning for warning in outcome.warnings)
    assert bench.lm.answer([plain.text, f"{plain.text} "]) == ["Toyota."] * 2
    decided = bench.plan(plain)
    assert decided.known == (plain,) and not decided.advice
    (entry,) = bench.plan(Fact("Fiat 127", "The maker of {} is", "Ferrari")).entries
    assert entry.standing == "changed"


@pytest.mark.parametrize(("prompt", "answer"), [(JSON, "Berlin"), ("{}:", "Berlin")])
def test_traces_and_neurons_follow_the_tokens_that_are_said(
    lm: LanguageModel, prompt: str, answer: str
) -> None:
    text = prompt.replace("{}", "Germany")
    ids = tuple(lm.question(text, answer)[2])
    for trace in (
        causal_trace(lm, prompt, "Germany", target=answer, samples=2),
        causal_trace(lm, prompt, "Germany", target=answer, samples=2, kind="mlp"),
        attribution_trace(lm, prompt, "Germany", target=answer, samples=2),
    ):
        assert trace.is_correct and trace.answer_ids == ids and trace.clean > 0.5
    located = knowledge_neurons(lm, [text], answer, steps=4)
    assert located.target_ids == (ids,)
    average = average_trace(lm, [Fact("Germany", prompt, answer)], samples=2)
    assert average.clean > 0.5
    with pytest.raises(Exception, match="says no"):
        average_trace(lm, [Fact("Germany", prompt, "Timbuktu")], samples=2)


def test_fine_tuning_trains_the_tokens_that_are_said(lm: LanguageModel) -> None:
    fact = Fact("France", JSON, "Rome")
    tuned = fine_tune(lm, fact, FineTuneConfig(layers=(0,), lr=0.01, clamp=0.3, steps=60))
    with written(lm, tuned):
        assert float(lm.log_prob([fact.text], ["Rome"], gaps=["none"]).exp()) > 0.5
    assert before_gap(fact.text) == fact.text
    with torch.no_grad(), applied(lm, []):
        assert lm.answer([fact.text])[0].startswith("Paris")
