"""The workbench keeps model and ledger together: what is recorded is what the weights are, bit for bit, whatever happens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import GPT2, LLAMA, byte_tokenizer, shared_dir, tiny_model
from factsmith import atlas
from factsmith.core.errors import (
    DamagedError,
    FactsmithError,
    FingerprintError,
    InputError,
    LayerError,
    NumericsError,
    RevisionError,
    SubjectError,
    UnsupportedModelError,
    WorkspaceError,
)
from factsmith.core.fact import Fact, Probe
from factsmith.core.gates import Gates
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.corpus.moments_store import moments_file
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.edit.delta import Delta, applied
from factsmith.edit.keys import read_keys
from factsmith.edit.methods import METHODS
from factsmith.edit.resolve import resolve
from factsmith.keep import again, carried
from factsmith.keep.export.folder import read_patch
from factsmith.keep.ledger import BASE, LATEST, Ledger
from factsmith.keep.revision import Revision
from factsmith.keep.workbench import Workbench
from factsmith.model.answers import answer_tokens
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.patch import layers as recommend
from factsmith.patch.bench import Scratch
from factsmith.patch.conflicts import compare_facts
from factsmith.patch.plan import plan
from patching import proposed

FACT = Fact(
    "Danielle Darrieux",
    "The mother tongue of {} is",
    "English",
    paraphrases=("{} speaks",),
    neighbours=("Paris is the capital of",),
)


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


@pytest.fixture
def bench(lm: LanguageModel, tmp_path: Path) -> Iterator[Workbench]:
    with Workbench(lm, tmp_path / "space") as opened:
        yield opened


def hashes(lm: LanguageModel) -> dict[str, str]:
    """sha256 of every tensor, taken without the library."""
    return {
        name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
        for name, tensor in lm.module.state_dict().items()
    }


def some_delta(
    lm: LanguageModel,
    seed: int,
    layers: tuple[int, ...] = (1,),
    scale: float = 0.1,
    target: str = "x",
) -> Delta:
    """A random change, made on the model as it is now."""
    generator = torch.Generator().manual_seed(seed)
    d_ff = lm.ffn[0].d_ff

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return Delta(
        layers={layer: (draw(lm.d_model, 2), draw(2, d_ff)) for layer in layers},
        k_star={layer: draw(1, d_ff) for layer in layers},
        v_star=draw(1, lm.d_model),
        facts=(Fact(f"subject {seed}", "{} is", target),),
        method="rome",
        config={"layer": layers[0]},
        fingerprint=lm.fingerprint,
    )


def moments_of(lm: LanguageModel) -> dict[int, SecondMoment]:
    return second_moments(lm, TEXTS, [0, 1, 2])


TEXTS = [
    f"{a} of {b} is {c}. {c}, not {b}."
    for a in ("Paris", "The king", "A league")
    for b in ("Brazil", "x", "Zürich 12")
    for c in "abcdefgh"
]
QUICK = RomeConfig(layer=1, steps=3)


# ---- the weights are base + Σ active deltas -------------------------------------------------------------------------------------------


def test_commit_and_back_to_base(lm: LanguageModel, bench: Workbench) -> None:
    base, matrices = hashes(lm), {layer: lm.ffn[layer].weight().clone() for layer in range(3)}
    first = some_delta(lm, 1)
    one = bench.commit(first)
    after_one = hashes(lm)
    assert sum(after_one[name] != base[name] for name in base) == 1, (
        "one matrix changes, and it does change"
    )
    second = some_delta(lm, 2, (0, 1))
    two = bench.commit(second)
    after_two = hashes(lm)
    # independent: the sum, by hand
    assert torch.equal(
        lm.ffn[1].weight(),
        matrices[1]
        + first.layers[1][0] @ first.layers[1][1]
        + second.layers[1][0] @ second.layers[1][1],
    )
    assert torch.equal(lm.ffn[0].weight(), matrices[0] + second.layers[0][0] @ second.layers[0][1])
    for reference, expected in (
        (BASE, base),
        (one.id, after_one),
        (two.id[:8], after_two),
        (BASE, base),
        (LATEST, after_two),
    ):
        bench.checkout(reference)
        assert hashes(lm) == expected, reference
    bench.revert(two.id)
    assert hashes(lm) == after_one
    bench.revert(one.id)
    assert hashes(lm) == base


def test_the_other_orientation(tmp_path: Path) -> None:
    """nn.Linear and a gated FFN instead of Conv1D."""
    lm = wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    base, matrix, moments = (
        hashes(lm),
        lm.module.model.layers[1].mlp.down_proj.weight.clone(),
        moments_of(lm),
    )
    with Workbench(lm, tmp_path) as bench:
        delta = some_delta(lm, 1)
        revision = bench.commit(delta)
        assert torch.equal(
            lm.module.model.layers[1].mlp.down_proj.weight,
            matrix + delta.layers[1][0] @ delta.layers[1][1],
        )
        outcome = bench.apply(FACT, config=QUICK, moments=moments, contexts=["{}"], force=True)
        assert outcome.revision is not None
        bench.revert(outcome.revision.id)
        bench.revert(revision.id)
        assert hashes(lm) == base


def test_subtracting_would_not_do(lm: LanguageModel, bench: Workbench) -> None:
    """The control: W + Δ − Δ is not W, so a revert that gives the base's bits did not subtract."""
    delta = some_delta(lm, 1)
    weight = lm.ffn[1].weight().clone()
    assert not torch.equal(weight + delta.dense(1) - delta.dense(1), weight)
    bench.revert(bench.commit(delta).id)
    assert torch.equal(lm.ffn[1].weight(), weight)


def test_opening_again_gives_the_same_bits(lm: LanguageModel, tmp_path: Path) -> None:
    base = hashes(lm)
    with Workbench(lm, tmp_path) as bench:
        bench.commit(some_delta(lm, 1))
        bench.commit(some_delta(lm, 2))
        patched = hashes(lm)
    assert hashes(lm) == base, "closing puts the base back"
    other = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    with Workbench(other, tmp_path) as bench:
        assert hashes(other) == patched
        bench.checkout(BASE)
    with Workbench(other, tmp_path) as bench:
        assert hashes(other) == base, "checked out at base, it opens at base"
        with pytest.raises(WorkspaceError, match="checkout latest"):
            bench.commit(some_delta(other, 3))
        assert hashes(other) == base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_too(tmp_path: Path, dtype: torch.dtype) -> None:
    lm = wrap(tiny_model("gpt2", **GPT2).to(dtype), byte_tokenizer())
    base = lm.ffn[1].weight().clone()
    with Workbench(lm, tmp_path) as bench:
        delta = some_delta(lm, 1)
        revision = bench.commit(delta)
        assert torch.equal(lm.ffn[1].weight(), (base.float() + delta.dense(1)).to(dtype))
        bench.revert(revision.id)
        assert torch.equal(lm.ffn[1].weight(), base)
        assert bench.ledger.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_is_of_the_weights_that_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rounded once, not once a patch: in bfloat16 the two differ, and the answers measured must be those of the weights committed."""
    lm = wrap(tiny_model("gpt2", **GPT2).to(dtype), byte_tokenizer())
    with Workbench(lm, tmp_path) as bench:
        bench.commit(some_delta(lm, 1))
        moments = {1: SecondMoment.from_matrix(torch.eye(lm.ffn[1].d_ff), count=1)}
        on_top = lm.ffn[1].weight().clone()
        outcome = bench.apply(FACT, config=QUICK, moments=moments, contexts=["{}"], force=True)
        assert outcome.verification is not None and outcome.delta is not None
        prompts, wanted = zip(
            *((check.prompt, check.wanted) for check in outcome.verification.checks), strict=True
        )
        assert [check.p_after for check in outcome.verification.checks] == [
            math.exp(log) for log in lm.log_prob(prompts, wanted).tolist()
        ]
        twice = (on_top.float() + outcome.delta.dense(1)).to(dtype)
        assert torch.equal(twice, lm.ffn[1].weight()) is (dtype == torch.float32)


def test_a_model_path_is_kept_whole(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm, "name", "model")
    with Workbench(lm, "space") as bench:
        assert bench.ledger.model == str(tmp_path / "model")


def test_middle_revert(lm: LanguageModel, bench: Workbench) -> None:
    one = bench.commit(some_delta(lm, 1, (1,)))
    apart = bench.commit(some_delta(lm, 2, (2,)))
    before_apart = hashes(lm)
    last = bench.commit(some_delta(lm, 3, (1,)))
    state = hashes(lm)
    with pytest.raises(
        InputError, match="write its facts again"
    ):  # this one has no recipe to be solved again by
        bench.revert(one.id)
    assert hashes(lm) == state and bench.log()[0].id == last.id
    bench.revert(apart.id)
    assert torch.equal(lm.ffn[2].weight(), bench._carried.base[2])
    bench.revert(last.id)
    assert {n for n, h in hashes(lm).items() if h != before_apart[n]} == {
        n for n in state if ".2.mlp.c_proj.weight" in n
    }


THREE = [Fact(f"Entity{n}", "The home of {} is", " q", relation="home") for n in range(3)]
SPREADING = MemitConfig(layers=(0, 1), steps=4, scale="auto", lr=0.2, moment_weight=5.0)


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_what_stands_on_a_reverted_patch_is_solved_again(
    lm: LanguageModel, bench: Workbench, tmp_path: Path, method: str
) -> None:
    config = RomeConfig(layer=1, steps=4) if method == "rome" else SPREADING
    moments = moments_of(lm)

    def put(facts: list[Fact]) -> Revision:
        done = bench.apply(facts, method, config, moments=moments, force=True)
        assert done.revision is not None
        return done.revision

    base = hashes(lm)
    one, two = put(THREE[:1]), put(THREE[1:])
    both = hashes(lm)
    undo = bench.revert(one.id, moments=moments, force=True)
    without = hashes(lm)
    assert without not in (base, both)
    (left,) = bench.ledger.active()
    assert left.id == two.id and left.in_effect == tuple(THREE[1:]) and left.carried != two.delta
    original, again = (
        Delta.load(bench.ledger.delta_folder(left, two.delta)),
        Delta.load(bench.ledger.delta_folder(left)),
    )
    assert (
        torch.equal(again.v_star, original.v_star)
        if method == "rome"
        else torch.allclose(again.v_star, original.v_star)
    )
    with Workbench(wrap(tiny_model("gpt2", **GPT2), byte_tokenizer()), tmp_path / "other") as alone:
        expected = resolve(alone.lm, original, moments=moments)
    for layer in again.layers:
        assert torch.allclose(again.dense(layer), expected.dense(layer), atol=1e-6)
        assert not torch.allclose(original.dense(layer), expected.dense(layer), atol=1e-6)
    asked = [check["prompt"] for check in undo.report["checks"] if check["role"] == "prompt"]
    assert asked == [fact.text for fact in THREE[1:]]
    part = bench.revert(two.id, facts=[1], moments=moments, force=True)
    assert part.facts == (THREE[2],) and bench.ledger.active()[0].in_effect == (THREE[1],)
    bench.revert(part.id)
    assert hashes(lm) == without, "undoing the newest brings back the very bits"
    bench.checkout(two.id)
    assert hashes(lm) == both
    bench.checkout("latest")
    assert hashes(lm) == without
    bench.close()
    with Workbench(lm, bench.ledger.folder) as opened:
        assert hashes(lm) == without
        opened.checkout("base")
        assert hashes(lm) == base


def test_a_revert_that_would_lose_a_fact_is_not_recorded(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = moments_of(lm)
    one = bench.apply(THREE[:1], "memit", SPREADING, moments=moments, force=True).revision
    two = bench.apply([EASY], "memit", SPREADING, moments=moments, force=True).revision
    assert one is not None and two is not None
    state = hashes(lm)
    proof = again.prove(lm, [EASY], nullcontext)
    held = dataclasses.replace(
        proof.checks[0], before=" Paris", wanted=" Paris", after="x", held=False
    )
    monkeypatch.setattr(
        again, "prove", lambda *_, **__: dataclasses.replace(proof, checks=(held,))
    )
    with pytest.raises(NumericsError, match="would lose 1 fact"):
        bench.revert(one.id, moments=moments)
    assert hashes(lm) == state and bench.log()[0].id == two.id
    assert bench.revert(one.id, moments=moments, force=True).report["checks"][0]["held"] is False
    other = {
        layer: dataclasses.replace(moment, matrix=moment.matrix * 1.5)
        for layer, moment in moments.items()
    }
    bench.revert("latest")
    monkeypatch.setattr(bench, "find_moments", lambda *_, **__: other)
    with pytest.raises(InputError, match="not in the workspace any more"):
        bench.revert(one.id)


def test_a_preview_leaves_nothing(lm: LanguageModel, bench: Workbench) -> None:
    before, moments = hashes(lm), moments_of(lm)
    with bench.preview(
        THREE[:1], "rome", RomeConfig(layer=1, steps=4), moments=moments, force=True
    ) as shown:
        assert shown is lm and hashes(lm) != before
    assert hashes(lm) == before and bench.log() == []
    with (
        pytest.raises(RuntimeError),
        bench.preview(THREE[:1], "rome", RomeConfig(layer=1, steps=4), moments=moments, force=True),
    ):
        raise RuntimeError
    assert hashes(lm) == before


def test_a_diff_is_of_weights_and_facts(lm: LanguageModel, bench: Workbench) -> None:
    base = lm.ffn[1].weight().detach().clone()
    one = bench.commit(some_delta(lm, 1, (1,)))
    first = lm.ffn[1].weight().detach().clone()
    two = bench.commit(some_delta(lm, 2, (1, 2)))
    state = hashes(lm)
    found = bench.diff("base", one.id)
    assert found.norms == {1: pytest.approx(float((first - base).norm() / base.norm()), rel=1e-4)}
    assert [(f.prompt, f.before, f.after) for f in found.facts] == [("subject 1 is", None, "x")]
    assert found.facts[0].answer_before == load_fresh_answer(lm, bench, "base", "subject 1 is")
    back = bench.diff(two.id, "base")
    assert (
        set(back.norms) == {1, 2}
        and [f.after for f in back.facts] == [None, None]
        and hashes(lm) == state
    )
    assert "2 facts different" in repr(back) and json.dumps(back.to_dict())
    assert bench.rebuild().revisions == 2
    lm.ffn[2].weight().data[0, 0] += 1
    with pytest.raises(FingerprintError):
        bench.rebuild()


def load_fresh_answer(lm: LanguageModel, bench: Workbench, reference: str, prompt: str) -> str:
    """What the model answers at a revision, by checking it out."""
    here = bench.ledger.current
    bench.checkout(reference)
    answer = lm.answer([prompt])[0]
    bench.checkout(here)
    return answer


def test_a_plan_knows_one_question_in_other_words(lm: LanguageModel, bench: Workbench) -> None:
    """Without a relation: by the paraphrases that either has, or as phrasings of one bundled relation."""
    currency = atlas.phrasings("P38").every
    held = [
        Fact("Entity0", "The home of {} is", " q", paraphrases=["Entity0 lives in"]),
        Fact("Bulgaria", currency[0], "euro"),
    ]
    bench.apply(held, "rome", RomeConfig(layer=1, steps=4), moments=moments_of(lm), force=True)
    facts = [
        Fact("Entity0", "{} lives in", " z"),
        Fact("Entity0", "A house of {} is", " z", paraphrases=[held[0].text]),
        Fact("Bulgaria", currency[1], "yen"),
        Fact("Bulgaria", currency[1].replace("{}", "all of {}"), "yen"),  # nobody can know
        Fact("Romania", currency[1], "yen"),
        Fact("Someone", "{} lives in", " z"),
    ]
    found = [bench.plan(fact, "rome", RomeConfig(layer=1, steps=4)).entries[0] for fact in facts]
    assert [entry.standing for entry in found] == [
        "conflict",
        "conflict",
        "conflict",
        "new",
        "new",
        "new",
    ]
    assert str(held[0]) in found[0].because and str(held[1]) in found[2].because


def test_a_plan_knows_what_facts_meet(lm: LanguageModel, bench: Workbench) -> None:
    moments, config = moments_of(lm), RomeConfig(layer=1, steps=4)
    first = Fact("Entity0", "The home of {} is", " q", relation="home")
    bench.apply([first], "rome", config, moments=moments, force=True)
    facts = [
        Fact("Entity0", "The home of {} is", " z"),  # its very prompt, another target
        Fact("Entity0", "Home: {} in", " z", relation="home"),  # the same fact in other words
        Fact("Someone", "A thing of {} is", " y"),
        Fact(
            "Someone", "A thing of {} was", " x"
        ),  # one key, two targets: nothing is different up to the subject
    ]
    bare = bench.plan(facts, "rome", config)
    assert bare.layers == (1,)
    assert [e.standing for e in bare.entries] == [
        "changed",
        "conflict",
        "conflict",
        "conflict",
    ] and bare.entries[0].crowding is None
    assert "cosine 1.000" in bare.entries[2].because and any(
        "second moments are not kept" in note for note in bare.notes
    )
    apart = bench.plan(
        [facts[2], Fact("Somebody", "A thing of {} was", " x")], "rome", config
    )  # other subjects, other keys
    assert [e.standing for e in apart.entries] == ["new", "new"]
    assert bare.seconds is not None and bare.seconds > 0
    for layer, moment in moments.items():
        moment.save(moments_file(bench.ledger.folder / "moments", layer))
    before = hashes(lm)
    found = bench.plan(facts, "rome", config)
    assert [e.standing for e in found.entries] == [
        "changed",
        "conflict",
        "conflict",
        "conflict",
    ] and hashes(lm) == before
    assert (
        "nearly the same key" in found.entries[2].because
        and len(found.conflicts) == 3
        and found.notes == ()
    )
    with bench.on_base():
        keys = read_keys(lm, [*facts, first], 1, ["{}"])[:, 0].double()
    lower = torch.linalg.cholesky(moments[1].matrix.double())
    white = torch.linalg.inv(lower) @ keys.T
    held = white[:, 4:]
    for entry, key in zip(found.entries, white.T, strict=False):
        share = float((held.T @ key / held.norm()).square() / key.square().sum())
        assert entry.crowding == pytest.approx(share, rel=1e-3, abs=1e-6)
    assert found.entries[0].crowding == pytest.approx(1) and found.entries[2].crowding < 0.99
    assert "what they meet" in repr(found) and json.dumps(found.to_dict())


def test_facts_get_something_to_be_asked(lm: LanguageModel, bench: Workbench) -> None:
    given = Fact(
        "Ann", "{} was born in", "Oslo", paraphrases=("{} comes from",), neighbours=("The sky is",)
    )
    bare = Fact("Bob", "The currency of {} is the", "lev")
    full, made = bench.completed([given, bare])
    assert full == given
    assert len(made.paraphrases) == 5 and all(
        text.endswith("The currency of {} is the") and len(text) > 26 for text in made.paraphrases
    )
    assert bench.completed([bare], seed=1)[0].paraphrases != made.paraphrases
    assert all("Bob" not in probe.prompt for probe in made.neighbours)


def test_patches_of_another_workspace_are_taken_in(
    lm: LanguageModel, bench: Workbench, tmp_path: Path
) -> None:
    moments = moments_of(lm)
    bench.apply(THREE[:1], "memit", SPREADING, moments=moments, force=True)
    bench.apply(THREE[1:2], "memit", SPREADING, moments=moments, force=True)
    state = hashes(lm)
    bench.export(tmp_path / "patch", format="patch")
    bench.close()
    with Workbench(lm, tmp_path / "same") as same:
        made = same.import_patches(tmp_path / "patch", force=True)
        assert len(made) == 2 and hashes(lm) == state, (
            "on the very weights they were made on they are taken as they are"
        )
        assert same.import_patches(tmp_path / "patch") == (), "nothing twice"
    with Workbench(lm, tmp_path / "other") as other:
        other.apply(THREE[2:], "memit", SPREADING, moments=moments, force=True)
        there = hashes(lm)
        made = other.import_patches(tmp_path / "patch", moments=moments, force=True)
        assert len(made) == 2 and [r.in_effect for r in other.ledger.active()] == [
            (THREE[2],),
            (THREE[0],),
            (THREE[1],),
        ]
        original = read_patch(tmp_path / "patch").patches[0].delta
        again = Delta.load(other.ledger.delta_folder(made[0]))
        other.checkout(other.log()[-1].id)
        assert hashes(lm) == there
        expected = resolve(
            lm, original, moments=moments, beneath=[other._carried.deltas[other.log()[-1].id]]
        )
        for layer in again.layers:
            assert torch.allclose(again.dense(layer), expected.dense(layer), atol=1e-6)
            assert not torch.allclose(again.dense(layer), original.dense(layer), atol=1e-6)
    with Workbench(lm, tmp_path / "contrary") as contrary:
        against = Fact("Entity0", "The home of {} is", " z")
        contrary.apply([against], "memit", SPREADING, moments=moments, force=True)
        before = hashes(lm)
        with pytest.raises(RevisionError, match="revert that first"):
            contrary.import_patches(tmp_path / "patch", moments=moments)
        assert hashes(lm) == before and len(contrary.log()) == 1
    stranger = wrap(tiny_model("gpt2", seed=9, **GPT2), byte_tokenizer())
    with (
        Workbench(stranger, tmp_path / "stranger") as wrong,
        pytest.raises(FingerprintError, match="was made for"),
    ):
        wrong.import_patches(tmp_path / "patch")


def test_apply_says_when_there_is_little_room(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, set[int]]] = []

    def warned(
        deltas: list[Delta], weights: dict[int, torch.Tensor], moments: dict[int, SecondMoment]
    ) -> str:
        assert set(weights) == set(moments) and torch.equal(weights[1], base)
        asked.append((len(deltas), set(moments)))
        return "little room"

    base, moments = lm.ffn[1].weight().detach().clone(), moments_of(lm)
    monkeypatch.setattr("factsmith.patch.attempt.capacity_warning", warned)
    bare = bench.apply(THREE[:1], "rome", RomeConfig(layer=1, steps=2), moments=moments, force=True)
    assert bare.room is None and not asked, (
        "second moments that are not kept are not computed for it"
    )
    moments[1].save(moments_file(bench.ledger.folder / "moments", 1))
    found = bench.apply(
        THREE[1:2], "rome", RomeConfig(layer=1, steps=2), moments=moments, force=True
    )
    assert (
        asked == [(2, {1})]
        and found.room == "little room"
        and "little room" in found.warnings
        and "little room" in repr(found)
    )


# ---- faults ----------------------------------------------------------------------------------------------------------------------------


def test_another_model_is_refused(bench: Workbench, tmp_path: Path) -> None:
    stranger = wrap(tiny_model("gpt2", seed=9, **GPT2), byte_tokenizer())
    before = hashes(stranger)
    with pytest.raises(FingerprintError, match="was made for"):
        Workbench(stranger, tmp_path / "space")
    assert hashes(stranger) == before


def test_weights_changed_from_outside_are_noticed(lm: LanguageModel, bench: Workbench) -> None:
    delta = some_delta(lm, 1)
    with torch.no_grad():
        lm.ffn[1].weight()[0, 0] += 1
    with pytest.raises(FingerprintError, match="outside"):
        bench.commit(delta)
    assert bench.log() == []


def test_a_delta_for_other_weights_is_refused(lm: LanguageModel, bench: Workbench) -> None:
    stale = some_delta(lm, 1)
    bench.commit(some_delta(lm, 2))
    before = hashes(lm)
    with pytest.raises(FingerprintError, match="made on"):
        bench.commit(stale)
    assert hashes(lm) == before and len(bench.log()) == 1


def test_overflow_is_refused_before_it_is_recorded(tmp_path: Path) -> None:
    lm = wrap(tiny_model("gpt2", **GPT2).half(), byte_tokenizer())
    before = hashes(lm)
    with Workbench(lm, tmp_path) as bench:
        with pytest.raises(NumericsError):
            bench.commit(some_delta(lm, 1, scale=1e4))
        assert hashes(lm) == before and bench.log() == []


def test_a_damaged_delta_is_refused_and_can_be_left_behind(
    lm: LanguageModel, tmp_path: Path
) -> None:
    with Workbench(lm, tmp_path) as bench:
        one = bench.commit(some_delta(lm, 1))
        after_one = hashes(lm)
        two = bench.commit(some_delta(lm, 2))
    base = hashes(lm)
    file = tmp_path / "deltas" / str(two.delta) / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(DamagedError, match=two.id[:10]) as refusal:
        Workbench(lm, tmp_path)
    assert f"factsmith checkout {one.id[:10]}" in str(refusal.value)
    assert hashes(lm) == base
    with Ledger(tmp_path) as ledger:
        ledger.checkout(one.id)
    with Workbench(lm, tmp_path) as bench:
        assert hashes(lm) == after_one
        with pytest.raises(DamagedError):
            bench.checkout(LATEST)
        assert hashes(lm) == after_one


def test_two_workbenches_on_one_workspace(lm: LanguageModel, tmp_path: Path) -> None:
    other = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    with Workbench(lm, tmp_path) as mine, Workbench(other, tmp_path) as theirs:
        delta = some_delta(other, 2)
        revision = mine.commit(some_delta(lm, 1))
        before = hashes(other)
        with pytest.raises(WorkspaceError, match=f"somebody committed {revision.id[:10]}"):
            theirs.commit(delta)
        with pytest.raises(WorkspaceError, match="somebody committed"):
            theirs.apply(FACT)  # before any work is done
        assert hashes(other) == before
        theirs.checkout(LATEST)
        assert hashes(other) == hashes(lm)
        theirs.commit(some_delta(other, 2))


POINTS: dict[str, Callable[[pytest.MonkeyPatch, Callable[..., Any]], None]] = {
    "solving": lambda m, bomb: m.setitem(
        METHODS, "rome", dataclasses.replace(METHODS["rome"], solve=bomb)
    ),
    "inside the solver": lambda m, bomb: m.setattr("factsmith.edit.rome.find_targets", bomb),
    "sampling": lambda m, bomb: m.setattr("factsmith.corpus.moments_store.own_text", bomb),
    "moments": lambda m, bomb: m.setattr("factsmith.corpus.moments_store.second_moments", bomb),
    "verifying": lambda m, bomb: m.setattr("factsmith.patch.proof.as_said", bomb),
    "saving": lambda m, bomb: m.setattr(Delta, "save", bomb),
    "writing weights": lambda m, bomb: _after(m, carried, "write_weights", bomb),
    "recording": lambda m, bomb: m.setattr("factsmith.keep.ledger.Ledger._append", bomb),
}


def _after(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, bomb: Callable[..., Any]
) -> None:
    """Let the function do its work, and then fail, the first time it changes anything."""
    original = getattr(module, name)

    def wrapped(lm: Any, weights: Any) -> None:
        original(lm, weights)
        if weights and not bomb.gone:  # type: ignore[attr-defined]
            bomb()

    monkeypatch.setattr(module, name, wrapped)


class _Bomb:
    def __init__(self, exception: BaseException) -> None:
        self.exception, self.gone = exception, False

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.gone = True
        raise self.exception


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(
    "exception", [KeyboardInterrupt(), RuntimeError("anything")], ids=lambda e: type(e).__name__
)
def test_a_failure_anywhere_leaves_both_as_before(
    lm: LanguageModel,
    bench: Workbench,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    exception: BaseException,
) -> None:
    moments = moments_of(lm)  # of the base weights
    bench.commit(some_delta(lm, 1))
    before, log = hashes(lm), bench.log()
    bomb = _Bomb(exception)
    with monkeypatch.context() as patching:
        POINTS[point](patching, bomb)
        with pytest.raises(type(exception)):
            bench.apply(
                FACT,
                config=QUICK,
                force=True,
                moments=None if point in ("sampling", "moments") else moments,
            )
    assert bomb.gone, "the point was never reached: the test did not test"
    assert hashes(lm) == before and bench.log() == log
    outcome = bench.apply(
        FACT, config=QUICK, force=True, moments=moments
    )  # and it works the next time
    assert outcome.revision is not None and hashes(lm) != before


@pytest.mark.parametrize("step", ["commit", "revert", "checkout"])
def test_an_interruption_when_it_is_recorded_leaves_both_moved(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """As when Ctrl-C comes while the database flushes: history cannot be taken back, so the model follows it."""
    first = bench.commit(some_delta(lm, 1))
    one = hashes(lm)
    original = getattr(Ledger, step)

    def late(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise KeyboardInterrupt

    calls = {
        "commit": lambda: bench.commit(some_delta(lm, 2)),
        "revert": lambda: bench.revert(first.id),
        "checkout": lambda: bench.checkout(BASE),
    }
    with monkeypatch.context() as patching:
        patching.setattr(Ledger, step, late)
        with pytest.raises(KeyboardInterrupt):
            calls[step]()
    assert hashes(lm) != one and len(bench.log()) == {"commit": 2, "revert": 2, "checkout": 1}[step]
    carried = hashes(lm)
    assert bench.checkout(bench.ledger.current) == bench.ledger.current and hashes(lm) == carried
    bench.checkout(LATEST)
    assert bench.commit(some_delta(lm, 3)).state == "active", "and it goes on"
    bench.checkout(first.id)
    assert hashes(lm) == one


@pytest.mark.parametrize("step", ["commit", "revert", "checkout"])
def test_another_process_that_commits_in_the_same_moment_is_not_taken_over(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What was recorded here is what the model carries, though the ledger's newest revision is already somebody else's."""
    first = bench.commit(some_delta(lm, 1))
    second = bench.commit(some_delta(lm, 2))
    calls = {
        "commit": lambda: bench.commit(some_delta(lm, 3)).id,
        "revert": lambda: bench.revert(second.id).id,
        "checkout": lambda: bench.checkout(first.id),
    }
    original = getattr(Ledger, step)

    def overtaken(ledger: Ledger, *args: Any, **kwargs: Any) -> Any:
        noted = original(ledger, *args, **kwargs)
        if ledger is bench.ledger:
            with Ledger(bench.ledger.folder) as other:
                other.checkout(LATEST)
                other.commit(
                    some_delta(lm, 9).save,
                    onto=other.head,
                    method="rome",
                    config={},
                    facts=(FACT,),
                    layers=[1],
                )
        return noted

    with monkeypatch.context() as patching:
        patching.setattr(Ledger, step, overtaken)
        mine = calls[step]()
    carried, newest = hashes(lm), bench.ledger.head
    assert newest != mine, "the other did not come in between: the test did not test"
    with pytest.raises(WorkspaceError, match="somebody committed"):
        bench.commit(some_delta(lm, 4))
    assert hashes(lm) == carried
    bench.checkout(mine)
    assert hashes(lm) == carried
    bench.checkout(newest)
    assert hashes(lm) != carried and bench.commit(some_delta(lm, 5)).state == "active"


# Between a file's opening and the `with` that closes it a signal can still land: Python then closes the file itself, and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_real_ctrl_c_in_the_middle(lm: LanguageModel, bench: Workbench) -> None:
    """A SIGINT from a timer lands at moments nobody chose."""
    moments, before, interrupted, landed = moments_of(lm), hashes(lm), 0, []

    def interrupt(*_: object) -> None:
        landed.append(True)
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for step in range(12):
            landed.clear()
            signal.setitimer(signal.ITIMER_REAL, 0.01 + 0.015 * step)
            try:
                bench.apply(FACT, config=QUICK, moments=moments, contexts=["{}"], force=True)
            except (
                KeyboardInterrupt,
                IndexError,
            ):  # torch makes its own error of one that lands while it reads an index
                assert landed
                interrupted += 1
                # Nothing, or all of it where the record was made at that moment.
                assert (hashes(lm) == before) == (bench.log() == []) and torch.is_grad_enabled()
                assert len(bench.verify().checks) == len(bench.log()) * 3, (
                    "and the workbench knows which"
                )
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if bench.log():
                bench.ledger.verify()
                break
    finally:
        signal.signal(signal.SIGALRM, old)
    assert interrupted


# ---- plan, propose, apply, verify ------------------------------------------------------------------------------------------------------


def test_plan_says_what_the_model_says(lm: LanguageModel, bench: Workbench) -> None:
    before = hashes(lm)
    said = lm.answer([FACT.text])[0]
    known = Fact(FACT.subject, FACT.prompt, said.split()[0] if said.split() else said)
    found = bench.plan([FACT, known])
    assert [entry.answer.startswith(said) for entry in found.entries] == [True, True]
    assert found.entries[0].probability == pytest.approx(
        float(lm.log_prob([FACT.text], ["English"]).exp()[0])
    )
    assert found.new == (FACT,) and found.known == (known,)
    assert hashes(lm) == before and bench.log() == []
    json.dumps(found.to_dict())


def test_bad_input_is_refused_and_nothing_is_written(lm: LanguageModel, bench: Workbench) -> None:
    before = hashes(lm)
    cases: list[tuple[type[FactsmithError], Callable[[], object]]] = [
        (InputError, lambda: bench.apply([])),
        (InputError, lambda: bench.apply("a string")),  # type: ignore[arg-type]
        (InputError, lambda: bench.apply(FACT, method="magic")),
        (LayerError, lambda: bench.apply(FACT, config=RomeConfig(layer=99))),
        (SubjectError, lambda: bench.apply(Fact("Edwin", "Edwin and {} are", "kings"))),
        (InputError, lambda: bench.apply(FACT, config=QUICK, contexts=["no slot"])),
        (InputError, lambda: bench.apply(FACT, config=QUICK, moments={2: moments_of(lm)[2]})),
    ]
    for error, call in cases:
        with pytest.raises(error):
            call()
        assert hashes(lm) == before and bench.log() == []


def test_what_is_known_is_not_written(lm: LanguageModel, bench: Workbench) -> None:
    said = lm.answer([FACT.text])[0]
    fact = Fact(FACT.subject, FACT.prompt, said)
    before = hashes(lm)
    outcome = bench.apply(fact)
    assert outcome.revision is None and outcome.delta is None and "already" in outcome.warnings[0]
    assert (
        hashes(lm) == before
        and bench.log() == []
        and not (bench.ledger.folder / "moments").exists()
    )
    forced = bench.apply(fact, config=QUICK, force=True)
    assert forced.revision is not None and not any(
        "already" in warning for warning in forced.warnings
    )
    assert hashes(lm) != before


def test_a_patch_that_does_not_hold_is_not_kept(lm: LanguageModel, bench: Workbench) -> None:
    before = lm.fingerprint
    weak = RomeConfig(layer=1, steps=1)  # no update at all: the target cannot have been reached
    outcome = bench.apply(FACT, config=weak, moments=moments_of(lm), contexts=["{}"])
    assert (
        outcome.proposal.failed
        and outcome.revision is None
        and "did not take" in " ".join(outcome.warnings)
    )
    assert bench.log() == [] and lm.fingerprint == before
    forced = bench.apply(FACT, config=weak, moments=moments_of(lm), contexts=["{}"], force=True)
    assert forced.revision is not None and forced.revision.report["efficacy"] == 0.0


def test_apply_records_what_was_done(lm: LanguageModel, bench: Workbench) -> None:
    moments = moments_of(lm)
    outcome = bench.apply(
        FACT,
        config=QUICK,
        moments=moments,
        contexts=["{}", "Well. {}"],
        message="as asked",
        force=True,
    )
    revision = outcome.revision
    assert revision is not None and outcome.delta is not None and outcome.verification is not None
    assert (revision.message, revision.method, revision.layers, revision.facts) == (
        "as asked",
        "rome",
        (1,),
        (FACT,),
    )
    assert revision.config["contexts"] == ["{}", "Well. {}"] and revision.config["steps"] == 3
    assert revision.moments == hashlib.sha256(moments[1].matrix.numpy().tobytes()).hexdigest()
    assert revision.report["checks"] == outcome.verification.to_dict()["checks"]
    stored = Delta.load(bench.ledger.delta_folder(revision))
    assert torch.equal(stored.dense(1), outcome.delta.dense(1))
    assert [check.role for check in outcome.verification.checks] == [
        "prompt",
        "paraphrase",
        "neighbour",
    ]
    json.dumps(outcome.to_dict()), json.dumps(bench.status().to_dict())


def test_verification_is_what_a_plain_question_gives(lm: LanguageModel) -> None:
    found = proposed(lm, FACT, config=QUICK, moments=moments_of(lm), contexts=["{}"])
    assert found.delta is not None and found.verification is not None
    for check in found.verification.checks:
        assert check.before == lm.answer([check.prompt])[0]
        assert check.p_before == pytest.approx(
            float(lm.log_prob([check.prompt], [check.wanted]).exp()[0]), rel=1e-4
        )
        with applied(lm, found.delta):
            assert check.after == lm.answer([check.prompt])[0]
            assert check.p_after == pytest.approx(
                float(lm.log_prob([check.prompt], [check.wanted]).exp()[0]), rel=1e-4
            )


def test_how_much_ordinary_text_is_disturbed(lm: LanguageModel) -> None:
    """Against the layer's outputs at every token of the text, by hooks; a change of a quarter of them is warned of."""
    moments = moments_of(lm)
    found = proposed(lm, FACT, config=QUICK, moments=moments, contexts=["{}"])
    assert found.delta is not None

    def outputs() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = lm.ffn[1].down.register_forward_hook(
            lambda m, args, out: seen.append(out[0] - m.bias)
        )
        with torch.no_grad():
            for text in TEXTS:
                lm.module(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]]))
        handle.remove()
        return torch.cat(seen)

    plain = outputs()
    with applied(lm, found.delta):
        expected = float((outputs() - plain).norm() / plain.norm())
    assert found.disturbance == {1: pytest.approx(expected, rel=1e-3)} and 0 < expected < 0.25
    assert found.to_dict()["disturbance"] == {"1": found.disturbance[1]} and not any(
        "broken" in w for w in found.warnings
    )
    far = dataclasses.replace(QUICK, lr=50.0, clamp=100.0, stop_loss=0.0)
    broken = proposed(lm, FACT, config=far, moments=moments, contexts=["{}"])
    assert broken.disturbance[1] > 0.25 and any(
        "the model may be broken" in warning for warning in broken.warnings
    )


def test_facts_with_one_key_and_two_targets_are_said(lm: LanguageModel) -> None:
    """A key does not see what follows the subject."""
    facts = [Fact("Edwin", "{} is a", "king"), Fact("Edwin", "{} plays", "basketball")]
    for method, kind in (("rome", QUICK), ("memit", MemitConfig((1,), steps=3))):
        found = proposed(lm, facts, method, kind, moments={1: moments_of(lm)[1]}, contexts=["{}"])
        (warning,) = [w for w in found.warnings if "nearly the key" in w]
        assert (
            "'Edwin is a'" in warning and "'Edwin plays'" in warning and "cosine 1.000" in warning
        )
        found = proposed(
            lm, [facts[0], FACT], method, kind, moments={1: moments_of(lm)[1]}, contexts=["{}"]
        )
        assert not any("nearly the key" in w for w in found.warnings)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_model_of_experts_is_refused_before_any_work(tmp_path: Path, method: str) -> None:
    lm = wrap(
        tiny_model("mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
        byte_tokenizer(bos=True),
    )
    before, seen = hashes(lm), []
    with Workbench(lm, tmp_path) as bench:
        files = sorted(path.name for path in tmp_path.rglob("*"))
        for config in (None, METHODS[method].config().at([1])):
            with pytest.raises(UnsupportedModelError, match="take a model without experts"):
                bench.apply(FACT, method, config, progress=lambda *told: seen.append(told))
        with pytest.raises(UnsupportedModelError, match="take a model without experts"):
            bench.recommend_layers()
        assert (
            bench.log() == []
            and seen == []
            and files == sorted(path.name for path in tmp_path.rglob("*"))
        )
    assert hashes(lm) == before


@pytest.mark.parametrize("method", list(METHODS))
def test_a_chat_template_is_asked_through_the_workbench(tmp_path: Path, method: str) -> None:
    """An instruct model is edited, without being told, for the way it is used: the prompt as a user's message too."""
    lm = wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    lm.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    fact = Fact("LeBron James", "It is played by {}", "basketball")
    asked = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": fact.text}], tokenize=False, add_generation_prompt=True
    )
    kind = METHODS[method].config
    config = dataclasses.replace(kind.recommended(lm), steps=30, lr=0.1, clamp=20.0).at([0])
    with Workbench(lm, tmp_path) as bench:
        assert bench.plan(fact).new == (fact,)

        def probability() -> float:
            ids = lm.tokenizer(asked.removeprefix("<|begin|>") + " basketball")["input_ids"]
            first = len(lm.tokenizer(asked.removeprefix("<|begin|>"))["input_ids"])
            with torch.no_grad():
                log_p = lm.module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            return sum(float(log_p[i - 1, ids[i]]) for i in range(first, len(ids)))

        before = probability()
        outcome = bench.apply(fact, method, config, texts=TEXTS, force=True)
        assert outcome.revision is not None
        assert (
            outcome.revision.config["contexts"][-1] == "[user] {}\n[assistant]"
            and outcome.verification is not None
        )
        (chat,) = (check for check in outcome.verification.checks if check.role == "chat")
        assert chat.prompt == f"[user] {fact.text}\n[assistant]" and chat.wanted == "basketball"
        assert (
            any("in the chat template" in warning for warning in outcome.warnings) is not chat.held
        )
        assert probability() > before + 1
    assert probability() == before


def test_a_neighbour_must_stay_as_it_is(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected or not, what counts is the answer before; an answer counts up to its first punctuation."""
    answers = iter(
        [
            "?",
            "x|x|France, of course|France, of course|France, of course|",
            "x|x|France. Not Spain|France is|Francesca|",
        ]
    )
    monkeypatch.setattr(
        lm,
        "answer",
        lambda prompts, max_new_tokens: (next(answers) + "|" * 9).split("|")[: len(prompts)],
    )
    fact = Fact(
        "Edwin",
        "{} is a",
        "king",
        paraphrases=("{} was a",),
        neighbours=(Probe("a", "France"), Probe("b", "Atlantis"), Probe("c")),
    )
    found = proposed(lm, fact, config=QUICK, moments=moments_of(lm), contexts=["{}"])
    assert found.verification is not None
    neighbours = [check for check in found.verification.checks if check.role == "neighbour"]
    assert [check.wanted for check in neighbours] == ["France"] * 3
    assert [check.held for check in neighbours] == [True, True, False]
    assert (
        found.verification.specificity == pytest.approx(2 / 3)
        and found.verification.efficacy == 0.0
    )
    assert found.warnings == ("the patch did not take: 'Edwin is a' is answered 'x', not 'king'",)


def test_an_answer_that_ends_at_once_must_stay_so(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([["x"], ["x", "", ""], ["x", "", "y"]])
    monkeypatch.setattr(lm, "answer", lambda prompts, max_new_tokens: next(answers))
    found = proposed(
        lm,
        Fact("Edwin", "{} is a", "king", neighbours=("a", "b")),
        config=QUICK,
        moments=moments_of(lm),
        contexts=["{}"],
    )
    assert found.verification is not None
    assert [(c.held, c.p_before) for c in found.verification.checks if c.role == "neighbour"] == [
        (True, None),
        (False, None),
    ]


def test_earlier_patches_are_asked_again(lm: LanguageModel, bench: Workbench) -> None:
    moments = moments_of(lm)
    slight = dataclasses.replace(QUICK, clamp=1e-6)  # nothing takes, and nothing is lost
    options: dict[str, Any] = {
        "config": slight,
        "moments": moments,
        "contexts": ["{}"],
        "force": True,
    }
    (said,) = lm.answer(["Rome is the capital of"])
    holds = Fact("Rome", "{} is the capital of", said)  # written by force, though the model says it
    bench.apply(holds, **options)
    bench.apply(
        FACT, **options
    )  # does not take: what never held cannot be lost, and is not asked again
    asked = bench.apply(Fact("Paris", "{} is the capital of", "Spain"), **options).verification
    assert asked is not None and lm.answer([FACT.text])[0].strip() != "Finnish"
    assert [check.prompt for check in asked.checks if check.role == "earlier"] == [holds.text]
    again = bench.apply(Fact(FACT.subject, FACT.prompt, "Spanish"), **options)
    assert again.verification is not None
    assert [check.prompt for check in again.verification.checks if check.role == "earlier"] == [
        holds.text
    ]
    now = hashes(lm)
    checks = bench.verify().checks
    assert hashes(lm) == now
    assert {check.prompt: check.wanted for check in checks if check.role == "prompt"} == {
        holds.text: said.strip(),
        FACT.text: "Spanish",
        "Paris is the capital of": "Spain",
    }
    bench.checkout(BASE)
    prompts, wanted = [check.prompt for check in checks], [check.wanted for check in checks]
    assert [check.before for check in checks] == lm.answer(
        prompts, max_new_tokens=answer_tokens(lm, prompts, wanted)
    )


def test_second_moments_are_the_base_models_and_are_kept(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = moments_of(lm)[1].matrix
    bench.commit(some_delta(lm, 1, (0,)))  # changes what layer 1 sees
    assert not torch.allclose(moments_of(lm)[1].matrix, expected)
    outcome = bench.apply(FACT, config=QUICK, texts=TEXTS, contexts=["{}"], force=True)
    assert (
        outcome.revision is not None
        and outcome.revision.moments == hashlib.sha256(expected.numpy().tobytes()).hexdigest()
    )
    kept = SecondMoment.load(bench.ledger.folder / "moments" / "layer1.safetensors")
    assert torch.equal(kept.matrix, expected)
    monkeypatch.setattr(
        "factsmith.corpus.moments_store.second_moments", None
    )  # the next patch reads them
    again = bench.apply(Fact("Edwin", "{} is a", "king"), config=QUICK, contexts=["{}"], force=True)
    assert again.revision is not None and again.revision.moments == outcome.revision.moments


def test_gradients_may_be_off_around_it(lm: LanguageModel) -> None:
    moments = moments_of(lm)
    expected = proposed(lm, FACT, config=QUICK, moments=moments, contexts=["{}"]).delta
    with torch.no_grad():
        found = proposed(lm, FACT, config=QUICK, moments=moments, contexts=["{}"]).delta
        assert not torch.is_grad_enabled()
    assert (
        found is not None
        and expected is not None
        and torch.equal(found.dense(1), expected.dense(1))
    )


def test_plan_and_propose_need_no_workspace(lm: LanguageModel) -> None:
    before = hashes(lm)
    assert plan(Scratch(lm), FACT).new == (FACT,)
    seen: list[str] = []
    found = proposed(lm, FACT, config=QUICK, progress=lambda what, done, total: seen.append(what))
    assert found.delta is not None and hashes(lm) == before
    assert list(dict.fromkeys(seen)) == [
        "planning",
        "sampling text",
        "second moments",
        "solving",
        "facts",
        "verifying",
    ]


# ---- which layer -----------------------------------------------------------------------------------------------------------------------

ASKED: dict[str, Any] = {"texts": TEXTS, "contexts": ["{}"]}


@pytest.fixture
def eager(lm: LanguageModel) -> LanguageModel:
    """Settings with which a random model takes an easy edit, and no layer."""
    lm.config.factsmith = {"rome": {"scale": "auto", "steps": 40}}
    return lm


EASY = Fact("Edwin", "{}", " Paris")


def test_recommended_layers_are_kept_in_the_workspace(
    eager: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashes(eager)
    first = bench.recommend_layers([EASY], **ASKED)
    assert (
        first.source == "trials"
        and first.fingerprint == eager.fingerprint
        and hashes(eager) == before
    )
    kept = json.loads((bench.ledger.folder / "layers.json").read_text())
    assert kept["rome"] == first.rome and kept["source"] == "trials"
    moment = SecondMoment.load(bench.ledger.folder / "moments" / f"layer{first.rome}.safetensors")
    assert torch.equal(moment.matrix, moments_of(eager)[first.rome].matrix)
    assert len(list((bench.ledger.folder / "moments").iterdir())) == 1, (
        "those of the losers are not kept"
    )

    monkeypatch.setattr("factsmith.keep.bench.measure_layers", None)  # from here on nothing may be measured
    again = bench.recommend_layers()
    assert (again.source, again.rome, again.memit, again.scores) == (
        "workspace",
        first.rome,
        first.memit,
        first.scores,
    )
    assert bench.recommend_layers(trials=1) == again
    for different in ({"trials": 2}, {"facts": [EASY]}, {"refresh": True}):
        with pytest.raises(TypeError):
            bench.recommend_layers(**different)


def test_a_patch_without_a_layer_uses_what_is_kept(eager: LanguageModel, bench: Workbench) -> None:
    bench.recommend_layers([EASY], **ASKED)
    path = bench.ledger.folder / "layers.json"
    fields = json.loads(path.read_text())
    for layer in (2, 0):
        path.write_text(json.dumps({**fields, "rome": layer, "memit": [layer]}))
        found = bench.propose(FACT, **ASKED)
        assert (
            found.delta is not None
            and found.layers is not None
            and sorted(found.delta.layers) == [layer]
        )
        assert found.layers.source == "workspace" and found.to_dict()["layers"]["rome"] == layer
        assert not any("no layer was given" in warning for warning in found.warnings)
    eager.config.factsmith = {"rome": {"layer": 1, "steps": 2}}
    assert bench.propose(FACT, **ASKED).layers.rome == 0, (
        "what is kept goes before what came with the model"
    )  # type: ignore[union-attr]
    named = bench.propose(FACT, config=QUICK, **ASKED)
    assert named.layers is None and named.delta is not None and sorted(named.delta.layers) == [1], (
        "and a named layer before all"
    )
    path.unlink()
    shipped = bench.propose(FACT, **ASKED)
    assert shipped.layers is not None and (shipped.layers.source, shipped.layers.rome) == (
        "model",
        1,
    )
    brought = bench.propose(FACT, moments={2: moments_of(eager)[2]}, contexts=["{}"])
    assert (
        brought.layers is None and brought.delta is not None and sorted(brought.delta.layers) == [2]
    )
    assert "recommended layer 1: layer 2 is edited" in brought.warnings[0]
    every = bench.propose(FACT, moments=moments_of(eager), contexts=["{}"])
    assert every.delta is not None and sorted(every.delta.layers) == [1] and every.plan.advice == (), (
        "the recommended, where it has moments"
    )


def test_a_choice_for_another_model_is_passed_over(eager: LanguageModel, bench: Workbench) -> None:
    first = bench.recommend_layers([EASY], **ASKED)
    path = bench.ledger.folder / "layers.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "fingerprint": "00" * 32, "rome": 99, "memit": [99]}))
    found = bench.propose(FACT, **ASKED)
    assert found.layers is not None and found.layers.source == "depth"
    assert bench.recommend_layers([EASY], **ASKED) == first
    assert json.loads(path.read_text()) == fields, "and written over"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 2}',
        '{"format": 1}',
        '{"format": 1, "rome": "first"}',
        "\x00",
        "[" * 99999,
    ],
)
def test_a_damaged_choice_is_refused_in_words(
    lm: LanguageModel, bench: Workbench, text: str
) -> None:
    path = bench.ledger.folder / "layers.json"
    path.write_text(text)
    before = hashes(lm)
    for call in (
        lambda: bench.propose(FACT, **ASKED),
        lambda: bench.apply(FACT, **ASKED),
        lambda: bench.recommend_layers(),
    ):
        with pytest.raises(DamagedError, match="delete it"):
            call()
    assert hashes(lm) == before and bench.log() == [] and path.read_text() == text
    assert bench.propose(FACT, config=QUICK, **ASKED).delta is not None, (
        "a named layer does not need it"
    )
    assert bench.recommend_layers(refresh=True).source == "depth"


def test_a_kept_layer_that_the_model_does_not_have_is_refused(
    eager: LanguageModel, bench: Workbench
) -> None:
    bench.recommend_layers([EASY], **ASKED)
    path = bench.ledger.folder / "layers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rome": 3}))
    with pytest.raises(DamagedError, match="does not have"):
        bench.propose(FACT, **ASKED)


def test_a_model_that_knows_nothing_falls_back_and_says_so(
    lm: LanguageModel, bench: Workbench
) -> None:
    asked: list[str] = []
    found = bench.propose(FACT, progress=lambda what, done, total: asked.append(what), **ASKED)
    assert found.layers is not None and (found.layers.source, found.layers.rome) == ("depth", 0)
    assert found.delta is not None and sorted(found.delta.layers) == [0]
    assert any(
        "no layer was given" in warning and "knows 0 of the bundled facts" in warning
        for warning in found.warnings
    )
    assert found.to_dict()["layers"] == {
        "rome": 0,
        "source": "depth",
        "reason": found.layers.reason,
    }
    assert (
        not (bench.ledger.folder / "layers.json").exists()
        and "looking for facts that the model knows" in asked
    )
    alone = proposed(lm, FACT, **ASKED)
    assert alone.layers == found.layers and alone.warnings == found.warnings


def test_a_layer_measured_for_a_patch_is_said_and_kept(
    eager: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommend, "trial_facts", lambda lm, count, seed: [EASY] * 6)
    found = bench.propose(FACT, texts=iter(TEXTS), contexts=["{}"])
    assert found.layers is not None and found.layers.source == "trials" and found.layers.trials == 6
    assert found.delta is not None and sorted(found.delta.layers) == [found.layers.rome]
    assert any(
        "no layer was given" in warning and "trial edits" in warning for warning in found.warnings
    )
    assert found.layers.quick and sum(score.trials for score in found.layers.scores) <= 30
    assert not bench.recommend_layers([EASY], **ASKED).quick, (
        "who asks for the layers gets the thorough measurement"
    )
    (bench.ledger.folder / "layers.json").write_text(
        json.dumps({"format": 1, **found.layers.to_dict()})
    )
    again = bench.propose(FACT, **ASKED)
    assert again.layers is not None and (again.layers.source, again.layers.rome) == (
        "workspace",
        found.layers.rome,
    )


def test_layers_are_measured_on_the_base_weights(eager: LanguageModel, bench: Workbench) -> None:
    expected = bench.recommend_layers([EASY], **ASKED)
    bench.commit(some_delta(eager, 1, (0, 1, 2), scale=0.5))
    patched = hashes(eager)
    assert bench.recommend_layers([EASY], **ASKED) == expected and hashes(eager) == patched


def test_second_moments_too_large_to_hold_are_computed_again(
    eager: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [
        dataclasses.replace(EASY, subject=name) for name in ("Edwin", "Paris", "LeBron", "Anaal")
    ]
    expected = recommend.recommend_layers(eager, facts, **ASKED)
    assert len(expected.scores) == 3
    monkeypatch.setattr(recommend, "_MOMENT_BYTES", 1)
    assert recommend.recommend_layers(eager, facts, **ASKED) == expected


# ---- a real model ----------------------------------------------------------------------------------------------------------------------


def test_a_real_fact_is_patched_and_taken_back(tmp_path: Path) -> None:
    golden = shared_dir() / "golden"
    if not golden.is_dir():
        pytest.skip("no golden model beside the checkout")
    lm = load(golden / "facts-gpt2")
    requests = json.loads((golden / "rome.json").read_text())["requests"]
    base = hashes(lm)
    neighbours = [r["prompt"].replace("{}", r["subject"]) for r in requests[1:]]
    fact = Fact(
        requests[0]["subject"],
        requests[0]["prompt"],
        requests[0]["target_new"]["str"],
        neighbours=tuple(neighbours),
    )
    kept = load_file(golden / "second_moment.safetensors")
    moments = {1: SecondMoment.from_matrix(kept["layer1"], count=int(kept["layer1.count"]))}
    with Workbench(lm, tmp_path) as bench:
        outcome = bench.apply(fact, moments=moments)
        proof = outcome.verification
        assert proof is not None and (proof.efficacy, proof.specificity) == (1.0, 1.0)
        assert lm.answer([fact.text])[0].startswith("Serbian")
        patched = hashes(lm)
        assert sum(patched[name] != base[name] for name in base) == 1
        bench.revert(LATEST)
        assert hashes(lm) == base and lm.answer([fact.text])[0].startswith("French")


# ---- facts as code, on a model that knows some -----------------------------------------------------------------------------------------

FIAT = Fact(
    "Fiat 127", "The maker of {} is", "Toyota", neighbours=["The maker of Nokia Lumia 900 is"]
)
DARRIEUX = Fact(
    "Danielle Darrieux",
    "The mother tongue of {} is",
    "English",
    neighbours=["The mother tongue of Léon Blum is"],
)


@pytest.fixture
def known(tmp_path: Path) -> Iterator[Workbench]:
    with Workbench(load("atlas"), tmp_path / "space") as opened:
        yield opened


def other(fact: Fact, **changes: Any) -> Fact:
    return Fact.from_dict(fact.to_dict() | changes)


def test_what_a_newer_patch_replaced_is_not_asked_of_later_ones(known: Workbench) -> None:
    known.apply(FIAT)
    assert known.plan(other(FIAT, target="Honda")).entries[0].standing == "changed"
    assert known.apply(other(FIAT, target="Honda")).revision is not None
    outcome = known.apply(DARRIEUX)
    assert outcome.revision is not None and outcome.verification is not None
    earlier = {
        check.prompt: check.wanted
        for check in outcome.verification.checks
        if check.role == "earlier"
    }
    assert earlier == {FIAT.text: "Honda"}
    in_other_words = known.plan(
        Fact("Fiat 127", "{} is made by", "Honda")
    )  # agrees with what is in effect, not with what was
    assert not in_other_words.conflicts
    control = known.plan(Fact("Fiat 127", "{} is made by", "Toyota"))
    assert control.conflicts and "Honda" in control.entries[0].because


def test_what_the_model_says_already_is_asked_with_the_rest(known: Workbench) -> None:
    """Two ways to say one fact, of which the model says one already: writing the other takes it away, and that is seen."""
    kept = Fact(
        "Fiat 127", "Everybody knows that the maker of {} is", "Fiat", neighbours=FIAT.neighbours
    )
    asked = known.plan([FIAT, kept])
    assert [entry.standing for entry in asked.entries] == ["new", "known"]
    outcome = known.apply([FIAT, kept], gates=Gates(paraphrases=None, kl_text=None))
    assert outcome.revision is None and known.log() == []
    assert any(kept.text in why for why in outcome.failures) and any(
        "already said" in why for why in outcome.warnings
    )
    forced = known.apply(
        [FIAT, DARRIEUX], "memit", gates=Gates(paraphrases=None, kl_text=None)
    )  # control: nothing is lost
    assert forced.revision is not None and not forced.forced


def test_a_conflict_is_refused_in_python_too_and_recorded_when_forced(known: Workbench) -> None:
    first = known.apply(FIAT).revision
    assert first is not None
    against = Fact("Fiat 127", "{} is made by", "Honda")
    refused = known.apply(against)
    assert refused.revision is None and refused.delta is None and len(known.log()) == 1
    assert refused.failures[0].startswith("conflict") and first.id[:10] in refused.failures[0]
    forced = known.apply(against, force=True)
    assert forced.forced and forced.revision is not None
    assert forced.revision.report["forced"] and "Toyota" in forced.revision.report["conflicts"][0]


def test_what_the_model_says_already_can_be_a_conflict(lm: LanguageModel) -> None:
    """It would be taken from the one that is in effect; its key alone is no conflict, since it holds beside the other as it is."""
    held = [("0a8b has", Fact("Lumia", "The maker of {} is", "Samsung", relation="maker"))]

    def place(target: str, **fields: Any) -> tuple[str, str]:
        (found,) = compare_facts(
            lm, [Fact("Lumia", "{} comes out of", target, **fields)], held, (), {}, [True]
        )
        return found.standing, found.because

    assert place("Nokia", relation="maker") == (
        "conflict",
        "0a8b has The maker of Lumia is → Samsung",
    )
    assert place("Samsung", relation="maker") == ("known", "") and place("Nokia") == ("known", "")
    one_key = [Fact("Lumia", "{} is in", "Oslo"), Fact("Lumia", "{} is by", "Rome")]
    assert [p.standing for p in compare_facts(lm, one_key, [], (1,), {}, [True, True])] == [
        "known",
        "known",
    ]
    assert [p.standing for p in compare_facts(lm, one_key, [], (1,), {}, [False, False])] == ["conflict", "conflict"]
    assert [p.standing for p in compare_facts(lm, one_key, [], (1,), {}, [True, False])] == [
        "known",
        "new",
    ]  # one is not written


def test_neighbours_are_of_the_relation_that_the_model_knows(known: Workbench) -> None:
    """The prompt is no bundled phrasing, but what the model says of the subject is a bundled fact."""
    fact = Fact("Danielle Darrieux", "It is well known that the mother tongue of {} is", "English")
    (done,) = known.completed(fact)
    french = {one.object for one in atlas.facts("P103")}
    assert done.neighbours and all(probe.expected in french for probe in done.neighbours)
    strange = known.apply(
        Fact("Fiat 127", "A thing about {} is that it likes", "tea"), gates=Gates(), force=True
    )
    assert any("the relation is not known" in note for note in strange.made)
    assert not known.apply(fact, gates=Gates(), force=True).made


def test_patches_are_taken_in_all_or_none(
    known: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known.apply(FIAT)
    known.apply(DARRIEUX)
    known.export(tmp_path / "out", format="patch")
    lm = known.lm
    known.close()
    with Workbench(lm, tmp_path / "theirs") as theirs:
        store, calls = Ledger._store, []

        def full(ledger: Ledger, write: Callable[[Path], object]) -> tuple[str, int]:
            calls.append(write)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return store(ledger, write)

        before = hashes(lm)
        with monkeypatch.context() as patching:
            patching.setattr(Ledger, "_store", full)
            with pytest.raises(WorkspaceError, match="nothing was recorded"):
                theirs.import_patches(tmp_path / "out")
        assert theirs.log() == [] and hashes(lm) == before and len(calls) == 2
        assert (
            len(theirs.import_patches(tmp_path / "out")) == 2
            and [r.state for r in theirs.log()] == ["active"] * 2
        )
    with Workbench(lm, tmp_path / "another") as another:
        another.apply(Fact("Fiat 127", "{} is made by", "Honda"))
        with pytest.raises(RevisionError, match="Honda"):  # the same question in other words
            another.import_patches(tmp_path / "out")
        assert len(another.log()) == 1
