"""Facts without paraphrases or neighbours get some."""

from __future__ import annotations

from factsmith import atlas
from factsmith.core.fact import Fact
from factsmith.core.gates import Gates
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel


def test_facts_without_questions_get_some(lm: LanguageModel, bench: Workbench) -> None:
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


def test_neighbours_are_of_the_relation_that_the_model_knows(atlas_bench: Workbench) -> None:
    """The model's answer reveals the relation, although the prompt is not a bundled phrasing."""
    fact = Fact("Danielle Darrieux", "It is well known that the mother tongue of {} is", "English")
    (done,) = atlas_bench.completed(fact)
    french = {one.object for one in atlas.facts("P103")}
    assert done.neighbours and all(probe.expected in french for probe in done.neighbours)
    strange = atlas_bench.apply(
        Fact("Fiat 127", "A thing about {} is that it likes", "tea"), gates=Gates(), force=True
    )
    assert any("the relation is not known" in note for note in strange.made)
    assert not atlas_bench.apply(fact, gates=Gates(), force=True).made
