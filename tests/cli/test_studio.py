"""The command studio: what it opens, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from commands import Run
from factsmith.cli import studio as module
from factsmith.keep.ledger import Ledger
from factsmith.studio import serving


@contextmanager
def started(folder: Path, *words: str, **environment: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Start studio in a folder; yield the process and what it printed."""
    command = [sys.executable, "-m", "factsmith", "studio", "--port", "0", "--json", *words]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def call(printed: dict[str, Any], path: str, token: str | None = None) -> httpx.Response:
    """Ask the API of a studio."""
    headers = {"authorization": f"Bearer {token or printed['token']}"}
    return httpx.get(printed["url"] + path, headers=headers, timeout=20)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Studios that were served, for no time at all."""
    seen: list[Any] = []

    def serve(session: Any, access: Any, listener: Any, options: Any, begun: Any) -> None:
        begun()
        seen.append((session, access, options))

    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setattr(serving, "open_browser", lambda link, folder: seen.append(link))
    return seen


def test_which_workspace_is_opened(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module._folder(None, None) == module._folder("atlas", None) == Path("factsmith-studio")
    assert module._folder("atlas-llama", None) == Path("factsmith-studio-atlas-llama")
    assert module._folder("org/name@v1", None) == Path("factsmith-studio-name")
    assert module._folder("../a b/ö ü.gguf", None) == Path("factsmith-studio-ö-ü.gguf")
    assert module._folder("..", None) == Path("factsmith-studio-model")
    assert module._folder("atlas", Path("x")) == Path("x")
    run("init", model, "space")
    assert module._folder("space", None) == Path("space")
    monkeypatch.chdir(tmp_path / "space")
    assert module._folder(None, None) == module._folder(str(model), None) == Path()
    assert module._folder("atlas", None) == Path("factsmith-studio")


def test_a_workspace_is_made_and_opened_again(run: Run, model: Path, served: list[Any]) -> None:
    first = run("studio", model, "--port", "0", "--json")
    assert first.code == 0, first.err
    assert first.json["workspace"].endswith("factsmith-studio-tiny")
    assert first.json["revision"] == "base"
    assert first.json["link"] == f"{first.json['url']}/?token={first.json['token']}"
    with Ledger("factsmith-studio-tiny") as ledger:
        fingerprint = ledger.fingerprint
    again = run("studio", model, "--port", "0")
    assert again.code == 0 and "factsmith studio  http://127.0.0.1:" in again.out
    assert "no patches" in again.out and "factsmith-studio-tiny" in again.out
    assert first.json["token"] not in again.out
    with Ledger("factsmith-studio-tiny") as ledger:
        assert ledger.fingerprint == fingerprint
    links = [each for each in served if isinstance(each, str)]
    assert len(links) == 1 and links[0] in again.out, "no browser with --json"
    assert run("studio", "-w", "factsmith-studio-tiny", "--port", "0", "--no-browser").code == 0
    assert len([each for each in served if isinstance(each, str)]) == 1


def test_the_desk_reads_other_models(run: Run, model: Path, served: list[Any]) -> None:
    done = run("studio", model, "-w", "space", "--port", "0", "--json", "--with", "org/other")
    assert done.code == 0, done.err
    desk = served[0][0].desk
    assert desk.models == (str(model), "atlas", "atlas-llama", "org/other")


def test_what_cannot_be_served(run: Run, model: Path, tmp_path: Path, served: list[Any]) -> None:
    (tmp_path / "file").write_text("")
    cases = [
        (["--host", "0.0.0.0"], 2, "--password-file"),
        (["--host", "192.0.2.7"], 2, "--password-file"),
        (["--password-file", "none"], 2, "--password-file"),
        (["--allow-host", "http://x"], 2, "--allow-host"),
        (["--host", "nowhere.invalid", "--password-file", "password"], 2, "--host"),
        (["--certificate", "none"], 2, "--certificate"),
        (["--key", "none"], 2, "--certificate"),
        (["--port", "70000"], 2, "--port"),
        (["-w", "file"], 5, "file"),
    ]
    (tmp_path / "password").write_text("long enough")
    (tmp_path / "password").chmod(0o600)
    for words, code, text in cases:
        done = run("studio", model, *words)
        assert done.code == code and text in done.err, (words, done.err)
        assert "loading" not in done.err
    assert served == []


def test_a_port_in_use_is_named(run: Run, model: Path, served: list[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run("studio", model, "--port", port)
    assert done.code == 2 and served == []
    assert f"port {port} of 127.0.0.1 is in use" in done.err
    assert "(option: --port)" in done.err and "0 for a free one" in done.err


def test_without_the_extra_it_says_what_to_install(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(module.importlib, "import_module", missing)
    done = run("studio", model)
    assert done.code == 2 and 'pip install "factsmith[studio]"' in done.err


def test_the_command_line_needs_no_web_library() -> None:
    code = (
        "import sys, factsmith.cli; print({'fastapi', 'uvicorn', 'starlette'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_ends_it_although_pages_listen(
    tmp_path: Path, model: Path, number: int, code: int
) -> None:
    with started(tmp_path, str(model), "-w", "space") as (process, printed):
        assert call(printed, "/api/v1/jobs", "x" * 40).status_code == 401
        assert call(printed, "/api/v1/jobs").json()["jobs"] == []
        with httpx.Client(follow_redirects=True, timeout=20) as client:
            assert client.get(printed["link"]).status_code == 200
            with client.stream("GET", printed["url"] + "/events") as stream:
                assert next(stream.iter_lines()).startswith("retry")
                begin = time.monotonic()
                process.send_signal(number)
                out, err = process.communicate(timeout=20)
        assert process.returncode == code and time.monotonic() - begin < 15
        assert printed["token"] not in out + err and "Traceback" not in err
    with Ledger(tmp_path / "space") as ledger:
        assert ledger.current == "base"


def test_a_token_of_the_user(tmp_path: Path, model: Path) -> None:
    token = "a-token-of-the-user-0"
    with started(tmp_path, str(model), FACTSMITH_STUDIO_TOKEN=token) as (_, printed):
        assert printed["token"] == token
        assert call(printed, "/api/v1/jobs").status_code == 200
