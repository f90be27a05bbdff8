from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from factsmith.core.errors import InputError
from factsmith.edit.methods import METHODS
from factsmith.edit.published import PUBLISHED, published


def of_shape(model_type: str, n_layers: int, d_model: int) -> Any:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(model_type=model_type))
    return SimpleNamespace(config=config, n_layers=n_layers, d_model=d_model, name="a model")


@pytest.mark.parametrize(
    ("method", "shape"), [(method, shape) for method, table in PUBLISHED.items() for shape in table]
)
def test_every_preset_is_a_valid_setting_of_its_model(
    method: str, shape: tuple[str, int, int]
) -> None:
    config, source = published(of_shape(*shape), method)
    assert isinstance(config, METHODS[method].config) and config.scale == "paper" and source
    assert config.edited and max(config.edited) < shape[1] / 2


def test_the_papers_values() -> None:
    rome, _ = published(of_shape("gpt2", 48, 1600), "rome")
    assert (rome.layer, rome.clamp, rome.weight_decay) == (17, 4.0, 0.5)  # type: ignore[attr-defined]
    assert published(of_shape("gpt2", 48, 1600), "r-rome")[0] == rome
    memit, _ = published(of_shape("gptj", 28, 4096), "memit")
    assert (memit.layers, memit.moment_weight, memit.clamp, memit.steps) == (
        (3, 4, 5, 6, 7, 8),
        15_000,
        0.75,
        25,
    )  # type: ignore[attr-defined]


def test_another_shape_has_none() -> None:
    with pytest.raises(InputError, match="only for gpt2 of 24 x 1024"):
        published(of_shape("gpt2", 12, 768), "rome")
    with pytest.raises(InputError, match="no method"):
        published(of_shape("gpt2", 12, 768), "magic")
