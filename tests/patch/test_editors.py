"""Editors write facts for an evaluation, and restore the weights bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from conftest import GPT2, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.corpus.moments_store import find_moments
from factsmith.edit import rome, spread
from factsmith.edit.append_config import AppendConfig
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
    "append": AppendConfig(layer=1, steps=2),
    "ft-l": FineTuneConfig(layers=(1,), steps=2, epochs=1),
    "lora": LoraConfig(layers=(0, 1), steps=2, epochs=1, lr=0.05),
}

SHARING = ("rome", "r-rome", "memit", "emmet")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


@pytest.fixture(scope="module")
def writers(lm: LanguageModel) -> dict[str, Any]:
    """Every editor. They share targets where they can."""
    held = find_moments(lm, [0, 1], texts=TEXTS * 20, max_tokens=3000)
    inputs = find_moments(lm, [1], texts=TEXTS * 20, site="inputs")
    names = [name for name in NAMES if name != "append"]
    updating = editors(lm, names, config={n: CONFIG[n] for n in names}, moments=held)
    appending = editors(lm, ["append"], config={"append": CONFIG["append"]}, moments=inputs)
    return {**updating, **appending}


def weights(lm: LanguageModel) -> dict[str, torch.Tensor]:
    """Return a copy of all weights."""
    return {name: value.clone() for name, value in lm.module.state_dict().items()}


def changed(lm: LanguageModel, before: dict[str, torch.Tensor]) -> set[str]:
    """Return the names of the tensors that differ from `before`."""
    now = lm.module.state_dict()
    assert now.keys() == before.keys()
    return {name for name, value in now.items() if not torch.equal(value, before[name])}


def record(n: int, fact: Fact) -> Record:
    """Return a record that asks for one fact by its prompt."""
    return Record(
        id=f"r{n}",
        facts=(fact,),
        questions=(Question(kind="prompt", prompt=fact.text, answers=(fact.target or "",)),),
    )


def test_every_editor_is_tested(writers: dict[str, Any]) -> None:
    assert set(writers) == set(NAMES) == set(CONFIG)


def test_append_widens_a_layer_and_gives_it_back(
    lm: LanguageModel, writers: dict[str, Any]
) -> None:
    before, parameters = weights(lm), list(lm.module.parameters())
    for _ in range(2):
        with writers["append"](FACTS[:1]) as notes, writers["append"](FACTS[1:2]):
            now = lm.module.state_dict()
            wider = {name for name, value in now.items() if value.shape != before[name].shape}
            assert wider == {
                f"transformer.h.1.mlp.{name}"
                for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight")
            }
            assert notes["norm"] == 0 and notes["seconds"] > 0
            assert now["transformer.h.1.mlp.c_proj.weight"].shape[0] == lm.ffn[1].d_ff
            assert lm.ffn[1].d_ff >= lm.ffn[1].n_original + 2
        assert not changed(lm, before)
        assert all(a is b for a, b in zip(lm.module.parameters(), parameters, strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "append"])
def test_every_editor_writes_and_restores(
    lm: LanguageModel, writers: dict[str, Any], name: str
) -> None:
    before, fingerprint = weights(lm), lm.fingerprint
    places = {
        f"transformer.h.{layer}.mlp.c_proj.weight"
        for layer in ((1,) if name in ("rome", "r-rome", "ft-l") else (0, 1))
    }
    with writers[name](FACTS[:1]) as notes:
        assert changed(lm, before) == places
        ratio = max(
            float((lm.module.state_dict()[p] - before[p]).norm() / before[p].norm()) for p in places
        )
        assert notes["norm"] == pytest.approx(ratio, rel=1e-4) and notes["seconds"] > 0
    assert not changed(lm, before) and lm.fingerprint == fingerprint
    with pytest.raises(KeyboardInterrupt), writers[name](FACTS[:1]):
        raise KeyboardInterrupt
    assert not changed(lm, before)


@pytest.mark.parametrize("name", ["rome", "memit"])
def test_edits_in_a_sequence_are_solved_on_the_earlier_ones(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    method = METHODS[name]
    beneath: list[tuple[tuple[str, ...], ...]] = []
    models: list[str] = []

    def spy(inputs: EditInputs) -> Delta:
        beneath.append(tuple(tuple(f.subject for f in delta.facts) for delta in inputs.beneath))
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
        assert third["norm"] == pytest.approx(total, rel=1e-4), "together with the edits around it"
    with writers[name](FACTS[:1]):
        pass
    subjects = [(f.subject,) for f in FACTS]
    assert beneath == [(), (subjects[0],), (subjects[0], subjects[1]), ()]
    assert len(set(models)) == 3 and models[0] == models[3], (
        "each edit is solved on the model with the edits around it"
    )
    assert not changed(lm, before)


def test_methods_share_targets(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors of the unpatched model share a search. The results equal those of separate ones."""
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
                shared_weights = weights(lm)
            assert noted["seconds"] > 0
            assert all(torch.equal(shared_weights[key], expected[key]) for key in shared_weights)
    searches = [subjects for subjects in searched if subjects == ("Edwin",)]
    # One search of each separate editor. The sharing ones need one of ROME's and one of MEMIT's.
    assert len(searches) == len(SHARING) + 2
    assert not changed(lm, before)
    searched.clear()
    with shared["memit"](FACTS[:1]), shared["emmet"](FACTS[1:2]), shared["rome"](FACTS[:1]):
        assert searched == [("Edwin",), ("Danielle Darrieux",)], "edits on other edits search again"


def test_editors_apart_do_not_depend_on_the_edits_before(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share a search of the very same facts. Others would give other last bits."""
    moments = find_moments(lm, [0, 1], texts=TEXTS * 20, max_tokens=3000)
    searched: list[int] = []

    def counting(*args: Any, **options: Any) -> Any:
        searched.append(len(args[1]))
        return find_targets(*args, **options)

    monkeypatch.setattr(editing, "find_targets", counting)
    config = {name: dataclasses.replace(CONFIG[name], repair=0) for name in ("memit", "emmet")}
    shared = editors(lm, list(config), config=config, moments=moments)
    apart = {name: cast(Any, editor).apart() for name, editor in shared.items()}
    with shared["memit"](FACTS):
        expected = weights(lm)
    for facts in (FACTS[1:], FACTS[:1], FACTS):
        for name in config:
            with apart[name](facts):
                if name == "memit" and facts == FACTS:
                    assert not changed(lm, expected)
    assert searched == [3, 2, 1, 3], "emmet shares the searches of memit"
    searched.clear()
    with shared["emmet"](FACTS[1:]):
        assert not searched, "the control: editors that are not apart share single facts"
    assert apart["memit"].description == shared["memit"].description  # type: ignore[attr-defined]


def test_editors_write_the_same_in_another_process(
    lm: LanguageModel, writers: dict[str, Any]
) -> None:
    pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")
    from factsmith.cluster.shipping import pack, unpack

    apart = {name: editor.apart() for name, editor in writers.items()}
    sent_lm, sent = unpack(pack((lm, apart)), {})
    assert sent_lm is not lm and sent["memit"].writer is sent["rome"].writer
    before = weights(sent_lm)
    for name in NAMES:
        with apart[name](FACTS[:2]):
            expected = weights(lm)
            with sent[name](FACTS[:2]):
                assert not changed(sent_lm, expected)
                assert changed(sent_lm, before), "the control: it writes something"
    assert not changed(sent_lm, before)


def test_settings_by_name(lm: LanguageModel) -> None:
    assert configured(lm, ["rome", "memit", "ft"]) == {}
    configs = configured(
        lm,
        ["rome", "memit", "ft"],
        {
            "memit": {"steps": 7, "layers": (0, 1)},
            "ft": {"steps": 3, "layers": 1},
            "rome": {"layer": 2},
        },
    )
    assert (configs["memit"].steps, configs["memit"].layers) == (7, (0, 1))
    assert (configs["ft-l"].steps, configs["ft-l"].layers) == (3, (1,))
    assert configs["rome"].layer == 2
    for changes, word in (
        ({"memit": {"stepz": 1}}, "stepz"),
        ({"ft": {"rank": 1}}, "rank"),
        ({"lora": {"rank": 2}}, "lora"),
    ):
        with pytest.raises(InputError, match=word):
            configured(lm, ["memit", "ft"], changes)
    with pytest.raises(InputError, match="published"):
        configured(lm, ["memit"], paper=True)


def test_a_failing_solver_leaves_no_trace(lm: LanguageModel, writers: dict[str, Any]) -> None:
    before = weights(lm)
    with writers["memit"](FACTS[:1]):
        inside = weights(lm)
        with (
            pytest.raises(InputError, match="two targets"),
            writers["memit"]([FACTS[1], Fact("Edwin", FACTS[1].prompt, "Judaism")]),
        ):
            pass
        assert not changed(lm, inside)
    assert not changed(lm, before)


def test_editors_run_in_an_evaluation(lm: LanguageModel, writers: dict[str, Any]) -> None:
    records = [record(n, fact) for n, fact in enumerate(FACTS)]
    run = evaluate(
        lm, records, {name: writers[name] for name in ("rome", "ft-l")}, size=1, sequence=True
    )
    assert run.settings["rome"].startswith("steps=2; lr=0.5; ") and run.settings["rome"].endswith(
        "; layer=1; seed=0"
    )
    assert "layers=1; " in run.settings["ft-l"]
    assert run.editors == ("base", "rome", "ft-l") and run.notes["rome", 2]["norm"] > 0


def test_layers_and_moments_have_recommended_defaults(
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


def test_wrong_names_and_settings_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="'frob'"):
        editors(lm, ["frob"])
    with pytest.raises(InputError, match="each once"):
        editors(lm, ["ft", "ft-l"])
    with pytest.raises(InputError, match="FineTuneConfig"):
        editors(lm, ["ft"], config={"ft": RomeConfig()})
    with pytest.raises(InputError, match="settings for rome"):
        editors(lm, ["ft"], config={"rome": RomeConfig()})
    assert set(editing.editors(lm, ["ft"])) == {"ft-l"}
