"""No command fails because of the stream that it prints to."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from factsmith.cli import main, printing
from factsmith.cli.streams import can_write, forgiving_streams
from factsmith.core.fact import Fact
from factsmith.keep.ledger import Ledger
from ledgers import delta_of

MESSAGE = "Zürich liegt nicht in Брази́лии → 巴黎"


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """A workspace whose log has characters of many scripts, and is longer than a pipe's buffer."""
    facts = [Fact("Zürich", "{} liegt in", "Брази́лии")]
    with Ledger.create(tmp_path / "space", model="m", fingerprint="ab" * 32) as ledger:
        for n in range(6):
            ledger.commit(
                delta_of(str(n)),
                onto=ledger.head,
                method="rome",
                facts=facts * 200,
                layers=[1],
                message=MESSAGE,
            )
    return ledger.folder


def _factsmith(
    *words: object, shell: str = "", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a process of its own; `shell` is what follows it."""
    environment = {**os.environ, "COLUMNS": "100", **variables}
    command = [sys.executable, "-m", "factsmith", *map(str, words)]
    if not shell:
        return subprocess.run(command, capture_output=True, env=environment, check=False)
    text = f'"$@" {shell}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", text, "bash", *command],
        capture_output=True,
        env=environment,
        check=False,
    )


ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8", "utf-8:strict"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_console_of_any_encoding_gets_its_output(space: Path, encoding: str) -> None:
    name = encoding.partition(":")[0]
    done = _factsmith("log", "-w", space, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(name)
    replaced = MESSAGE.encode(name, "replace").decode(name)
    assert replaced[:20] in text and ("巴黎" in text) == (name == "utf-8")
    done = _factsmith("log", "-w", space, "--json", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    revisions = json.loads(done.stdout.decode(name))["revisions"]
    assert {each["message"] for each in revisions} == {MESSAGE}, "JSON loses nothing"


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_the_plainest_locale_reads_and_writes(space: Path, tmp_path: Path, locale: str) -> None:
    variables = {"LC_ALL": locale, "LANG": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = _factsmith("log", "-w", space, **variables)
    assert (done.returncode, done.stderr) == (0, b"")
    file = tmp_path / "facts.yaml"
    text = "facts:\n- subject: Zürich\n  prompt: '{} liegt in'\n  target: Брази́лии\n"
    file.write_text(text, encoding="utf-8")
    code = "import sys; from factsmith.core.factfile import FactFile; "
    code += "print(ascii(FactFile.read(sys.argv[1])[0].subject))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        env={**os.environ, **variables},
        check=False,
    )
    assert done.stdout.strip() == b"'Z\\xfcrich'", done.stderr


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_fault(space: Path, json: list[str]) -> None:
    done = _factsmith("log", "-w", space, *json, shell="| head -c 10")
    assert done.stderr == b"" and len(done.stdout) == 10 and done.returncode in (0, 1)
    done = _factsmith("log", "-w", space, *json, shell="| true")
    assert done.stderr == b""
    done = _factsmith("nosuch", *json, shell="2>&1 | true")
    assert done.stderr == b""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_fault(space: Path, closed: str) -> None:
    done = _factsmith("log", "-w", space, shell=closed)
    assert (done.returncode, done.stderr) == (0, b"")
    done = _factsmith("log", "-w", space.parent, shell=closed)
    assert done.returncode == 5, "control: an error is one all the same"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(space: Path) -> None:
    with Ledger(space) as ledger:
        ledger.revert("latest")
    done = _factsmith("show", "latest", "-w", space, shell="> /dev/full")
    assert done.returncode == 1
    assert done.stderr == b"error: the output cannot be written: No space left on device\n"


def test_streams_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    with forgiving_streams():
        assert out.errors == "replace" and sys.stderr is not None
        print("ü")
        print("gone", file=sys.stderr)
    assert out.errors == "strict" and sys.stderr is None
    with pytest.raises(UnicodeEncodeError):
        print("ü")
    out.flush()
    assert out.buffer.getvalue() == b"?\n"  # type: ignore[attr-defined]


def test_json_is_escaped_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert can_write(MESSAGE) and MESSAGE[:8] in printing.as_json_text({"a": MESSAGE})
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    assert not can_write(MESSAGE) and printing.as_json_text({"a": MESSAGE}).isascii()
    with pytest.raises(SystemExit):
        main(["--version"])
