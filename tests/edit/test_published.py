"""Published layers and settings go by a model's shape, and one row answers both questions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig

from factsmith.core.errors import InputError
from factsmith.edit.configs import MemitConfig, RomeConfig, SpreadConfig
from factsmith.edit.methods import METHODS
from factsmith.edit.published import (
    PUBLISHED,
    PublishedModel,
    published_layers,
    published_settings,
)


def of_shape(model_type: str, n_layers: int, d_model: int) -> Any:
    """As much of a model as its row is found by."""
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(model_type=model_type))
    return SimpleNamespace(config=config, n_layers=n_layers, d_model=d_model, name="a model")


def of_config(config: Any) -> Any:
    """The same from a transformers config."""
    return SimpleNamespace(
        config=config,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        name=config.name_or_path,
    )


# Shapes from the models' own config.json files, layers from the papers and their code: written down
# again, not read from the table.
KNOWN: list[tuple[Any, int, tuple[int, ...]]] = [
    (GPT2Config(n_layer=24, n_embd=1024, n_head=16), 8, ()),
    (GPT2Config(n_layer=36, n_embd=1280, n_head=20), 12, ()),
    (GPT2Config(n_layer=48, n_embd=1600, n_head=25), 17, (13, 14, 15, 16, 17)),
    (AutoConfig.for_model("gptj"), 5, (3, 4, 5, 6, 7, 8)),
    (AutoConfig.for_model("gpt_neox"), 15, (6, 7, 8, 9, 10)),
    (LlamaConfig(), 5, (4, 5, 6, 7, 8)),
    (
        LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256),
        5,
        (4, 5, 6, 7, 8),
    ),
    (AutoConfig.for_model("mistral"), 5, (4, 5, 6, 7, 8)),
    (AutoConfig.for_model("qwen2", num_hidden_layers=28, hidden_size=3584), 5, (4, 5, 6, 7, 8)),
]
rows = pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)


@pytest.mark.parametrize(
    ("config", "rome", "memit"), KNOWN, ids=lambda value: getattr(value, "model_type", None)
)
def test_layers_go_by_shape_and_one_layer_more_is_another_model(
    config: Any, rome: int, memit: tuple[int, ...]
) -> None:
    layers = published_layers(of_config(config))
    assert layers is not None and layers.source
    assert (layers.rome, layers.memit) == (rome, memit)
    config.name_or_path = "somebody/elses-name"
    assert published_layers(of_config(config)) == layers, "names do not count"
    config.num_hidden_layers += 1
    assert published_layers(of_config(config)) is None
    config.num_hidden_layers -= 1
    config.model_type = "another"
    assert published_layers(of_config(config)) is None
    config.model_type = type(config).model_type
    assert published_layers(of_config(config)) == layers


def test_every_row_is_met_and_other_shapes_have_none() -> None:
    met = {
        layers.name
        for config, _, _ in KNOWN
        if (layers := published_layers(of_config(config))) is not None
    }
    assert met == {row.name for row in PUBLISHED} and len(met) == len(PUBLISHED)
    others = [
        GPT2Config(),
        AutoConfig.for_model("opt", num_hidden_layers=32, hidden_size=4096),
        LlamaConfig(num_hidden_layers=40, hidden_size=5120, num_attention_heads=40),
    ]
    assert [published_layers(of_config(config)) for config in others] == [None] * 3


def test_a_shape_has_one_row() -> None:
    assert len({row.shape for row in PUBLISHED}) == len(PUBLISHED)


@rows
def test_one_row_answers_both_questions(row: PublishedModel) -> None:
    lm = of_shape(*row.shape)
    layers = published_layers(lm)
    assert layers == (row.rome, row.memit, row.name, row.source)
    assert row.rome < row.n_layers and max(row.memit, default=0) < row.n_layers
    for method in ("rome", "r-rome"):
        assert published_settings(lm, method)[0].edited == (row.rome,)
    if row.memit:
        assert published_settings(lm, "memit")[0].edited == row.memit
    else:
        with pytest.raises(InputError, match="no memit settings were published"):
            published_settings(lm, "memit")


@rows
@pytest.mark.parametrize("method", METHODS)
def test_settings_are_those_of_the_row_or_refused(row: PublishedModel, method: str) -> None:
    lm = of_shape(*row.shape)
    if (answer := row.config(method)) is None:
        with pytest.raises(InputError, match=f"no {method} settings were published"):
            published_settings(lm, method)
        return
    config, source = published_settings(lm, method)
    assert (config, source) == answer
    assert isinstance(config, METHODS[method].config) and config.scale == "paper" and source
    assert config.edited and max(config.edited) < row.n_layers / 2
    name = "rome" if method == "r-rome" else method
    if name in row.settings:
        values, published_in = row.settings[name]
        assert source == published_in
        assert {setting: getattr(config, setting) for setting in values} == dict(values)
    else:
        assert source.startswith(f"layers from {row.source}; ") and "paper's defaults" in source


def test_where_only_the_layers_were_published_the_rest_are_the_papers_defaults() -> None:
    neox = of_shape("gpt_neox", 44, 6144)
    assert published_settings(neox, "rome")[0] == RomeConfig(15, scale="paper")
    assert published_settings(neox, "memit")[0] == MemitConfig((6, 7, 8, 9, 10), scale="paper")
    qwen = of_shape("qwen2", 28, 3584)
    assert published_settings(qwen, "r-rome")[0] == RomeConfig(5, scale="paper")
    memit, source = published_settings(qwen, "memit")  # published in full
    assert isinstance(memit, SpreadConfig)
    assert (memit.steps, memit.lr, source) == (
        25,
        0.1,
        "zjunlp/EasyEdit hparams/MEMIT/qwen2.5-7b.yaml",
    )


def test_the_papers_values() -> None:
    rome, _ = published_settings(of_shape("gpt2", 48, 1600), "rome")
    assert isinstance(rome, RomeConfig)
    assert (rome.layer, rome.clamp, rome.weight_decay) == (17, 4.0, 0.5)
    assert published_settings(of_shape("gpt2", 48, 1600), "r-rome")[0] == rome
    memit, _ = published_settings(of_shape("gptj", 28, 4096), "memit")
    assert isinstance(memit, MemitConfig)
    assert (memit.layers, memit.moment_weight, memit.clamp, memit.steps) == (
        (3, 4, 5, 6, 7, 8),
        15_000,
        0.75,
        25,
    )


def test_another_shape_has_none() -> None:
    with pytest.raises(InputError, match="only for gpt2 of 24 x 1024") as refused:
        published_settings(of_shape("gpt2", 12, 768), "rome")
    assert refused.value.argument == "paper"
    with pytest.raises(InputError, match="no method"):
        published_settings(of_shape("gpt2", 12, 768), "magic")
