"""Facts as code on tiny models: `plan`, `apply`, `diff`, `verify`, `gc`, and fact files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import Run
from factsmith.keep import bench

FILE = """
gates: {efficacy: 0, paraphrases: 0, neighbours: 0, kl_text: 1000}
method: rome
facts:
- {subject: Danielle Darrieux, prompt: "The mother tongue of {} is", target: English}
- {subject: Edwin, prompt: "{} lives in", target: Paris}
"""


@pytest.fixture
def space(run: Run, model: Path, tmp_path: Path, quick: None) -> Path:
    assert run("init", model, "space").code == 0
    (tmp_path / "facts.yaml").write_text(FILE)
    return tmp_path / "space"


def state(space: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(space)): p.read_bytes()
        for p in (space / "deltas").rglob("*")
        if p.is_file()
    }


def test_plan_changes_nothing_and_says_what_would(run: Run, space: Path) -> None:
    planned = run("plan", "facts.yaml", "-w", "space", "--json")
    assert planned.code == 0, planned.err
    assert [entry["standing"] for entry in planned.json["entries"]] == ["new", "new"]
    assert (
        planned.json["method"] == "rome"
        and planned.json["layers"] == [1]
        and planned.json["n_bytes"] > 0
        and planned.json["seconds"] > 0
    )
    assert run("log", "-w", "space", "--json").json["revisions"] == [] and state(space) == {}


def test_apply_commits_all_or_nothing(run: Run, space: Path, tmp_path: Path) -> None:
    strict = FILE.replace("efficacy: 0", "efficacy: 1.0")
    (tmp_path / "strict.yaml").write_text(strict)
    refused = run("apply", "strict.yaml", "-w", "space", "--json")
    assert (
        refused.code == 4 and "is answered" in refused.err and "nothing was written" in refused.err
    )
    assert (
        refused.json["outcome"]["revision"] is None
        and not refused.json["outcome"]["gates"][0]["passed"]
    )
    assert run("log", "-w", "space", "--json").json["revisions"] == []
    forced = run("apply", "strict.yaml", "-w", "space", "--force", "--json")
    assert (
        forced.code == 0
        and forced.json["outcome"]["forced"]
        and forced.json["outcome"]["revision"]["report"]["forced"]
    )
    done = run("apply", "facts.yaml", "-w", "space", "-m", "two at once", "--force", "--json")
    assert done.code == 0, done.err
    revision = done.json["outcome"]["revision"]
    assert (
        revision["message"] == "two at once"
        and len(revision["facts"]) == 2
        and not revision["report"]["forced"]
    )
    assert all(len(fact["paraphrases"]) == 5 for fact in revision["facts"]), (
        "made, since none were given"
    )
    done = run("apply", "facts.yaml", "-w", "space", "--force")
    assert done.code == 0 and "committed as" in done.out and "to take it back" in done.out


def test_conflicts_stop_a_file(run: Run, space: Path, tmp_path: Path) -> None:
    assert run("apply", "facts.yaml", "-w", "space").code == 0
    (tmp_path / "other.yaml").write_text(
        FILE.replace("target: English", "target: Dutch, relation: P103").replace(
            "target: Paris", "target: Paris, relation: home"
        )
        + "- {subject: Edwin, prompt: 'The home of {} is', target: Rome, relation: home}\n"
    )
    planned = run("plan", "other.yaml", "-w", "space", "--json")
    assert planned.code == 4 and "conflict" in planned.err
    standing = [(entry["standing"], entry["because"]) for entry in planned.json["entries"]]
    assert standing[0][0] == "changed" and "English" in standing[0][1]
    assert standing[2][0] == "conflict" and "Paris" in standing[2][1]
    before = run("log", "-w", "space", "--json").json
    refused = run("apply", "other.yaml", "-w", "space")
    assert (
        refused.code == 4
        and "conflict" in refused.err
        and run("log", "-w", "space", "--json").json == before
    )
    assert run("apply", "other.yaml", "-w", "space", "--force").code == 0


def test_some_facts_go_and_come_back(run: Run, space: Path) -> None:
    assert run("apply", "facts.yaml", "-w", "space").code == 0
    identity = run("log", "-w", "space", "--json").json["revisions"][0]["id"]
    undone = run("revert", identity, "--fact", 1, "--force", "-w", "space", "--json")
    assert undone.code == 0, undone.err
    assert [fact["subject"] for fact in undone.json["facts"]] == [
        "Danielle Darrieux"
    ] and undone.json["active"] == 1
    shown = run("show", identity, "-w", "space")
    assert "(taken out)" in shown.out and shown.out.count("(taken out)") == 1
    record = run("diff", identity, "latest", "-w", "space", "--json").json
    assert [(fact["before"], fact["after"]) for fact in record["facts"]] == [
        ("English", None)
    ] and record["norms"]["1"] > 0
    same = run("diff", "latest", "latest", "-w", "space", "--json").json
    assert same["facts"] == [] and same["norms"] == {}
    assert run("revert", identity, "--fact", 1, "-w", "space").code == 5
    assert run("revert", identity, "--fact", 9, "-w", "space").code == 5
    back = run("revert", "latest", "-w", "space", "--json").json
    assert (
        back["active"] == 1
        and run("diff", identity, "latest", "-w", "space", "--json").json["norms"] == {}
    )


def test_verify_and_gc(run: Run, space: Path) -> None:
    assert run("apply", "facts.yaml", "-w", "space").code == 0
    proof = run("verify", "-w", "space", "--json")
    lost = proof.json["lost"]
    assert proof.code == (4 if lost else 0) and proof.json["integrity"]["revisions"] == 1
    loose = space / "deltas" / ("0" * 64)
    loose.mkdir()
    (loose / "edit.json").write_text("{}")
    assert "no revision names" in run("verify", "-w", "space").out
    assert (
        run("gc", "--dry-run", "-w", "space", "--json").json
        == {"format_version": 1, "deleted": ["0" * 64], "dry_run": True, "kept": []}
        and loose.is_dir()
    )
    assert "deleted 1 that" in run("gc", "-w", "space").out and not loose.exists()
    assert "nothing" in run("gc", "-w", "space").out
    (file,) = (space / "deltas").glob("*/delta.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert run("verify", "-w", "space").code == 5


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "holds no facts"),
        ("facts: 3", "holds no facts"),
        ("facts: [{subject: a}]", "entry 1"),
        ("gates: {x: 1}\nfacts: [{}]", "entry 1"),
    ],
)
def test_bad_files_are_refused(run: Run, space: Path, tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    for command in ("plan", "apply"):
        done = run(command, "bad.yaml", "-w", "space")
        assert done.code == 2 and word in done.err and "Traceback" not in done.err
    assert run("plan", "nowhere.yaml", "-w", "space").code == 2
    assert run("apply", "facts.yaml", "-w", "space", "--method", "nothing").code == 2


def test_the_schema_is_printed(run: Run) -> None:
    assert json.loads(run("schema").out)["title"] == "factsmith fact file"


ODD = [
    99,
    -1,
    1.0,
    True,
    "x",
    [],
    [99],
    [0, "a"],
    [0.5],
    {"a": "b"},
    "2024-01-01",
    None,
    [[1]],
    10**30,
    -0.5,
    "nan",
    "inf",
]


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("rome", ("layer", "steps", "lr", "scale", "strange")),
        ("memit", ("layers", "moment_weight")),
        ("alphaedit", ("threshold", "energy", "l2")),
        ("emmet", ("ridge",)),
    ],
)
def test_no_setting_ends_in_anything_but_words(
    run: Run, space: Path, tmp_path: Path, method: str, names: tuple[str, ...]
) -> None:
    """Any value of a setting gives a plan or a refusal, and never a fault of ours (exit code 1)."""
    codes = set()
    for name in names:
        for value in ODD:
            content = {
                "facts": [{"subject": "Edwin", "prompt": "{} lives in", "target": "Paris"}],
                "method": method,
            }
            (tmp_path / "odd.json").write_text(json.dumps({**content, "settings": {name: value}}))
            done = run("plan", "odd.json", "-w", "space")
            assert done.code in (0, 2), (name, value, done.code, done.err)
            assert done.code == 0 or "fault in factsmith" not in done.err, (name, value, done.err)
            codes.add(done.code)
    assert codes == {0, 2}


def test_verify_is_judged_by_what_apply_accepted(
    run: Run, space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe for CI: apply behind gates, then verify."""
    assert run("apply", "facts.yaml", "-w", "space").code == 0
    done = run("verify", "-w", "space", "--json")
    failed = [c for c in done.json["verification"]["checks"] if c["role"] == "prompt"]
    assert not any(check["held"] for check in failed), "two steps of search are too few"
    assert done.code == 0 and (done.json["lost"], done.json["accepted"]) == (0, 2)
    assert "did not hold when kept either" in run("verify", "-w", "space").out
    monkeypatch.setattr(bench, "held_when_kept", lambda _: {})
    done = run("verify", "-w", "space", "--json")
    assert done.code == 4 and (done.json["lost"], done.json["accepted"]) == (2, 0)


def test_a_damaged_patch_can_be_reverted_and_checked_out_again(run: Run, space: Path) -> None:
    first = run("apply", "facts.yaml", "-w", "space", "--json").json["outcome"]["revision"]
    (space.parent / "more.yaml").write_text(FILE.replace("Edwin", "Ann").replace("tongue", "word"))
    second = run("apply", "more.yaml", "-w", "space", "--json").json["outcome"]["revision"]
    file = space / "deltas" / second["delta"] / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    undone = run("revert", second["id"], "-w", "space", "--json")
    assert undone.code == 0 and undone.json["active"] == 1
    assert "facts that stay were not asked" in undone.err and second["id"][:10] in undone.err
    moved = run("checkout", second["id"], "-w", "space", "--json")
    assert moved.code == 5 and "damaged" in moved.err
    moved = run("checkout", first["id"], "-w", "space", "--json")
    assert moved.code == 0 and moved.json["asked"] == 2 and moved.json["lost"] == []
