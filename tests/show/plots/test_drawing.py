"""What the figures share: files, suffixes, notebooks, and records of another kind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from factsmith.core.errors import InputError, WorkspaceError
from factsmith.locate.neurons import knowledge_neurons
from factsmith.model.language_model import LanguageModel
from factsmith.show.plots.curves import curves
from factsmith.show.plots.neurons import neuron_chart
from factsmith.show.plots.traces import class_lines, class_map, heat_map, text_heat_map
from show.records import trace


def test_another_record_is_refused_with_what_draws_it(tiny_gpt2: LanguageModel) -> None:
    neurons = knowledge_neurons(tiny_gpt2, "Paris is the capital of", "Paris", steps=2)
    for draw in (heat_map, text_heat_map, class_map, class_lines):
        with pytest.raises(InputError, match="got a KnowledgeNeurons; draw it with neuron_chart"):
            draw(neurons)  # type: ignore[operator]
    with pytest.raises(
        InputError, match="draws a KnowledgeNeurons; got a CausalTrace; draw it with heat_map"
    ):
        neuron_chart(trace())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="width is 'x'"):
        text_heat_map(trace(), "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("suffix", "starts"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")]
)
def test_saved_by_suffix(tmp_path: Path, suffix: str, starts: bytes) -> None:
    # Text that looks like a formula, and a script that the font lacks: neither may fail or warn.
    odd = trace(
        answer=" $x_{$",
        tokens=("$", "^_{", "中", "\n", "   ", "\\frac", "�", "aVeryLongTokenThatGoesOnAndOn"),
    )
    figure = heat_map(odd, path=tmp_path / f"map{suffix}")
    assert (tmp_path / f"map{suffix}").read_bytes().startswith(starts)
    assert isinstance(figure, Figure) and figure.get_figwidth() < 3.5  # one column of a page


def test_drawing_does_not_start_pyplot() -> None:
    before = "matplotlib.pyplot" in sys.modules
    heat_map(trace())
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize("name", ["map.jpeg", "map"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"\.png, \.svg, \.pdf"):
        heat_map(trace(), path=tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="is not a folder"):
        heat_map(trace(), path=tmp_path / "absent" / "map.png")


def test_a_notebook_shows_a_picture_at_the_size_of_a_column() -> None:
    drawn = curves({"line": ([0, 1], [0.0, 1.0], [0.0, 0.9], [0.1, 1.1])}, x_label="x", y_label="y")
    png, size = drawn._repr_png_()  # type: ignore[attr-defined]
    assert png.startswith(b"\x89PNG") and 200 < size["width"] < 600
