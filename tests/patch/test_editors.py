"""Editors as the runner takes them: in, out bit for bit, and in a sequence each upon the others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import find_moments
from factsmith.edit import rome, spread
from factsmith.edit.configs import AlphaEditConfig, EmmetConfig, MemitConfig, RomeConfig
from factsmith.edit.delta import Delta
from factsmith.edit.finetune import FineTuneConfig, LoraConfig
from factsmith.edit.inputs import EditInputs
from factsmith.edit.methods import METHODS
from factsmith.edit.search import find_targets
from factsmith.judge.records import Question, Record
from factsmith.judge.run import evaluate
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.patch import editors as editing
from factsmith.patch.editors import NAMES, configured, editors

FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "The official religion of {} is", "Islam"),
    Fact("LeBron James", "{} plays", "chess"),
]
SPREAD = {"layers": (0, 1), "steps": 2, "scale": "auto", "lr": 0.1, "moment_weight": 10.0}
CONFIG: dict[str, Any] = {
    "rome": RomeConfig(layer=1, steps=2),
    "r-rome": RomeConfig(layer=1, steps=2),
    "memit": MemitConfig(**SPREAD),
    "emmet": EmmetConfig(**SPREAD),
    "alphaedit": AlphaEditConfig(
        **{**SPREAD, "moment_weight": None}, threshold=None, energy=0.7, l2=1.0
    ),
    "ft-l": FineTuneConfig(layers=(1,), steps=2, epochs=1),
    "lora": LoraConfig(layers=(0, 1), steps=2, epochs=1, lr=0.05),
}
SHARING = ("rome", "r-rome", "memit", "emmet")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


@pytest.fixture(scope="module")
def found(lm: LanguageModel) -> dict[str, Any]:
    """Every editor, sharing what it can."""
    moments = find_moments(lm, [0, 1], texts=TEXTS * 20, max_tokens=3000)
    return dict(editors(lm, NAMES, config=CONFIG, moments=moments))


def weights(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lm.module.state_dict().items()}


def changed(lm: LanguageModel, before: dict[str, torch.Tensor]) -> set[str]:
    now = lm.module.state_dict()
    assert now.keys() == before.keys()
    return {name for name, value in now.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", NAMES)
def test_every_editor_puts_in_and_takes_out(
    lm: LanguageModel, found: dict[str, Any], name: str
) -> None:
    before, fingerprint = weights(lm), lm.fingerprint
    places = {
        f"transformer.h.{layer}.mlp.c_proj.weight"
        for layer in ((1,) if name in ("rome", "r-rome", "ft-l") else (0, 1))
    }
    with found[name](FACTS[:1]) as notes:
        assert changed(lm, before) == places
        ratio = max(
            float((lm.module.state_dict()[p] - before[p]).norm() / before[p].norm()) for p in places
        )
        assert notes["norm"] == pytest.approx(ratio, rel=1e-4) and notes["seconds"] > 0
    assert not changed(lm, before) and lm.fingerprint == fingerprint
    with pytest.raises(KeyboardInterrupt), found[name](FACTS[:1]):
        raise KeyboardInterrupt
    assert not changed(lm, before)


@pytest.mark.parametrize("name", ["rome", "memit"])
def test_rounds_know_the_rounds_before(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    method = METHODS[name]
    told: list[tuple[tuple[str, ...], ...]] = []
    models: list[str] = []

    def spy(inputs: EditInputs) -> Delta:
        told.append(tuple(tuple(f.subject for f in delta.facts) for delta in inputs.beneath))
        models.append(inputs.lm.fingerprint)
        return method.solve(inputs)

    monkeypatch.setitem(METHODS, name, dataclasses.replace(method, solve=spy))
    moments = find_moments(lm, [0, 1], texts=TEXTS * 20, max_tokens=3000)
    writers = editors(lm, [name], config={name: CONFIG[name]}, moments=moments)
    before = weights(lm)
    with (
        writers[name](FACTS[:1]) as first,
        writers[name](FACTS[1:2]) as second,
        writers[name](FACTS[2:]) as third,
    ):
        assert len({id(n) for n in (first, second, third)}) == 3
        total = max(
            float((lm.module.state_dict()[p] - before[p]).norm() / before[p].norm())
            for p in changed(lm, before)
        )
        assert third["norm"] == pytest.approx(total, rel=1e-4), "with what stood around it"
    with writers[name](FACTS[:1]):
        pass
    subjects = [(f.subject,) for f in FACTS]
    assert told == [(), (subjects[0],), (subjects[0], subjects[1]), ()]
    assert len(set(models)) == 3 and models[0] == models[3], "solved on the model as it was then"
    assert not changed(lm, before)


def test_methods_share_targets(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found once for facts written into the model as it is, and what comes out is what each method finds alone."""
    moments = find_moments(lm, [0, 1], texts=TEXTS * 20, max_tokens=3000)
    searched: list[tuple[str, ...]] = []

    def counting(*args: Any, **options: Any) -> Any:
        searched.append(tuple(fact.subject for fact in args[1]))
        return find_targets(*args, **options)

    for module in (editing, rome, spread):
        monkeypatch.setattr(module, "find_targets", counting)
    config = {
        name: dataclasses.replace(
            CONFIG[name], **({"repair": 0} if name in ("memit", "emmet") else {})
        )
        for name in SHARING
    }
    shared = editors(lm, SHARING, config=config, moments=moments, seed=3)
    before = weights(lm)
    for name in SHARING:
        for facts in (FACTS[:1], FACTS[1:2]):
            alone = editors(lm, [name], config={name: config[name]}, moments=moments, seed=3)[name]
            with alone(facts):
                expected = weights(lm)
            with shared[name](facts) as noted:
                found = weights(lm)
            assert noted["seconds"] > 0 and all(
                torch.equal(found[key], expected[key]) for key in found
            )
    own = [subjects for subjects in searched if subjects == ("Edwin",)]
    assert len(own) == len(SHARING) + 2, (
        "one of the solo editors each, one of ROME's and one of MEMIT's for the sharing ones"
    )
    assert not changed(lm, before)
    searched.clear()
    with shared["memit"](FACTS[:1]), shared["emmet"](FACTS[1:2]), shared["rome"](FACTS[:1]):
        assert searched == [("Edwin",), ("Danielle Darrieux",)], (
            "what stands on other edits is searched anew"
        )


def test_settings_by_name(lm: LanguageModel) -> None:
    assert configured(lm, ["rome", "memit", "ft"]) == {}
    found = configured(
        lm,
        ["rome", "memit", "ft"],
        {
            "memit": {"steps": 7, "layers": (0, 1)},
            "ft": {"steps": 3, "layers": 1},
            "rome": {"layer": 2},
        },
    )
    assert (
        found["memit"].steps,
        found["memit"].layers,
        found["ft-l"].steps,
        found["ft-l"].layers,
    ) == (7, (0, 1), 3, (1,))
    assert found["rome"].layer == 2
    for changes, word in (
        ({"memit": {"stepz": 1}}, "stepz"),
        ({"ft": {"rank": 1}}, "rank"),
        ({"lora": {"rank": 2}}, "lora"),
    ):
        with pytest.raises(InputError, match=word):
            configured(lm, ["memit", "ft"], changes)
    with pytest.raises(InputError, match="published"):
        configured(lm, ["memit"], paper=True)


def test_a_failing_solver_leaves_no_trace(lm: LanguageModel, found: dict[str, Any]) -> None:
    before = weights(lm)
    with found["memit"](FACTS[:1]):
        inside = weights(lm)
        with (
            pytest.raises(InputError, match="two targets"),
            found["memit"]([FACTS[1], Fact("Edwin", FACTS[1].prompt, "Judaism")]),
        ):
            pass
        assert not changed(lm, inside)
    assert not changed(lm, before)


def record(n: int, fact: Fact) -> Record:
    return Record(
        id=f"r{n}",
        facts=(fact,),
        questions=(Question(kind="prompt", prompt=fact.text, answers=(fact.target or "",)),),
    )


def test_they_run_in_the_runner(lm: LanguageModel, found: dict[str, Any]) -> None:
    records = [record(n, fact) for n, fact in enumerate(FACTS)]
    run = evaluate(
        lm, records, {name: found[name] for name in ("rome", "ft-l")}, size=1, sequence=True
    )
    assert run.settings["rome"].startswith("steps=2; lr=0.5; ") and run.settings["rome"].endswith(
        "; layer=1; seed=0"
    )
    assert "layers=1; " in run.settings["ft-l"]
    assert run.editors == ("base", "rome", "ft-l") and run.notes["rome", 2]["norm"] > 0


def test_what_is_not_said_is_recommended(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        editing,
        "find_moments",
        lambda lm, layers, **options: asked.update(layers=layers, **options) or {},
    )
    trained: list[Any] = []

    def spy(lm: LanguageModel, facts: Any, config: Any, **options: Any) -> Any:
        trained.append(config.layers)
        return {0: lm.ffn[0].weight().clone()}

    for name in ("ft-l", "lora"):
        monkeypatch.setitem(editing._TUNED, name, (spy, editing._TUNED[name][1]))
    layers = MemitConfig.recommended(lm).layers or ()
    writers = editors(lm, ["memit", "ft", "lora"], folder=tmp_path)
    assert asked["layers"] == list(layers) and asked["folder"] == tmp_path
    for name in ("ft-l", "lora"):
        with writers[name](FACTS[:1]):
            pass
    assert trained == [layers[:1], layers]


def test_refusals(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="'frob'"):
        editors(lm, ["frob"])
    with pytest.raises(InputError, match="each once"):
        editors(lm, ["ft", "ft-l"])
    with pytest.raises(InputError, match="FineTuneConfig"):
        editors(lm, ["ft"], config={"ft": RomeConfig()})
    with pytest.raises(InputError, match="settings for rome"):
        editors(lm, ["ft"], config={"rome": RomeConfig()})
    assert set(editing.editors(lm, ["ft"])) == {"ft-l"}
