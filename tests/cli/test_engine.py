"""--ray and --workers: what they take, and that the work runs on workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factsmith import cli
from factsmith.cli import COMMANDS
from factsmith.cli.engine import with_ray_value
from factsmith.core.executor import executor_in_use

RAYS = ["find", "neuron", "browse", "census", "layers", "patch", "moments", "evaluate", "apply"]


def run(*words: str) -> int:
    """Run a command and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("atlas --ray --json", "atlas --ray=local --json"),
        ("--ray atlas", "--ray=local atlas"),
        ("atlas --ray", "atlas --ray=local"),
        ("--ray auto atlas", "--ray=auto atlas"),
        ("--ray 10.0.0.7:6379 atlas", "--ray=10.0.0.7:6379 atlas"),
        ("--ray [::1]:6379", "--ray=[::1]:6379"),
        ("--ray ray://head:10001 atlas", "--ray=ray://head:10001 atlas"),
        ("--ray=host:6379 atlas", "--ray=host:6379 atlas"),
        ("--ray models/x:1", "--ray=local models/x:1"),
        ("--ray --set a=b:1", "--ray=local --set a=b:1"),
        ("atlas -- --ray auto", "atlas -- --ray auto"),
        ("--raymond auto", "--raymond auto"),
    ],
)
def test_the_address_may_be_left_out(words: str, read: str) -> None:
    assert with_ray_value(words.split()) == read.split()


def test_which_commands_take_workers(capsys: pytest.CaptureFixture[str]) -> None:
    taking = [
        command.__name__
        for commands in COMMANDS.values()
        for command in commands
        if "ray" in command.__annotations__
    ]
    assert sorted(taking) == sorted(RAYS)
    assert run("census", "--help") == 0
    shown = capsys.readouterr().out
    assert "Cluster" in shown
    assert "[ADDRESS]" in shown


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["--workers", "2"], "--ray is not given", 2),
        (["--ray=ftp://x"], "ray://host:port", 7),
        (["--ray", "127.0.0.1:1"], "nothing answers at 127.0.0.1:1", 7),
        (["--ray", "--workers", "0"], "--workers", 2),
    ],
)
def test_wrong_workers_are_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str, code: int
) -> None:
    pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")
    assert run("moments", "atlas", "--layer", "1", *words) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out


def test_without_ray_the_error_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("moments", "atlas", "--layer", "1", "--ray", "--json") == 7
    error = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
    assert "pip install 'factsmith[ray]'" in error["message"]


def test_a_server_takes_no_workers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "http://127.0.0.1:1", "--suite", "x.json", "--ray"]
    assert run(*words) == 2
    assert "--ray: a server keeps its weights" in capsys.readouterr().err


def test_the_work_runs_on_the_workers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")
    from factsmith.cluster.engine import Ray

    used: list[Any] = []
    mapped: Callable[..., Any] = Ray.map

    def counted(self: Ray, *given: Any, **options: Any) -> Any:
        used.append(executor_in_use())
        return mapped(self, *given, **options)

    monkeypatch.setattr(Ray, "map", counted)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paris lies in France, and not at {n}." for n in range(200)))
    command = ["moments", "atlas", "--layer", "1", "--texts", str(text), "--json"]
    assert run(*command, "--out", str(tmp_path / "a"), "--ray", "--workers", "1") == 0
    assert [type(each) for each in used] == [Ray]
    with_workers = json.loads(capsys.readouterr().out)["moments"]
    assert run(*command, "--out", str(tmp_path / "b")) == 0
    alone = json.loads(capsys.readouterr().out)["moments"]
    assert len(used) == 1
    assert with_workers[0]["tokens"] == alone[0]["tokens"]


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)", "pass", "sys.exit(2)"])
def test_a_process_that_is_ended_has_last_words(end: str) -> None:
    program = (
        "import os, sys\nfrom factsmith.cli.engine import last_words\n"
        f"with last_words('it <ended> $HOME %s'):\n    {end}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    is_killed = "os." in end
    assert done.stderr == ("error: it <ended> $HOME %s\n" if is_killed else "")
    assert done.stdout == ""
