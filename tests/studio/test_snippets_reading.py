"""The programs and commands of the reading rooms are run, and give what the pages show."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import factsmith as fs
from factsmith import cli
from factsmith.model.language_model import LanguageModel
from factsmith.studio.arguments import Source
from factsmith.studio.desk import Place
from factsmith.studio.session import Studio
from factsmith.studio.verb import Verb
from factsmith.studio.verbs import ask, explain, find, lens, memory, neurons, trace
from factsmith.studio.verbs.calls import call, command, literal, program
from reading_rooms import patched_studio, run
from studios import LEV

SLOT = "The currency of {} is the"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Studio]:
    with patched_studio(tmp_path_factory.mktemp("snippets") / "space", cache) as opened:
        yield opened


@pytest.fixture(autouse=True)
def run_cache(fresh_cache: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the cache of the run, which has the indices of the studio's model."""
    monkeypatch.setenv("FACTSMITH_CACHE", str(cache))


@pytest.fixture(scope="module")
def loaded() -> dict[str, LanguageModel]:
    return {}


def outputs_of(text: str) -> list[Any]:
    """Run a program and return the JSON documents that it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, "snippet", "exec"), {"__name__": "snippet"})
    return [json.loads(line) for line in printed.getvalue().splitlines()]


def printed_by(lines: list[str]) -> list[Any]:
    """Run commands with --json and return what those that read a model print."""
    documents = []
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "factsmith"
        reads = words[1] != "export"
        at = words.index("--") if "--" in words else len(words)
        words[at:at] = ["--json"]
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as end:
            cli.main(words[1:])
        assert not end.value.code, line
        documents += [json.loads(printed.getvalue())] if reads else []
    return documents


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Return where two documents differ; in dictionaries only what both have is compared."""
    if isinstance(one, dict) and isinstance(other, dict):
        both = one.keys() & other.keys()
        assert both or not one, place
        return [
            d for key in sorted(both) for d in differences(one[key], other[key], f"{place}.{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{place}: {len(one)} and {len(other)} items"]
        pairs = zip(one, other, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differences(a, b, f"{place}[{i}]")]
    if isinstance(one, float) or isinstance(other, float):
        return (
            [] if one == pytest.approx(other, rel=1e-4, abs=1e-6) else [f"{place}: {one} {other}"]
        )
    return [] if one == other or place in (".model", ".revision") else [f"{place}: {one} {other}"]


CASES: list[tuple[Verb[Any], dict[str, Any]]] = [
    (ask.ASK, {"prompt": LEV}),
    (ask.ASK, {"prompt": LEV, "sources": ["base", "latest", "atlas-llama"], "top": 4}),
    (ask.ASK, {"prompt": '-5 "it\'s"\n$HOME', "revision": "base", "lines": 2}),
    (explain.EXPLAIN, {"prompt": LEV, "instead_of": "lev", "top": 3}),
    (trace.TRACE, {"prompt": SLOT, "subject": "Bulgaria", "samples": 3}),
    (
        trace.TRACE,
        {"prompt": LEV, "subject": "Bulgaria", "kind": "mlp", "window": 2, "revision": "base"},
    ),
    (trace.TRACE, {"prompt": LEV, "subject": "Bulgaria", "fast": True, "seed": 3}),
    (trace.TRACE, {"prompt": LEV, "subject": "Bulgaria", "sever": "mlp", "noise": 0.2}),
    (
        trace.TRACE,
        {
            "prompt": LEV,
            "subject": "Bulgaria",
            "corruption": "replace",
            "replacements": ["Romania", "Poland"],
            "target": "lev",
            "force": True,
            "occurrence": 1,
        },
    ),
    (
        neurons.NEURONS,
        {
            "prompt": SLOT,
            "subject": "Bulgaria",
            "steps": 4,
            "paraphrases": ["In {} one pays with the"],
        },
    ),
    (trace.AT, {"prompt": LEV, "layer": 1, "position": 3, "top": 4}),
    (lens.LENS, {"prompt": LEV, "target": "lev", "top": 2}),
    (find.FIND, {"word": "Paris", "top": 3}),
    (memory.NEURON, {"layer": 5, "number": 992, "facts": 1, "top": 3, "revision": "base"}),
    (memory.INTERVENE, {"prompt": LEV, "neurons": ["1 296", "0:3"], "factor": 3}),
    (memory.CENSUS, {"quick": True}),
]


@pytest.mark.parametrize(
    ("verb", "values"), CASES, ids=[f"{i}-{verb.name}" for i, (verb, _) in enumerate(CASES)]
)
def test_program_and_command_give_what_the_page_shows(
    verb: Verb[Any],
    values: dict[str, Any],
    studio: Studio,
    loaded: dict[str, LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    load = fs.load
    monkeypatch.setattr(
        fs, "load", lambda name: loaded.get(name) or loaded.setdefault(name, load(name))
    )
    arguments, place = verb.arguments.of(values), studio.desk.place
    result = run(studio, verb, **values).result
    for documents, expected in (
        (outputs_of(verb.python(arguments, place)), [result]),
        (printed_by(verb.command(arguments, place)), result.get("answers", [result])),
    ):
        assert len(documents) == len(expected)
        for shown, document in zip(expected, documents, strict=True):
            assert not differences(json.loads(json.dumps(shown)), document)


def test_the_program_that_asks_several_names_them_as_the_page_does(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for values in ({"prompt": LEV, "sources": ["base", "latest"]}, {"prompt": LEV}):
        arguments = ask.AskArguments.of(values)
        (document,) = outputs_of(ask.ASK.python(arguments, studio.desk.place))
        result = json.loads(json.dumps(run(studio, ask.ASK, **values).result))
        assert document.keys() == result.keys()
        assert [each["source"] for each in document.get("answers", [])] == [
            each["source"] for each in result.get("answers", [])
        ]
        assert document.get("difference") == result.get("difference")
        assert document.get("revision") == result.get("revision")


def test_another_revision_is_read_by_code_and_by_an_export(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with studio.desk.ledger() as ledger:
        revision = ledger.current
    arguments = explain.ExplainArguments(prompt=LEV, revision=revision, top=2)
    shown = json.loads(json.dumps(run(studio, explain.EXPLAIN, **arguments.model_dump()).result))
    (by_code,) = outputs_of(explain.EXPLAIN.python(arguments, studio.desk.place))
    lines = explain.EXPLAIN.command(arguments, studio.desk.place)
    assert [shlex.split(line)[1] for line in lines] == ["export", "explain"]
    (by_command,) = printed_by(lines)
    assert not differences(shown, by_code) and not differences(shown, by_command)
    base = run(studio, explain.EXPLAIN, prompt=LEV, revision="base", top=2).result
    assert differences(json.loads(json.dumps(base)), by_code), "the comparison can fail"


# ── how they are written ──────────────────────────────────────────────────────────────────────────

PLACE = Place("atlas", "my space")


def test_a_command_quotes_what_a_shell_would_read() -> None:
    hostile = "$(rm -rf x); `a` 'b' \"c\"\n-d"
    (line,) = command(Source(), PLACE, "ask", [hostile], {"--top": 3, "--lines": None})
    words = shlex.split(line)
    assert words == ["factsmith", "ask", "-w", "my space", "--top", "3", hostile]
    (line,) = command(Source(revision="base"), PLACE, "ask", ["--json"], {"--chat": True})
    assert shlex.split(line) == ["factsmith", "ask", "--chat", "--", "atlas", "--json"]


def test_in_the_folder_of_the_workspace_the_base_is_read_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "space").mkdir()
    monkeypatch.chdir(tmp_path / "space")
    place = Place("atlas", ".")
    assert command(Source(), place, "ask", ["x"]) == ["factsmith ask -w . x"]
    assert command(Source(revision="base"), place, "ask", ["x"]) == [
        "cd ..",
        "factsmith ask atlas x",
    ]
    lines = command(Source(revision="0123456789abc"), place, "ask", ["x"])
    assert (
        lines[0] == "cd .." and "-w space" in lines[1] and lines[2].endswith("model-0123456789 x")
    )


def test_code_is_python_that_means_the_same() -> None:
    for value in ("a\"b'c\\", "plain", ["x", 'y"'], (1,), (1, 2), None, 2.5, "\ud800"):
        assert eval(literal(value)) == value
    assert call("f", "x", a=1, b=None, c="") == "f(x, a=1)"
    assert len(call("f", "x" * 90, a=1).splitlines()) == 4
    text = program(Source(revision="abc"), PLACE, ["print(lm)"])
    assert 'carrying_exactly(bench.deltas_at("abc").values()):' in text
    compile(text, "snippet", "exec")
