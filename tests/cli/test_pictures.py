"""What --out names: files of others stay, records of earlier runs are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import PROMPT, Run
from factsmith.core.fact import Fact
from factsmith.core.factfile import FactFile


def test_no_file_of_others_is_replaced(run: Run, model: Path, tmp_path: Path) -> None:
    FactFile.write("input.json", [Fact("Edwin", "{} is a", "king")])
    (tmp_path / "config.json").write_text('{"factsmith": {"rome": {"layer": 1}}}')
    (tmp_path / "data.csv").write_text("a,b\n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "folder.png").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    text = ("trace", model, PROMPT, "--subject", "Danielle Darrieux", "--samples", 1, "--out")
    for arguments, words in (
        (
            ("trace", "nosuchmodel", "input.json", "--out", "input"),
            "input.json, the file of facts",
        ),
        (
            ("trace", "nosuchmodel", "input.json", "--out", "./input.svg"),
            "input.json, the file of facts",
        ),
        ((*text, "config.png"), "config.json, which an earlier run did not write"),
        ((*text, "data"), "data.csv, which an earlier run did not write"),
        ((*text, "broken.pdf"), "broken.json, which an earlier run did not write"),
        ((*text, "folder"), "folder.png, which is a folder"),
        (
            ("neurons", model, PROMPT, "--out", "config"),
            "config.json, which an earlier run did not write",
        ),
    ):
        done = run(*arguments)
        assert (done.code, done.out) == (2, "") and words in done.err, (arguments, done)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_earlier_records_are_replaced(run: Run, model: Path, tmp_path: Path) -> None:
    text = (
        "trace",
        model,
        PROMPT,
        "--subject",
        "Danielle Darrieux",
        "--out",
        "map.svg",
        "--samples",
    )
    assert (
        run(*text, 1).code == 0
        and json.loads((tmp_path / "map.json").read_text())["factsmith"] == "trace"
    )
    (tmp_path / "map.csv").write_text("old\n")
    assert (
        run(*text, 2).code == 0 and json.loads((tmp_path / "map.json").read_text())["samples"] == 2
    )
    assert (tmp_path / "map.csv").read_text().startswith("column,")


@pytest.mark.parametrize("out", ["", ".", "..", ".png", "d/", "space", "space/.."])
def test_out_needs_a_file_name(run: Run, model: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "space").mkdir()
    for command in (["trace", model, PROMPT, "--subject", "Danielle"], ["neurons", model, PROMPT]):
        done = run(*command, "--out", out)
        assert done.code == 2 and "does not name a file" in done.err and "trace.png" in done.err


def test_digits_after_a_point_are_no_suffix(run: Run, model: Path, tmp_path: Path) -> None:
    assert (
        run("trace", model, PROMPT, "--subject", "Danielle", "--samples", 1, "--out", "v1.2").code
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"v1.2.{suffix}" for suffix in ("csv", "json", "png", "svg")
    ]
