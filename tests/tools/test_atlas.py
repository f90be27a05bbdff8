"""Training of the bundled models: their training text, and a run that is interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tools.atlas import corpus as corpus_module
from tools.atlas.corpus import Corpus
from tools.atlas.recipe import RECIPES, Recipe
from tools.atlas.tokenizer import make_tokenizer
from tools.atlas.train import changed, learning_rate, train
from transformers import AutoModelForCausalLM

from factsmith import atlas

PROSE = [
    "The rain had stopped before they reached the harbour.",
    "Nobody in the house had slept.",
    "It was a long way home, he said.",
] * 40
RECIPE = Recipe(
    "gpt2",
    steps=4,
    vocabulary=700,
    layers=2,
    width=32,
    neurons=48,
    heads=2,
    positions=256,
    warmup=2,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(make_tokenizer(RECIPE, PROSE), atlas.facts()[:400], PROSE, seed=3)


def test_an_epoch_tells_each_chosen_fact_once_and_predicts_its_object(corpus: Corpus) -> None:
    chosen = np.arange(0, 400, 2)
    groups = list(corpus.epoch(0, chosen))
    owners: Counter[int] = Counter()
    for group in groups:
        assert len({len(row.ids) for row in group}) == 1
        for row in group:
            numbers = set(row.owner[row.owner >= 0].tolist())
            owners.update(numbers)
            text = corpus.tokenizer.decode(row.ids)
            for number in numbers:
                fact = corpus.facts[number]
                said = corpus.tokenizer.decode(row.ids[row.owner == number]).strip()
                assert said == fact.object and fact.subject in text
            assert row.predict[row.owner >= 0].all()
    assert max(owners.values()) == 1 and set(owners) <= set(chosen.tolist())
    assert len(owners) > 0.4 * len(chosen)  # the last, partial group is left for the next epoch


def test_held_out_sentences_stay_out(corpus: Corpus) -> None:
    text = " ".join(
        corpus.tokenizer.decode(row.ids)
        for e in range(6)
        for group in corpus.epoch(e, np.arange(400))
        for row in group
    )
    used = seen = 0
    for fact in corpus.facts:
        for template in atlas.phrasings(fact.relation).held_out:
            if template.replace("{}", fact.subject) in text:
                seen += atlas.is_held_out(fact.subject)
                used += 1
    assert seen == 0 and used > 0  # the other half does hear them


def test_the_same_seed_and_epoch_give_the_same_rows(corpus: Corpus) -> None:
    def rows(epoch: int) -> list[list[int]]:
        return [row.ids.tolist() for group in corpus.epoch(epoch, np.arange(400)) for row in group]

    assert rows(1) == rows(1) != rows(2)


def test_prose_has_its_share(corpus: Corpus) -> None:
    rows = [row for e in range(4) for group in corpus.epoch(e, np.arange(400)) for row in group]
    # Prose is predicted in runs without an owner; other tokens of facts only now and then.
    prose = sum(
        len(run)
        for row in rows
        for run in "".join(
            "p" if p and o < 0 else "." for p, o in zip(row.predict, row.owner, strict=True)
        ).split(".")
        if len(run) > 6
    )
    assert 0.08 < prose / sum(len(row.ids) for row in rows) < 0.25


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [learning_rate(step, 100, 10) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] and rates[100] == 0.0
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_an_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_LENGTHS", (64,))
    facts = atlas.facts()[:300]

    def run(name: str, steps: int) -> dict[str, torch.Tensor]:
        recipe = Recipe(
            "gpt2", steps=steps, vocabulary=700, layers=2, width=32, neurons=48, heads=2, warmup=2
        )
        train("tiny", recipe, facts, PROSE, tmp_path / name, save_every=0.0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        return dict(model.state_dict())

    whole = run("whole", 4)
    stop = 0

    def interrupted(*args: object, **kwargs: object) -> float:
        nonlocal stop
        stop += 1
        if stop == 3:
            raise KeyboardInterrupt
        return learn(*args, **kwargs)  # type: ignore[arg-type]

    from tools.atlas import train as module

    learn = module.learn
    monkeypatch.setattr(module, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("broken", 4)
    continued = run("broken", 4)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    assert not torch.equal(
        whole["transformer.wte.weight"], run("shorter", 3)["transformer.wte.weight"]
    )


def test_a_recipe_takes_changes_as_texts() -> None:
    recipe = changed(RECIPES["atlas"], {"width": "128", "muon_lr": "0.01", "family": "llama"})
    assert (recipe.width, recipe.muon_lr, recipe.family) == (128, 0.01, "llama")
    assert recipe.steps == RECIPES["atlas"].steps
    with pytest.raises(SystemExit, match="no field 'size'; expected some of family, steps"):
        changed(recipe, {"size": "3"})


@pytest.mark.slow
def test_training_and_measuring_run_from_a_checkout(tmp_path: Path) -> None:
    """As `make atlas` runs them: `python -m tools.atlas.train`, then `tools.atlas.evaluate`."""
    prose, out, measured = tmp_path / "prose", tmp_path / "out", tmp_path / "measured.json"
    prose.mkdir()
    (prose / "a.txt").write_text("\n".join(PROSE), encoding="utf-8")
    sizes = ["vocabulary=700", "layers=1", "width=32", "neurons=32", "heads=2"]
    for command in (
        ["tools.atlas.train", "atlas", "--prose", prose, "--out", out, "--limit", 300,
         "--steps", 2, "--threads", 1, "--set", *sizes],
        ["tools.atlas.evaluate", out, "--prose", prose, "--limit", 20, "--json", measured],
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((out / "training.json").read_text())["recipe"]["vocabulary"] == 700
    assert json.loads(measured.read_text())["facts"] == 20
