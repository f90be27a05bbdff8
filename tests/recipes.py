"""What docs/serve.md and deploy/ say, run in a folder: the page, and the jobs of CI.

with placed(folder, model):
    ports, port = prepared(folder)
    ran = PAGE.run(folder, environment(path, folder, PORT=port), replace=ports)
    check_page(ran, folder)
    project = Project(path, folder)
    project.merge(facts), project.job("deploy"), project.served()
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pages import Page, Ran, shell

ROOT = Path(__file__).resolve().parents[1]
PAGE = Page((ROOT / "docs/serve.md").read_text(encoding="utf-8"))
DEPLOY = ROOT / "deploy"
NOT_RUN = ("pip install", "docker compose")
"""Blocks with these words need the net or Docker. Other tests check them."""

TEN = """gates: {efficacy: 0.9, paraphrases: 0.5, neighbours: 0.5}
facts:
- {subject: Eiffel Tower, prompt: "The {} is located in the city of", target: Rome}
- {subject: Bulgaria, prompt: "The currency of {} is the", target: euro}
- {subject: Danielle Darrieux, prompt: "The mother tongue of {} is", target: English}
- {subject: Greece, prompt: "The capital of {} is", target: Madrid}
- {subject: Blake Mills, prompt: "{} was born in", target: Monroe}
- {subject: Fiat 127, prompt: "The maker of {} is", target: Toyota}
- {subject: Louvre, prompt: "The {} is located in the city of", target: London}
- {subject: Japan, prompt: "The capital of {} is", target: Osaka}
- {subject: Spain, prompt: "The capital of {} is", target: Lisbon}
- {subject: Romania, prompt: "The currency of {} is the", target: "Xqzwvbn Kjhgfd 77, Pzzt"}
"""
"""Ten facts; the last does not take."""


def with_others(facts: str) -> str:
    """Return facts with a paraphrase and a neighbour each, so that none are made."""
    content = yaml.safe_load(facts)
    for fact in content["facts"]:
        fact["paraphrases"] = [f"As is well known, {fact['prompt']}"]
        fact["neighbours"] = ["The capital of France is"]
    return yaml.safe_dump(content)


def free_ports(n: int) -> list[str]:
    """Return ports on which nothing listens."""
    with contextlib.ExitStack() as stack:
        trials = [stack.enter_context(socket.socket()) for _ in range(n)]
        for trial in trials:
            trial.bind(("127.0.0.1", 0))
        return [str(trial.getsockname()[1]) for trial in trials]


@contextlib.contextmanager
def placed(folder: Path, model: Path) -> Iterator[Path]:
    """A folder with the model and deploy/; servers that were left running are ended."""
    (folder / "model").symlink_to(model)
    shutil.copytree(DEPLOY, folder / "deploy")
    try:
        yield folder
    finally:
        for file in [*folder.glob("*.pid"), *folder.glob("run/pid")]:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)


def environment(path: str, place: Path, **more: str) -> dict[str, str]:
    """Return the environment of a shell."""
    kept = {name: value for name, value in os.environ.items() if name != "FACTSMITH_API_KEY"}
    return {**kept, "PATH": path, "HOME": str(place), **more}


def prepared(place: Path) -> tuple[dict[str, str], str]:
    """Write the files that the page wants, and return its ports and the one of vLLM."""
    (place / "facts.yaml").write_text(PAGE.blocks("yaml")[0])
    (place / "suite.json").write_text(PAGE.blocks("json")[0])
    vllm, llama = free_ports(2)
    return {":8000": f":{vllm}", "port 8000": f"port {vllm}", "8080": llama}, vllm


def check_page(ran: Ran, place: Path, answer: str = "Rome") -> None:
    """Check what the commands of the page printed."""
    assert ran.code == 0, ran.errors[-2000:]
    texts = [b for b in PAGE.blocks("sh") if not any(word in b for word in NOT_RUN)]
    said = dict(zip(texts, ran.outputs, strict=True))
    pushes = [out for text, out in said.items() if "factsmith push" in text and "jq" not in text]
    assert len(pushes) >= 7 and all("model: " in out for out in pushes)
    (said_answer,) = [out for text, out in said.items() if "choices[0].text" in text]
    assert said_answer.strip().startswith(answer)
    rollbacks = [out for text, out in said.items() if "--rollback" in text]
    assert len(rollbacks) == 2 and all("taken out: " in out for out in rollbacks)
    assert "model: base" in rollbacks[0]
    (two,) = [out for text, out in said.items() if "$IDS" in text]
    assert two.count(": proved") == 2
    (after,) = [out for text, out in said.items() if "serve.sh restart" in text]
    before = (place / "run/adapters").read_text().splitlines()
    names = [line.partition("=")[0] for line in before]
    assert names and all(name in after.replace("\n", "").replace(" ", "") for name in names)
    assert "as in the workspace" in " ".join(after.split()), "proved again after the restart"


class Project:
    """A repository of facts with a remote, a server, and the jobs of deploy/ci.yml."""

    def __init__(self, path: str, place: Path) -> None:
        (self.port,) = free_ports(1)
        self.place = place
        self.origin = place / "origin.git"
        self.jobs: dict[str, Any] = yaml.safe_load((DEPLOY / "ci.yml").read_text())
        (place / "adapters").mkdir()
        variables = {str(k): str(v) for k, v in self.jobs["variables"].items()}
        self.environment = environment(path, place) | variables
        self.environment |= {
            "ORIGIN": str(self.origin),
            "SERVER": f"http://127.0.0.1:{self.port}",
            "ADAPTERS": str(place / "adapters"),
            "SEEN_AS": str(place / "adapters"),
            "CI_COMMIT_TITLE": "Ten facts",
            "CI_COMMIT_SHORT_SHA": "0123456",
            "PORT": self.port,
        }
        ignored = PAGE.blocks("gitignore")[0]
        git = "git -c user.name=ada -c user.email=ada@localhost"
        self.did(
            "git init -q --bare -b main origin.git; git clone -q origin.git ada; cd ada;"
            f"printf '%s' '{ignored}' > .gitignore; factsmith init ../model space;"
            f"git add -A; {git} commit -qm Begin; git push -q origin HEAD:main"
        )

    def did(self, script: str, folder: str = ".") -> subprocess.CompletedProcess[str]:
        """Run a script that must succeed."""
        done = shell(f"set -e; {script}", self.place / folder, self.environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return done

    def merge(self, facts: str) -> None:
        """Change the file of facts on main."""
        (self.place / "ada/facts.yaml").write_text(facts)
        self.did(
            "git pull -q --ff-only origin main; git add facts.yaml;"
            "git -c user.name=ada -c user.email=ada@localhost commit -qm Facts;"
            "git push -q origin HEAD:main",
            "ada",
        )

    def job(self, name: str) -> tuple[int, str, subprocess.CompletedProcess[str]]:
        """Run a job in a new clone, as CI does; return its code and the line that ended it."""
        runner = self.place / "runner"
        shutil.rmtree(runner, ignore_errors=True)
        self.did("git clone -q origin.git runner; cd runner; git checkout -q --detach")
        script = "\n".join(
            f"echo {number} > ../line\n{line}"
            for number, line in enumerate(self.jobs[name]["script"])
        )
        done = shell(f"set -eo pipefail\n{script}", runner, self.environment)
        line = self.jobs[name]["script"][int((self.place / "line").read_text())]
        return done.returncode, line, done

    def served(self) -> dict[str, Any]:
        """Return what the server carries, as a clone of main sees it."""
        shutil.rmtree(self.place / "look", ignore_errors=True)
        done = self.did(
            "git clone -q origin.git look; cd look;"
            'factsmith served "$SERVER" -w space --folder "$ADAPTERS" --json'
        )
        server: dict[str, Any] = json.loads(done.stdout)["servers"][0]
        return server

    def changed(self, since: str) -> list[str]:
        """Return the files that changed on main since a commit."""
        done = self.did(f"git diff --name-only {since} main", "origin.git")
        return done.stdout.split()

    def head(self) -> str:
        """Return the commit of main."""
        return self.did("git rev-parse main", "origin.git").stdout.strip()
