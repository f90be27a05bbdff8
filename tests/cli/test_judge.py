"""`factsmith evaluate` and `drift`, on tiny models and the bundled one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import FACT, Run, atlas_model
from factsmith.edit.delta import Delta
from factsmith.edit.finetune import FineTuneConfig
from factsmith.edit.methods import RomeConfig, rome
from factsmith.edit.moments import second_moments
from factsmith.fact import Fact

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
    """Records of full COUNTERFACT's layout, the last malformed; and fine-tuning that takes no time."""
    file = tmp_path / "counterfact.json"
    file.write_text(json.dumps([*SUITE, {**SUITE[0], "case_id": 9, "requested_rewrite": {"prompt": "no slot"}}]))
    for name, value in (("steps", 2), ("epochs", 1)):
        monkeypatch.setitem(FineTuneConfig.__init__.__kwdefaults__, name, value)  # type: ignore[index]
    return file


def test_evaluate_prints_keeps_and_reports(run: Run, model: Path, suite: Path, tmp_path: Path) -> None:
    call = ["evaluate", model, "--suite", suite, "--methods", "ft", "--sizes", "1,2", "--all", "--out", "judged"]
    done = run(*call, "--json")
    assert done.code == 0, done.err
    assert "1 malformed record left out" in done.err
    found = done.json
    assert [r["size"] for r in found["runs"]] == [1, 2] and list(found["runs"][0]["measures"]) == ["base", "ft-l"]
    assert found["out"] == ["judged/report.html", "judged/report.md"]
    rows = (tmp_path / "judged/size-2/rows.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["size"] == 2
    page = (tmp_path / "judged/report.html").read_text()
    assert "<b>The home" not in page and "&lt;b&gt;The home" in page
    # killed before its last edit was done: the rest is asked, the numbers are the same
    (tmp_path / "judged/size-2/rows.jsonl").write_text("\n".join(rows[: len(rows) // 2]) + "\n")
    again = run(*call, "--json").json
    assert again["runs"][1]["measures"] == found["runs"][1]["measures"]
    shown = run(*call)
    assert shown.code == 0 and "2 records at a time" in shown.out and "base" in shown.out and "saved judged/report.md" in shown.out
    other = run(*call, "--limit", "2")
    assert other.code in (2, 5) and "another run" in other.err, "it is of other records"


def test_evaluate_in_sequence(run: Run, model: Path, suite: Path, tmp_path: Path) -> None:
    done = run("evaluate", model, "--suite", suite, "--methods", "ft-l", "--sizes", "2", "--sequence", "--all", "--out", "kept", "--json")
    assert done.code == 0, done.err
    (found,) = done.json["runs"]
    assert set(found["retention"]["ft-l"]) == {"0", "1"} and set(found["retention"]["ft-l"]["0"]) == {"0", "1"}
    assert "What is left of earlier rounds" in (tmp_path / "kept/report.html").read_text()
    assert (tmp_path / "kept/sequence-2/rows.jsonl").is_file()


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
        assert done.code in (2, 5) and words in " ".join(done.err.split()) and done.out == "", (options, done.err)
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
    done = run("drift", atlas, "--delta", "delta", *few, "--limit", "kl_text=0", "--limit", "perplexity=1e9")
    assert done.code == 4 and "kl_text is" in done.out and "perplexity is" not in done.out
    for limit in ("frob=1", "kl_text", "kl_text=nan", "kl_text=-1"):
        assert run("drift", atlas, "--delta", "delta", "--limit", limit).code == 2
    assert run("drift", atlas).code == 2 and run("drift").code == 2
    assert run("drift", atlas, "--delta", "nowhere").code == 5
    assert Delta.load("delta").fingerprint == lm.fingerprint, "the model is as it was"


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
    refused = run("drift", model, "--delta", next(Path("space").rglob("edit.json")).parent, "-w", "space", *few)
    assert refused.code == 5 and "--workspace" in refused.err, "made on the model without it"
