"""`factsmith evaluate URL`, on a real small model behind a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import factsmith as fs
from commands import Run
from factsmith import atlas
from factsmith.remote import client as client_module
from model_server import ModelServer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def running() -> Iterator[ModelServer]:
    with ModelServer(atlas.folder("atlas-llama")) as server:
        yield server


def test_a_server_is_judged_and_reported(run: Run, running: ModelServer, tmp_path: Path) -> None:
    call = ("evaluate", running.url, "--limit", "2", "--seed", "3", "--out", "judged")
    done = run(*call)
    assert done.code == 0, done.err
    assert "2 records, as served; base: the server's base model" in done.out
    assert "prompt exact" in done.out and "what it cost" not in done.out
    page = (tmp_path / "judged/report.html").read_text()
    text = (tmp_path / "judged/report.md").read_text()
    assert "What base-model says, judged" in page and "the server&#39;s base model" in page
    assert text.startswith("# What base") and "vllm" in text and "records an edit" not in text
    calls = len(running.calls)
    again = run(*call, "--json")
    (judged,) = again.json["runs"]
    assert judged["served"].startswith("vllm, base-model from")
    assert judged["measures"].keys() == {"base"} and judged["edits"] == {}
    completions = [path for _, path, _ in running.calls[calls:] if "completions" in path]
    assert len(completions) <= 2, "what the base model knows, and a few kept questions"
    lm = fs.load("atlas-llama")
    suite = fs.load_suite("atlas", limit=2, seed=3)
    expected = fs.evaluate(lm, suite, drift_tokens=0, continued=0).summary("base")
    measured = judged["measures"]["base"]
    assert measured["paraphrase exact"]["value"] == expected["paraphrase exact"].value
    assert measured["prompt magnitude"]["value"] == pytest.approx(
        expected["prompt magnitude"].value, abs=1e-3
    )
    other = run(*call, "--seed", "4")
    assert other.code == 2 and "another folder" in other.err


def test_a_report_names_what_is_missing(
    run: Run, running: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("evaluate", running.url, "--limit", "2", "--seed", "3")
    assert "not measured" not in run(*call, "--json").json["facts"]
    monkeypatch.setattr(running.faults, "no_log_probs", True)
    done = run(*call, "--out", "bare")
    assert done.code == 0 and "does not say how likely" in done.err
    assert "prompt exact" in done.out and "success" not in done.out
    page = (tmp_path / "bare/report.html").read_text()
    assert "not measured" in page and "Success and exact match" not in page
    assert "not measured" in (tmp_path / "bare/report.md").read_text()


def test_models_are_named(run: Run, running: ModelServer) -> None:
    done = run("evaluate", running.url, "--model", "nobody")
    assert done.code == 2 and "'nobody'" in done.err and "--model" in done.err
    done = run("evaluate", "atlas", "--model", "nobody")
    assert done.code == 2 and "--model" in done.err and "URL" in done.err


@pytest.mark.parametrize(
    "option",
    [
        ("--methods", "rome"),
        ("--sizes", "1"),
        ("--sequence",),
        ("--set", "rome.steps=3"),
        ("--paper",),
        ("--texts", "own"),
        ("--drift-tokens", "0"),
        ("--continued", "0"),
        ("--tasks", "hellaswag"),
        ("--device", "cpu"),
    ],
)
def test_options_that_need_weights_are_refused(
    run: Run, running: ModelServer, option: tuple[str, ...]
) -> None:
    calls = len(running.calls)
    done = run("evaluate", running.url, *option)
    assert done.code == 2 and option[0] in done.err and "weights" in done.err
    assert len(running.calls) == calls, "before the server is asked"


def test_a_server_that_is_not_there(run: Run, running: ModelServer, tmp_path: Path) -> None:
    gone = ModelServer(atlas.folder("atlas-llama"))
    gone._web.server_close()
    done = run("evaluate", gone.url, "--limit", "2")
    assert done.code == 6 and "cannot be reached" in done.err
    assert done.err.count("Trying again") == 3
    done = run("evaluate", "http://", "--limit", "2")
    assert done.code == 2 and "names no host" in done.err
    done = run("evaluate", gone.url, "--limit", "2", "--json", "--quiet")
    assert done.code == 6 and '"type": "ServerError"' in done.err
