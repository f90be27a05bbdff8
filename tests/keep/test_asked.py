"""All facts in effect are asked after a revert, a checkout and an import, also those of other
layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from factsmith.core.errors import NumericsError
from factsmith.core.fact import Fact
from factsmith.edit.configs import RomeConfig
from factsmith.keep.asked import compare, held_when_kept
from factsmith.keep.ledger import BASE, LATEST
from factsmith.keep.revision import Revision
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.patch.proof import ask
from workbenches import THREE, hashes, moments_of, some_delta

BELOW = Fact("Danielle Darrieux", "The mother tongue of {} is", "English")
ABOVE = Fact("Danielle Darrieux", "{} was born in", "Rome")
FIAT = Fact("Fiat 127", "The maker of {} is", "Toyota")
PRODUCED = Fact("Fiat 127", "{} is produced by", "Honda")


@pytest.fixture(scope="module")
def atlas() -> LanguageModel:
    return load("atlas")


@pytest.fixture
def on_atlas(atlas: LanguageModel, tmp_path: Path) -> Iterator[Workbench]:
    with Workbench(atlas, tmp_path / "space") as opened:
        yield opened


def stacked(bench: Workbench, below: Fact, above: Fact) -> tuple[Revision, Revision]:
    """Write one fact into layer 0 and another one, about the same subject, into layer 1."""
    revisions = []
    for layer, fact in enumerate((below, above)):
        kept = bench.apply(fact, config=RomeConfig(layer=layer), force=True).revision
        assert kept is not None
        revisions.append(kept)
    return revisions[0], revisions[1]


def says(lm: LanguageModel, fact: Fact) -> bool:
    return ask(lm, [fact]).checks[0].held


def test_a_patch_of_another_layer_is_solved_again(on_atlas: Workbench) -> None:
    lm, (one, two) = on_atlas.lm, stacked(on_atlas, BELOW, ABOVE)
    assert says(lm, ABOVE)
    with on_atlas._carried.exactly([on_atlas._carried.deltas[two.id]]):
        assert not says(lm, ABOVE), "unchanged, the patch above would be lost"
    undo = on_atlas.revert(one.id)
    assert says(lm, ABOVE) and not says(lm, BELOW)
    assert undo.report["asked"] == 1 and undo.report["lost"] == []
    assert undo.report["solved_again"] == [two.id] and "forced" not in undo.report
    (left,) = on_atlas.ledger.active()
    assert left.carried != two.delta
    state = hashes(lm)
    on_atlas.checkout(two.id)
    assert says(lm, ABOVE) and on_atlas.ledger.active()[1].carried == two.delta
    on_atlas.checkout(LATEST)
    assert hashes(lm) == state, "a checkout restores and solves nothing again"
    assert (
        on_atlas.asked is not None and on_atlas.asked.in_words == "1 fact in effect asked, all hold"
    )
    on_atlas.rebuild()


def test_a_fact_of_another_layer_that_cannot_be_kept_refuses_the_revert(
    on_atlas: Workbench,
) -> None:
    lm, (one, two) = on_atlas.lm, stacked(on_atlas, FIAT, PRODUCED)
    state = hashes(lm)
    with pytest.raises(NumericsError, match=r"lose 1 fact .* solved again: 'Fiat 127 is produced"):
        on_atlas.revert(one.id)
    assert hashes(lm) == state and on_atlas.log()[0].id == two.id, "nothing was recorded"
    undo = on_atlas.revert(one.id, force=True)
    assert undo.report["forced"] is True and "'Honda'" in undo.report["lost"][0]
    assert len(on_atlas.compared(on_atlas.verify()).accepted) == 1, "lost, and known to be"
    on_atlas.revert(LATEST)
    assert hashes(lm) == state, "the state before the newest revision comes back unchanged"


def test_a_revert_of_the_newest_patch_asks_what_stays(on_atlas: Workbench) -> None:
    lm, (_, two) = on_atlas.lm, stacked(on_atlas, BELOW, FIAT)
    undo = on_atlas.revert(two.id)
    (check,) = undo.report["checks"]
    assert (check["prompt"], check["held"]) == (BELOW.text, True)
    assert undo.report["asked"] == 1 and undo.report["solved_again"] == []
    back = on_atlas.revert(undo.id)
    assert back.report["asked"] == 2 and says(lm, FIAT) and says(lm, BELOW)
    on_atlas.checkout(BASE)
    assert on_atlas.asked is not None and on_atlas.asked.proof.checks == ()
    assert "no fact" in on_atlas.asked.in_words


def test_a_checkout_names_what_was_lost(bench: Workbench, lm: LanguageModel) -> None:
    """A record says that a fact held; the weights of that revision do not say it."""
    report = {"checks": [dict(vars(ask(lm, [Fact("a", "{} is", "x")]).checks[0]), held=True)]}
    one = bench.commit(some_delta(lm, 1), report)
    assert one.facts[0].text == "subject 1 is"
    bench.commit(some_delta(lm, 2))
    bench.checkout(one.id)
    assert bench.asked is not None and not bench.asked.lost, "of this fact nothing is recorded"
    assert len(bench.asked.unknown) == 1 and "do not hold" in bench.asked.in_words
    report["checks"][0] |= {"prompt": "subject 3 is"}
    three = some_delta_on_latest(bench, 3, report)
    bench.checkout(BASE)
    with pytest.warns(UserWarning, match="1 lost: 'subject 3 is' is answered"):
        bench.checkout(three.id)


def some_delta_on_latest(bench: Workbench, seed: int, report: dict[str, object]) -> Revision:
    bench.checkout(LATEST)
    return bench.commit(some_delta(bench.lm, seed), report)


def test_what_was_accepted_is_no_loss(bench: Workbench, lm: LanguageModel) -> None:
    moments = moments_of(lm)
    kept = bench.apply(
        THREE[:2], "rome", RomeConfig(layer=1, steps=1), moments=moments, force=True
    ).revision
    assert kept is not None
    held = held_when_kept(bench.log())
    proof = ask(lm, THREE[:2])
    failed = proof.failed()
    assert failed, "one step of search is too little for a random model"
    asked = compare(proof, held)
    assert asked.accepted == tuple(failed) and not asked.lost and not asked.unknown
    lied = dict.fromkeys(held, True)
    assert compare(proof, lied).lost == tuple(failed)
    assert compare(proof, {}).unknown == tuple(failed)
    bench.checkout(BASE)
    assert held_when_kept(bench.log()) == {}, "later revisions do not count"
