"""Settings with some of them changed by name."""

from __future__ import annotations

import pytest

from factsmith.core.errors import InputError, LayerError
from factsmith.edit.configs import AlphaEditConfig, MemitConfig, RomeConfig
from factsmith.edit.settings import changed_settings
from factsmith.model.language_model import LanguageModel


def test_nothing_changed_is_nothing(tiny_gpt2: LanguageModel) -> None:
    for layers in (None, [], ()):
        assert changed_settings(tiny_gpt2, "memit", layers, {}) is None


def test_layers_stay_open_until_somebody_chooses_them(tiny_gpt2: LanguageModel) -> None:
    recommended = RomeConfig.recommended(tiny_gpt2)
    config = changed_settings(tiny_gpt2, "rome", None, {"lr": 0.3})
    assert isinstance(config, RomeConfig)
    assert (config.layer, config.lr, config.steps) == (None, 0.3, recommended.steps)
    assert changed_settings(tiny_gpt2, "rome", 2) == recommended.at([2])
    memit = MemitConfig.recommended(tiny_gpt2)
    assert changed_settings(tiny_gpt2, "memit", [1, 2]) == memit.at([1, 2])


def test_a_threshold_alone_unsets_the_energy(tiny_gpt2: LanguageModel) -> None:
    by_threshold, by_energy = (
        changed_settings(tiny_gpt2, "alphaedit", None, {name: 0.02})
        for name in ("threshold", "energy")
    )
    assert isinstance(by_threshold, AlphaEditConfig) and isinstance(by_energy, AlphaEditConfig)
    assert (by_threshold.threshold, by_threshold.energy) == (0.02, None)
    assert (by_energy.threshold, by_energy.energy) == (None, 0.02)


def test_a_setting_that_does_not_exist_is_refused(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(InputError, match="rome has no setting size; expected some of clamp, ") as e:
        changed_settings(tiny_gpt2, "rome", None, {"size": 3})
    assert e.value.argument is None
    for method, name in (("rome", "layer"), ("rome", "layers"), ("memit", "layers")):
        with pytest.raises(InputError, match=f"no setting {name}.* separately") as e:
            changed_settings(tiny_gpt2, method, None, {name: 1})
        assert e.value.argument == "layer" and "--" not in str(e.value)


@pytest.mark.parametrize("layers", ["1", 1.5, [1, "2"], [1.0], True])
def test_layers_that_are_not_numbers_are_refused(tiny_gpt2: LanguageModel, layers: object) -> None:
    with pytest.raises(LayerError, match="expected the numbers of layers") as refused:
        changed_settings(tiny_gpt2, "memit", layers)  # type: ignore[arg-type]
    assert refused.value.argument == "layer"


def test_published_settings_are_changed_only_for_the_models_that_have_some(
    tiny_gpt2: LanguageModel,
) -> None:
    with pytest.raises(InputError, match="no rome settings were published"):
        changed_settings(tiny_gpt2, "rome", None, {"lr": 0.1}, paper=True)
