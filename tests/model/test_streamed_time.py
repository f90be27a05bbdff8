"""The time that layers on disk take: counted in layers that were read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.edit.configs import RomeConfig
from factsmith.edit.search import find_targets
from factsmith.model.absent import Place
from factsmith.model.load import load
from factsmith.model.room import Room
from factsmith.model.streamed import Streamed, streamed_of
from factsmith.model.streamed_time import (
    HANDLING_SECONDS,
    LOADING_PASSES,
    search_passes,
    streamed_seconds,
)

LAYERS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("gpt2", **GPT2 | {"n_layer": LAYERS}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_seventy_billion_on_paper() -> None:
    one = streamed_seconds(80, 1.7e9, 2e9)
    assert one == pytest.approx(68, rel=0.01)
    assert streamed_seconds(80, 1.7e9, 4e9) == pytest.approx(one / 2, rel=0.01)
    # A layer that computes for longer than it is read hides the reading.
    assert streamed_seconds(80, 1.7e9, 2e9, compute_seconds_a_layer=2) == pytest.approx(
        80 * (2 + HANDLING_SECONDS)
    )
    with pytest.raises(InputError, match="disk_bytes_a_second"):
        streamed_seconds(80, 1.7e9, 0)


def test_passes_are_what_is_read(folder: Path) -> None:
    lm = load(folder, device="disk")
    streamed = streamed_of(lm.module)
    assert streamed is not None
    assert LOADING_PASSES * 0.8 < streamed.n_read / LAYERS < LOADING_PASSES * 1.25
    for layer in (1, 4):
        before, steps = streamed.n_read, 5
        config = RomeConfig(layer=layer, steps=steps, stop_loss=0.0)
        find_targets(lm, [Fact("Paris", "{} is in", "Rome")], layer, config, ["{}"])
        read = (streamed.n_read - before) / LAYERS
        assert 0.6 * search_passes(LAYERS, layer, steps=steps) < read
        assert read < 1.25 * search_passes(LAYERS, layer, steps=steps)


def test_a_slow_disk_takes_as_long_as_it_should(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(folder, device="disk")
    streamed = streamed_of(lm.module)
    assert streamed is not None
    rate, plain = 5e6, Streamed._fetched

    def slow(self: Streamed, place: Place) -> Any:
        tensor = plain(self, place)
        time.sleep(tensor.numel() * tensor.element_size() / rate)
        return tensor

    monkeypatch.setattr(Streamed, "_fetched", slow)
    streamed.release()
    begun, passes = time.monotonic(), 3
    for _ in range(passes):
        lm.last_hidden(lm.batch([TEXTS[0]]))
    measured = time.monotonic() - begun
    due = streamed_seconds(LAYERS, streamed.layer_bytes[0], rate, passes=passes)
    assert 0.75 * due < measured  # a busy machine may take longer
    assert measured < 4 * due


def test_pages_are_used_again_when_nobody_has_them() -> None:
    room, cpu = Room(), torch.device("cpu")
    stored = torch.ones(2**19)
    first = room.like(stored, cpu).copy_(stored)
    second = room.like(stored, cpu)
    assert first.data_ptr() != second.data_ptr() and bool((first == 1).all())
    place, view = second.data_ptr(), second[5:7]
    del second
    third = room.like(stored, cpu)  # the control: a view keeps its pages
    assert third.data_ptr() not in (place, first.data_ptr())
    del view
    assert room.like(stored, cpu).data_ptr() == place


def test_a_tensor_has_the_place_in_a_cache_line_that_the_file_gives_it() -> None:
    room, stored = Room(), torch.ones(2**19 + 16)
    for shift in range(0, 16, 3):
        cut = stored[shift:-16]
        like = room.like(cut, torch.device("cpu"))
        assert like.data_ptr() % 64 == cut.data_ptr() % 64
