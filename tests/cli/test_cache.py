"""`factsmith cache`: what is kept for models, and how it goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import FACT, Run


def test_what_is_kept_is_listed_and_cleared(run: Run, model: Path, fresh_cache: Path) -> None:
    nothing = run("cache")
    assert nothing.code == 0 and f"nothing is kept in {fresh_cache}" in nothing.out
    assert run("moments", model, "--layer", 1).code == 0
    (fresh_cache / "index" / "abc").mkdir(parents=True)
    (fresh_cache / "index" / "abc" / "triggers").write_bytes(bytes(5_000_000))
    (fresh_cache / "a file of somebody").write_text("to stay")
    listed = run("cache", "--json").json
    assert [entry["kind"] for entry in listed["entries"]] == ["moments", "index"]
    assert listed["entries"][0]["model"] == str(model) and not listed["deleted"]
    sizes = [
        sum(file.stat().st_size for file in (fresh_cache / kind).rglob("*") if file.is_file())
        for kind in ("moments", "index")
    ]
    assert [entry["bytes"] for entry in listed["entries"]] == sizes
    assert listed["bytes"] == sum(sizes)
    assert "5.0" in run("cache", "index").out and "moments" not in run("cache", "index").out
    cleared = run("cache", "moments", "--clear", "--json").json
    assert cleared["deleted"] and cleared["bytes"] == sizes[0]
    assert [entry["kind"] for entry in run("cache", "--json").json["entries"]] == ["index"]
    assert run("cache", "--clear").code == 0
    assert run("cache", "--json").json["entries"] == []
    assert (fresh_cache / "a file of somebody").read_text() == "to stay"


def test_another_kind_is_refused(run: Run) -> None:
    done = run("cache", "weights", "--clear")
    assert done.code == 2 and "no 'weights'" in done.err and "moments, index, gguf" in done.err


def test_moments_need_no_workspace_and_no_text(
    run: Run, model: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("moments", model, "--layer", 1, "--json").json
    assert first["folder"] is None and first["moments"][0]["corpus"].startswith("ordinary1-")
    monkeypatch.setattr(
        "factsmith.corpus.moments_store.moments_with_total", lambda *_, **__: pytest.fail("again")
    )
    assert run("moments", model, "--layer", 1, "--json").json["moments"] == first["moments"]
    alone = run("patch", model, *FACT, "--layer", 1, "--json", "--force").json
    for name in ("one", "two"):
        assert run("init", model, name).code == 0
        kept = run("patch", "-w", name, *FACT, "--layer", 1, "--json", "--force").json
        assert kept["moments"] == alone["moments"]
        assert (tmp_path / name / "moments" / "layer1.safetensors").is_file()
    assert run("cache", "--clear").code == 0
    assert run("verify", "-w", "two", "--json").code in (0, 4)
    removed = run("revert", "latest", "-w", "one", "--json")
    assert removed.code == 0
