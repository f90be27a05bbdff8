"""GGUF on the command line: a file in, a patched file and an adapter out."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import FACT, PROMPT, Run
from gguf_files import write_gguf

WHERE = ["-w", "space"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tiny GGUF file, with a cache of its own."""
    monkeypatch.setenv("FACTSMITH_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", "gpt2", kind="Q8_0")
    return tmp_path / "tiny.gguf"


@pytest.mark.usefixtures("quick")
def test_a_file_goes_in_and_comes_out_patched(run: Run, file: Path) -> None:
    made = run("init", file, "space")
    assert made.code == 0 and "was dequantised to float32" in " ".join(made.err.split())
    assert "tiny.gguf (F32" in " ".join(made.out.split())
    answers = [run("ask", *where, PROMPT, "--json").json["answer"] for where in ([file], WHERE)]
    assert answers[0] == answers[1]
    assert run("patch", "-w", "space", *FACT, "--force").code == 0
    shown = run("export", "patched.gguf", "--format", "gguf", "-w", "space")
    assert shown.code == 0 and "byte for byte" in " ".join(shown.out.split())
    shown = run("export", "patch.gguf", "--format", "gguf-adapter", "-w", "space", "--json").json
    assert shown["rank"] == 1 and Path("patch.gguf.factsmith.json").is_file()
    status = run("status", "-w", "space")
    assert "made from" in status.out and "tiny.gguf, " in status.out
    patched = run("ask", "patched.gguf", PROMPT, "--json").json
    assert patched["answer"] == run("ask", "-w", "space", PROMPT, "--json").json["answer"]


@pytest.mark.usefixtures("quick")
def test_what_cannot_be_exported_is_said_before_a_model_is_loaded(run: Run, file: Path) -> None:
    run("init", file, "space")
    run("patch", "-w", "space", *FACT, "--force")
    refused = run("export", "out", "--format", "gguf", "-w", "space")
    assert refused.code == 2 and "does not end in .gguf" in " ".join(refused.err.split())
    refused = run("export", "a.gguf", "-f", "gguf", "--tensor-type", "Q2_K", "-w", "space")
    assert refused.code == 2 and "F16, Q8_0, BF16 or F32" in " ".join(refused.err.split())
    refused = run("export", file, "--format", "gguf", "-w", "space", "--overwrite")
    assert refused.code == 2 and "is not an export" in " ".join(refused.err.split())
    file.write_bytes(file.read_bytes()[:5000])
    damaged = run("ask", "-w", "space", PROMPT)
    assert damaged.code == 3 and "damaged" in " ".join(damaged.err.split())
    file.unlink()
    missing = run("ask", "-w", "space", PROMPT)
    assert missing.code == 3 and "FACTSMITH_MODEL" in " ".join(missing.err.split())
