"""The correction that the demonstration and the tour make."""

from __future__ import annotations

from factsmith import atlas
from factsmith.atlas.story import BELIEFS, MODEL, correction


def test_the_correction_is_a_whole_fact() -> None:
    fact = correction()
    assert (fact.subject, fact.target, fact.target_true) == ("Bulgaria", "euro", "lev")
    assert len(fact.paraphrases) == 6 and fact.prompt not in fact.paraphrases
    assert (fact.text, fact.target_true) == BELIEFS[0], "the first question is the corrected one"


def test_the_story_is_about_a_bundled_model() -> None:
    assert MODEL in atlas.names()
