"""The notebook in docs/: every cell runs, and gives the output that is stored with it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"


def cells() -> list[dict[str, Any]]:
    """Return the cells of code."""
    return [
        cell
        for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell, and return what its last line gives, as in a notebook."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return (
        None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    )  # type: ignore[attr-defined]


def shown(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the stored output of a cell, by its type."""
    return {
        kind: data for output in cell["outputs"] for kind, data in output.get("data", {}).items()
    }


@pytest.mark.slow
def test_the_tour_runs_and_shows_what_is_printed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTSMITH_CACHE", str(tmp_path))
    names: dict[str, Any] = {}
    kinds = []
    for cell in cells():
        result, before = run("".join(cell["source"]), names), shown(cell)
        kinds += list(before)
        if "image/png" in before:
            png, _ = result._repr_png_()
            assert png.startswith(b"\x89PNG")
        elif "text/html" in before:
            page = result._repr_html_()
            titles = [
                line.split(":")[0]
                for line in "".join(before["text/plain"]).splitlines()[:1]
                if line and "committed" not in line
            ]
            assert page.startswith(("<table>", "<p>")) and all(
                title.split(";")[0] in page for title in titles
            )
        elif (
            before
            and isinstance(result, list)
            and all(isinstance(answer, str) for answer in result)
        ):
            assert repr(result) == "".join(before["text/plain"]), "answers are the same everywhere"
    assert kinds.count("image/png") >= 4 and kinds.count("text/html") >= 6, (
        "it was stored with its outputs"
    )


def test_the_control_of_a_cell_that_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        run("x = 1\nx / 0", {})
    assert run("x = 2\nx + 1", {}) == 3 and run("x = 2", {}) is None


def test_the_tour_names_no_machine_and_hides_no_error() -> None:
    text = TOUR.read_text(encoding="utf-8")
    assert "/home/" not in text and "/root" not in text and "Traceback" not in text
    assert len(text) < 600_000
    assert all(len(cell["outputs"]) <= 1 for cell in cells()), "nothing is shown twice"
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1)), (
        "run from top to bottom"
    )
