"""The recipes for KubeRay and Slurm: what they start, in what order, and with which options."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from factsmith.cli import app

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"


def check_command(words: list[str]) -> None:
    """Check that the command line knows every option of a command."""
    assert words[0] == "factsmith"
    commands = typer.main.get_command(app)
    command = commands.commands[words[1]]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    options = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
    assert options and set(options) <= known


def test_kuberay_gets_a_job_whose_pods_are_alike() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    pods = [cluster["headGroupSpec"]["template"], group["template"]]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}
        assert container["resources"]["limits"]["memory"]
    assert pods[0]["spec"]["containers"][0]["image"] == pods[1]["spec"]["containers"][0]["image"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head does no parts"
    words = shlex.split(spec["entrypoint"])
    check_command(words)
    cpus = int(pods[1]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert int(words[words.index("--workers") + 1]) <= group["replicas"] * cpus
    with pytest.raises(AssertionError):
        check_command(["factsmith", "moments", "--no-such-option"])


STUBS = {
    # runs what follows the options, as another machine would
    "srun": 'echo "srun $* ($SRUN_CPUS_PER_TASK CPUs)" >> "$LOG"; '
    'while [ $# -gt 0 ]; do case $1 in -w) shift 2;; -*) shift;; *) break;; esac; done; "$@"',
    "scontrol": "printf 'one\\ntwo\\nthree\\n'",
    "hostname": "echo 127.0.0.1",
    "ray": 'case "$*" in *--head*) exec python3 -c '
    "\"import os, socket; s = socket.create_server(('127.0.0.1', int(os.environ['PORT']))); "
    's.accept()";; esac',
    "factsmith": 'echo "factsmith $*" >> "$LOG"',
}


def run_slurm(
    tmp_path: Path, ray: str = STUBS["ray"], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the script with stand-ins for Slurm and Ray."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, body in {**STUBS, "ray": ray}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NUM_NODES": "3"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    log = str(tmp_path / "log")
    return subprocess.run(
        ["bash", str(DEPLOY / "slurm.sbatch")],
        env={**os.environ, **slurm, **variables, "PATH": path, "LOG": log},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_slurm_starts_the_head_then_the_others_then_the_command(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = run_slurm(tmp_path, MODEL="/shared/m", TEXTS="/shared/*.parquet", PORT=str(port))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    steps = [line for line in lines if line.startswith("srun ")]
    assert all(line.endswith("(8 CPUs)") for line in steps), "each step has the CPUs of its machine"
    starts = [line for line in steps if "ray start" in line]
    assert "--head" in starts[0] and "-w one" in starts[0] and len(starts) == 3
    assert all(f"--address=127.0.0.1:{port}" in line for line in starts[1:])
    assert {line.split("-w ")[1].split()[0] for line in starts[1:]} == {"two", "three"}
    words = next(line for line in lines if line.startswith("factsmith ")).split()
    check_command(words)
    assert f"127.0.0.1:{port}" in words and words[words.index("--workers") + 1] == "24"
    assert words[words.index("--texts") + 1] == "/shared/*.parquet", "the pattern is not expanded"


def test_slurm_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    done = run_slurm(tmp_path)
    assert done.returncode != 0 and "MODEL: give the folder of the model" in done.stderr
    assert not (tmp_path / "log").exists()


def test_slurm_ends_if_the_head_does_not_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    done = run_slurm(tmp_path, ray="echo no memory >&2; exit 1", MODEL="m", TEXTS="t", PORT=port)
    assert done.returncode == 1
    assert "no memory" in done.stderr and "did not start on one" in done.stderr
    assert "factsmith" not in (tmp_path / "log").read_text()
