"""Which method, settings and layers a recipe stands for, and what overrules a fact file."""

from __future__ import annotations

import pytest

from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.core.factfile import FactSheet
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.model.language_model import LanguageModel
from factsmith.patch.recipe import Recipe

FACTS = (Fact("Edwin", "{} is a", "king"), Fact("Paris", "{} is in", "France"))
SHEET = FactSheet(facts=FACTS, method="memit", settings={"steps": 7, "layers": (0, 1)})


def test_a_file_names_method_settings_and_layers(tiny_lm: LanguageModel) -> None:
    recipe = Recipe.for_sheet(SHEET)
    config = recipe.config_for(tiny_lm, FACTS)
    assert recipe.method_for(FACTS) == "memit"
    assert isinstance(config, MemitConfig) and (config.steps, config.edited) == (7, (0, 1))


def test_what_is_given_overrules_the_file_one_setting_at_a_time(tiny_lm: LanguageModel) -> None:
    config = Recipe.for_sheet(SHEET, changes={"lr": 0.25}, layers=(1,)).config_for(tiny_lm, FACTS)
    assert isinstance(config, MemitConfig)
    assert (config.steps, config.lr, config.edited) == (7, 0.25, (1,))


def test_settings_of_a_file_count_for_its_own_method_only(tiny_lm: LanguageModel) -> None:
    config = Recipe.for_sheet(SHEET, "rome").config_for(tiny_lm, FACTS)
    assert isinstance(config, RomeConfig)
    assert config.steps == RomeConfig.recommended(tiny_lm).steps != 7
    anyones = FactSheet(facts=FACTS, settings={"steps": 7})
    assert Recipe.for_sheet(anyones, "rome").config_for(tiny_lm, FACTS).steps == 7


def test_one_fact_is_written_by_rome_and_several_by_memit() -> None:
    assert Recipe().method_for(FACTS[:1]) == "rome"
    assert Recipe().method_for(FACTS) == "memit"
    assert Recipe(config=RomeConfig(layer=1)).method_for(FACTS) == "rome"


def test_unknown_methods_and_settings_are_refused(tiny_lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="no method 'romee'; expected one of rome"):
        Recipe("romee")
    with pytest.raises(InputError, match="stepz"):
        Recipe.of("rome", stepz=3).config_for(tiny_lm, FACTS)
