"""`factsmith evaluate` and `drift`, on tiny models and the bundled one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from commands import FACT, Run, atlas_model
from factsmith.core.fact import Fact
from factsmith.corpus.moments import second_moments
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import Delta
from factsmith.edit.finetune import FineTuneConfig
from factsmith.edit.methods import rome

SUITE = [
    {
        "case_id": n,
        "requested_rewrite": {
            "prompt": "The home of {} is",
            "subject": f"Entity{n}",
            "target_new": {"str": "Oslo"},
            "target_true": {"str": "Rome"},
            "relation_id": "P1",
        },
        "paraphrase_prompts": [f"Entity{n} lives in"],
        "neighborhood_prompts": [f"<b>The home</b> of Other{n} is"],
        "attribute_prompts": [],
        "generation_prompts": [],
    }
    for n in range(4)
]


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of full COUNTERFACT's layout, the last malformed; and fine-tuning in no time."""
    file = tmp_path / "counterfact.json"
    file.write_text(
        json.dumps([*SUITE, {**SUITE[0], "case_id": 9, "requested_rewrite": {"prompt": "no slot"}}])
    )
    defaults: Any = FineTuneConfig.__init__.__kwdefaults__
    for name, value in (("steps", 2), ("epochs", 1)):
        monkeypatch.setitem(defaults, name, value)
    return file


def evaluating(model: Path, suite: Path, *more: str) -> list[str | Path]:
    """Return the words of `evaluate` on all records of the suite, and more options."""
    return ["evaluate", model, "--suite", suite, "--all", *more]


def test_evaluate_prints_keeps_and_reports(
    run: Run, model: Path, suite: Path, tmp_path: Path
) -> None:
    call = evaluating(model, suite, "--methods", "ft", "--sizes", "1,2", "--out", "judged")
    done = run(*call, "--json")
    assert done.code == 0, done.err
    assert "malformed: 1 record left out, the first" in done.err
    printed = done.json
    assert [r["size"] for r in printed["runs"]] == [1, 2] and list(
        printed["runs"][0]["measures"]
    ) == [
        "base",
        "ft-l",
    ]
    assert printed["out"] == ["judged/report.html", "judged/report.md"]
    rows = (tmp_path / "judged/size-2/rows.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["size"] == 2
    page = (tmp_path / "judged/report.html").read_text()
    assert "<b>The home" not in page and "&lt;b&gt;The home" in page
    # killed before its last edit was done: the rest is asked, the numbers are the same
    (tmp_path / "judged/size-2/rows.jsonl").write_text("\n".join(rows[: len(rows) // 2]) + "\n")
    again = run(*call, "--json").json
    assert again["runs"][1]["measures"] == printed["runs"][1]["measures"]
    shown = run(*call)
    assert (
        shown.code == 0
        and "2 records at a time" in shown.out
        and "base" in shown.out
        and "saved judged/report.md" in shown.out
    )
    other = run(*call, "--limit", "2")
    assert other.code in (2, 5) and "another" in other.err, "it is of other records"


def test_evaluate_with_settings_and_tasks(
    run: Run, model: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "lm_eval", reason='the harness is not installed: pip install "factsmith[eval]"'
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/homes.jsonl").write_text(
        '{"text": "Entity0 is at", "choices": ["Oslo", "Rome"]}\n'
    )
    task = {
        "task": "homes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tasks/homes.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks/homes.yaml").write_text(json.dumps(task))
    call = evaluating(
        model, suite, "--methods", "ft", "--sizes", "2", "--out", "judged", "--drift-tokens", "50"
    )
    call += ["--tasks", "homes", "--tasks-folder", tmp_path / "tasks", "--json"]
    done = run(*call, "--set", "ft.steps=1")
    assert done.code == 0, done.err
    (judged,) = done.json["runs"]
    assert set(judged["probed"]) == {"base", "ft-l"} and set(judged["probed"]["base"]) == {
        "homes acc"
    }
    assert judged["edits"]["ft-l"]["kl_text"] >= 0
    other = run(*call, "--set", "ft.steps=2")
    assert other.code == 2 and "other settings" in other.err and "another folder" in other.err
    (tmp_path / "tasks/homes.jsonl").write_text(
        '{"text": "Entity0 is in", "choices": ["Oslo", "Rome"]}\n'
    )
    other = run(*call, "--set", "ft.steps=1")
    assert other.code == 2 and "probe" in other.err, "a task of the same name is another"
    for wrong in (
        ["--tasks", ""],
        ["--tasks-limit", "3"],
        ["--paper"],
        ["--set", "ft.steps=1", "--set", "ft.steps=2"],
    ):
        refused = run("evaluate", model, "--suite", suite, "--methods", "ft", "--all", *wrong)
        assert refused.code == 2 and refused.err.startswith("error: "), wrong


def test_a_folder_holds_one_model_and_suite(
    run: Run, model: Path, suite: Path, tmp_path: Path
) -> None:
    call = evaluating(
        model, suite, "--methods", "ft", "--drift-tokens", "0", "--out", "judged", "--json"
    )
    assert [r["size"] for r in run(*call, "--sizes", "1").json["runs"]] == [1]
    assert [r["size"] for r in run(*call, "--sizes", "2").json["runs"]] == [1, 2], (
        "the page keeps what was judged before"
    )
    other = run(*call, "--sizes", "3", "--seed", "1")
    assert other.code == 2 and "another seed" in other.err
    rows = tmp_path / "judged/size-1/rows.jsonl"
    lines = rows.read_text().splitlines()
    for damaged in (
        lines[:2] + lines[3:],
        lines + lines[1:],
        [line.replace("Entity1", "Entity7") for line in lines],
    ):
        rows.write_text("\n".join(damaged) + "\n")
        done = run(*call, "--sizes", "1")
        assert done.code == 5 and "rows.jsonl, line" in done.err


def test_a_folder_holds_one_layout_text_and_setting_of_a_method(
    run: Run, model: Path, suite: Path, tmp_path: Path
) -> None:
    for name, text in (
        ("a.txt", "The home of Edwin is Rome. " * 20),
        ("b.txt", "Edwin is at home in Rome. " * 20),
    ):
        (tmp_path / name).write_text(text)
    call = evaluating(
        model, suite, "--methods", "ft", "--drift-tokens", "20", "--out", "judged", "--json"
    )
    done = run(*call, "--sizes", "1", "--texts", "a.txt")
    assert done.code == 0, done.err
    (judged,) = done.json["runs"]
    assert (
        "clamp=0.03" in judged["settings"]["ft-l"]
        and done.json["facts"]["settings of ft-l"] == judged["settings"]["ft-l"]
    )
    assert (
        "clamp=0.03" in (tmp_path / "judged/report.html").read_text()
        and "clamp=0.03" in (tmp_path / "judged/report.md").read_text()
    )
    for options, words in (
        (["--sizes", "2", "--texts", "b.txt"], "another texts"),
        (["--sizes", "2"], "another texts"),
        (
            ["--sizes", "2", "--texts", "a.txt", "--set", "ft.clamp=0.5"],
            "clamp=0.03 there, clamp=0.5 here",
        ),
    ):
        other = run(*call, *options)
        assert other.code == 2 and words in other.err and "--out" in other.err, other.err
    assert [r["size"] for r in run(*call, "--sizes", "2", "--texts", "a.txt").json["runs"]] == [
        1,
        2,
    ]
    zsre = {
        "subject": "Edwin",
        "src": "Who is Edwin?",
        "alt": "a king",
        "answers": ["a poet"],
        "rephrase": "Edwin is",
        "loc": "a",
        "loc_ans": "b",
    }
    (tmp_path / "zsre.json").write_text(json.dumps([zsre]))
    call = ["evaluate", model, "--methods", "ft", "--all", "--drift-tokens", "0", "--out", "zsre"]
    assert run(*call, "--suite", "zsre.json").code == 0
    other = run(*call, "--suite", "zsre-rome:zsre.json", "--sizes", "1", "--sequence")
    assert other.code == 2 and "another layout" in other.err


def test_what_is_not_finished_is_not_on_the_page(
    run: Run, model: Path, suite: Path, tmp_path: Path
) -> None:
    call = evaluating(
        model, suite, "--drift-tokens", "0", "--continued", "0", "--out", "judged", "--json"
    )
    assert run(*call, "--sizes", "2", "--sequence", "--methods", "ft").code == 0
    rows = tmp_path / "judged/sequence-2/rows.jsonl"
    lines = rows.read_text().splitlines()
    ends = [at for at, line in enumerate(lines) if line.startswith('{"ends": "ft-l"')]
    rows.write_text("\n".join(lines[: ends[0] + 1]) + "\n")
    done = run(*call, "--sizes", "1", "--methods", "ft")
    assert [(r["size"], r["sequence"]) for r in done.json["runs"]] == [(1, False)]
    assert "ft-l, 2 a round: 1 of 2 edits are there; run it again to finish it" in done.err
    finished = run(*call, "--sizes", "2", "--sequence", "--methods", "ft")
    assert [(r["size"], r["sequence"]) for r in finished.json["runs"]] == [
        (1, False),
        (2, True),
    ] and "edits are there" not in finished.err


def test_sizes_are_at_most_the_number_of_records(
    run: Run, model: Path, suite: Path, tmp_path: Path
) -> None:
    call = evaluating(
        model, suite, "--methods", "ft", "--drift-tokens", "0", "--out", "judged", "--json"
    )
    done = run(*call, "--sizes", "1,100,4,1000")
    assert [r["size"] for r in done.json["runs"]] == [1, 4], done.err
    assert done.err.count("there are 4 records to write, so 4 are written at a time") == 2
    assert sorted(path.name for path in (tmp_path / "judged").glob("size-*")) == [
        "size-1",
        "size-4",
    ]


def test_strict_looks_at_the_whole_file(run: Run, model: Path, suite: Path) -> None:
    call = evaluating(model, suite, "--methods", "ft", "--limit", "1", "--drift-tokens", "0")
    for seed in range(4):
        done = run(*call, "--strict", "--seed", str(seed))
        assert done.code == 2 and "record 4" in done.err
    suite.write_text(json.dumps([{**SUITE[0], "paraphrase_prompts": None}]))
    done = run(*call)
    assert done.code == 0 and "malformed: 1 question left out" in done.err, done.err


def test_a_suite_of_nobodys_home_is_refused(run: Run, model: Path) -> None:
    done = run("evaluate", model, "--suite", "~nobody-of-this-name/x.json")
    assert done.code == 2 and "'~nobody-of-this-name/x.json'" in done.err


def test_evaluate_in_sequence(run: Run, model: Path, suite: Path, tmp_path: Path) -> None:
    done = run(
        "evaluate",
        model,
        "--suite",
        suite,
        "--methods",
        "ft-l",
        "--sizes",
        "2",
        "--sequence",
        "--all",
        "--out",
        "kept",
        "--json",
    )
    assert done.code == 0, done.err
    (judged,) = done.json["runs"]
    assert set(judged["retention"]["ft-l"]) == {"0", "1"} and set(
        judged["retention"]["ft-l"]["0"]
    ) == {"0", "1"}
    assert "What is left of earlier rounds" in (tmp_path / "kept/report.html").read_text()
    assert (tmp_path / "kept/sequence-2/rows.jsonl").is_file()


@pytest.mark.parametrize(
    "setting", ["steps=1", "ft.steps", "ft.=1", "memit.steps=1", "ft.stepz=1", "ft.steps=many"]
)
def test_evaluate_refuses_settings(run: Run, model: Path, suite: Path, setting: str) -> None:
    done = run("evaluate", model, "--suite", suite, "--methods", "ft", "--all", "--set", setting)
    assert done.code == 2 and "Traceback" not in done.err and done.err.startswith("error: ")


def test_evaluate_refuses(run: Run, model: Path, suite: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/report.html").write_text("<p>mine</p>")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/report.md").write_text("mine")
    cases: list[tuple[list[object], str]] = [
        (["--sizes", "0"], "--sizes"),
        (["--sizes", "1,1"], "each once"),
        (["--sizes", "x"], "--sizes"),
        (["--methods", "frob", "--all"], "'frob'"),
        (["--methods", "", "--all"], "at least one"),
        (["--suite", "nowhere.json"], "nowhere.json"),
        (["--suite", suite, "--strict"], "record 4"),
        (["--suite", suite], "--all"),
        (["--out", suite], "file"),
        (["--out", "theirs"], "report.html"),
        (["--out", "notes"], "report.md"),
    ]
    for options, words in cases:
        given = options if "--suite" in options else ["--suite", suite, *options]
        done = run("evaluate", model, *given)
        assert done.code in (2, 5) and words in " ".join(done.err.split()) and done.out == "", (
            options,
            done.err,
        )
    assert (tmp_path / "theirs/report.html").read_text() == "<p>mine</p>"


def test_drift_of_a_delta_and_limits(run: Run, atlas: str, tmp_path: Path) -> None:
    lm = atlas_model()
    moments = second_moments(lm, ["The home of Edwin is Rome. " * 40], [1], max_tokens=2000)
    fact = Fact("Danielle Darrieux", "The mother tongue of {} is", "English")
    rome(lm, fact, RomeConfig(layer=1, steps=3), moments=moments, contexts=["{}"]).save("delta")
    few = ["--max-tokens", "100", "--facts", "10"]
    done = run("drift", atlas, "--delta", "delta", *few, "--json")
    assert done.code == 0, done.err
    assert done.json["kl_text"] > 0 and done.json["exceeded"] == [] and done.json["n_facts"] > 0
    done = run(
        "drift",
        atlas,
        "--delta",
        "delta",
        *few,
        "--limit",
        "kl_text=0",
        "--limit",
        "perplexity=1e9",
    )
    assert done.code == 4 and "kl_text is" in done.out and "perplexity is" not in done.out
    for limit in ("frob=1", "kl_text", "kl_text=nan", "kl_text=-1"):
        assert run("drift", atlas, "--delta", "delta", "--limit", limit).code == 2
    assert run("drift", atlas).code == 2 and run("drift").code == 2
    assert run("drift", atlas, "--delta", "nowhere").code == 5
    assert Delta.load("delta").fingerprint == lm.fingerprint, "the model is as it was"


def test_a_long_text_makes_no_noise(
    run: Run, atlas: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fact = Fact("Danielle Darrieux", "The mother tongue of {} is", "English")
    moments = second_moments(
        atlas_model(), ["The home of Edwin is Rome. " * 40], [1], max_tokens=2000
    )
    rome(atlas_model(), fact, RomeConfig(layer=1, steps=1), moments=moments, contexts=["{}"]).save(
        "delta"
    )
    (tmp_path / "book.txt").write_text("The harbour was quiet in the morning. " * 400)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        done = run(
            "drift",
            atlas,
            "--delta",
            "delta",
            "--texts",
            "book.txt",
            "--max-tokens",
            "100",
            "--facts",
            "0",
            "--json",
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert done.code == 0 and done.json["n_tokens"] == 100
    assert "Token indices" not in done.err + caplog.text


def test_drift_of_a_workspace(run: Run, model: Path, quick: None) -> None:
    assert run("init", model, "space").code == 0
    empty = run("drift", "-w", "space")
    assert empty.code == 2 and "no patch" in empty.err
    assert run("patch", "-w", "space", *FACT).code == 0
    few = ["--max-tokens", "60", "--facts", "0"]
    done = run("drift", "-w", "space", *few, "--json")
    assert done.code == 0 and done.json["kl_text"] > 0, done.err
    again = run("drift", "-w", "space", *few, "--json")
    assert again.json["kl_text"] == done.json["kl_text"]
    run("init", model, "other")
    refused = run(
        "drift",
        model,
        "--delta",
        next(Path("space").rglob("edit.json")).parent,
        "-w",
        "space",
        *few,
    )
    assert refused.code == 5 and "--workspace" in refused.err, "made on the model without it"


def test_evaluate_reads_fields_by_name_and_runs_a_method_of_ones_own(
    run: Run, model: Path, tmp_path: Path
) -> None:
    rows = [
        {"who": f"Entity{n}", "q": f"Entity{n} lives in", "new": {"city": "Oslo"}} for n in (1, 2)
    ]
    Path("own.json").write_text(json.dumps(rows))
    Path("own_editor.py").write_text(
        "from factsmith.edit.delta import read_weights\n"
        "def write(lm, facts):\n    return {1: 2 * read_weights(lm, [1])[1]}\n"
    )
    fields = ["--field", "subject=who", "--field", "prompt=q", "--field", "target=new.city"]
    call = ["evaluate", model, "--suite", "own.json", "--methods", "own_editor.py:write"]
    more = ["--all", "--drift-tokens", "0", "--json"]
    done = run(*call, *fields, *more)
    assert done.code == 0, done.err
    assert done.json["facts"]["records judged"] == "2"
    assert done.json["runs"][0]["edits"]["own_editor.py:write"]["edits"] == 2
    for wrong, words in (
        (fields[:4], "--field"),
        ([*fields, "--field", "subject=x"], "twice"),
        ([*fields, "--field", "target"], "NAME=FIELD"),
        ([*fields, "--field", "colour=x"], "'colour'"),
        ([*fields, "--methods", "own_editor.py:no"], "has no no; it has write"),
        ([*fields, "--methods", "nosuch:no"], "there is no module nosuch"),
    ):
        refused = run(*call, *wrong, "--all")
        assert refused.code == 2 and words in refused.err, refused.err
