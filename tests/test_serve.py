"""docs/serve.md and deploy/: every command runs, with servers that hold a real small model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import factsmith as fs
from factsmith import atlas
from forked import forked
from model_server import ModelServer
from pages import Page, shell
from server_programs import programs, vllm_parser

ROOT = Path(__file__).resolve().parents[1]
PAGE = Page((ROOT / "docs/serve.md").read_text(encoding="utf-8"))
DEPLOY = ROOT / "deploy"
NOT_RUN = ("pip install", "docker compose")
"""Blocks with these words need the net or Docker. Other tests check them."""

pytestmark = pytest.mark.slow


def free_ports(n: int) -> list[str]:
    """Return ports on which nothing listens."""
    with contextlib.ExitStack() as stack:
        trials = [stack.enter_context(socket.socket()) for _ in range(n)]
        for trial in trials:
            trial.bind(("127.0.0.1", 0))
        return [str(trial.getsockname()[1]) for trial in trials]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a PATH with the programs factsmith, vllm and llama-server."""
    with forked(tmp_path_factory.mktemp("bin")) as folder:
        programs(folder)
        yield f"{folder}:{os.environ['PATH']}"


@contextlib.contextmanager
def placed(folder: Path) -> Iterator[Path]:
    """A folder with the model and deploy/; servers that were left running are ended."""
    shutil.copytree(atlas.folder("atlas-llama"), folder / "model")
    shutil.copytree(DEPLOY, folder / "deploy")
    try:
        yield folder
    finally:
        for file in [*folder.glob("*.pid"), *folder.glob("run/pid")]:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with placed(tmp_path) as folder:
        yield folder


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


def test_every_command_of_the_page_runs(path: str, place: Path) -> None:
    ports, port = prepared(place)
    ran = PAGE.run(
        place, environment(path, place, PORT=port), leave_out=NOT_RUN, replace=ports
    )
    assert ran.code == 0, ran.errors[-2000:]
    texts = [b for b in PAGE.blocks("sh") if not any(word in b for word in NOT_RUN)]
    said = dict(zip(texts, ran.outputs, strict=True))
    pushes = [out for text, out in said.items() if "factsmith push" in text and "jq" not in text]
    assert len(pushes) >= 7 and all("model: " in out for out in pushes)
    (answer,) = [out for text, out in said.items() if "choices[0].text" in text]
    assert answer.split() == ["Rome."]
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


@pytest.mark.parametrize(
    ("text", "wrong", "code", "blocks"),
    [
        ("model space", "no-such-model space", 3, 1),
        ("--enable-lora ", "", 2, 3),
    ],
)
def test_the_page_stops_where_a_command_fails(
    path: str, place: Path, text: str, wrong: str, code: int, blocks: int
) -> None:
    ports, port = prepared(place)
    ran = PAGE.run(
        place,
        environment(path, place, PORT=port),
        leave_out=NOT_RUN,
        replace={**ports, text: wrong},
    )
    assert text in PAGE.text
    assert (ran.code, len(ran.outputs)) == (code, blocks), ran.errors[-2000:]


# ── facts in git, and CI ──────────────────────────────────────────────────────────────────────────

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


@pytest.fixture(scope="module")
def project(path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Return a repository of facts, with a server that runs."""
    place = tmp_path_factory.mktemp("project")
    with placed(place):
        project = Project(path, place)
        project.did("deploy/serve.sh start")
        yield project


def test_ci_writes_proves_and_pushes_what_the_gates_allow(project: Project) -> None:
    """One of ten facts does not take, and the gates allow it."""
    project.merge(with_others(TEN))
    assert project.job("plan")[0] == 0
    code, _, done = project.job("deploy")
    said = " ".join(done.stdout.split())
    assert code == 0, done.stderr[-2000:]
    assert "did not hold when kept either" in said, "verify"
    assert "9 of 9 facts" in said and "not held before" in said, "push"
    assert "checked out" in said, "served"


def test_ci_stops_at_the_right_step(project: Project) -> None:
    """Needs the test above."""
    first, served = project.head(), project.served()
    assert served["up_to_date"] and len(served["adapters"]) == 1
    more = "- {subject: Alix Combelle, prompt: '{} plays the', target: viola}\n"
    project.merge(with_others(TEN + more).replace("0.9", "1.0"))
    code, line, done = project.job("deploy")
    assert code == 4 and line.startswith("factsmith apply"), done.stderr[-2000:]
    assert "efficacy" in done.stderr and project.served() == served
    assert project.changed(first) == ["facts.yaml"], "the workspace in git is as it was"

    project.merge(with_others(TEN.replace("target: euro", "target: dinar")))
    project.did(
        f"echo '{served['adapters'][0]['name']}={served['adapters'][0]['path']}' > run/adapters;"
        "deploy/serve.sh stop"
    )
    code, line, done = project.job("deploy")
    assert code == 6 and line.startswith("factsmith push"), done.stderr[-2000:]
    assert "space/ledger.db" in project.changed(first), "the ledger is safe"
    project.did("deploy/serve.sh start")
    code, line, done = project.job("deploy")
    assert code == 0, done.stderr[-2000:]
    assert project.served()["up_to_date"]

    twice = TEN + TEN.splitlines()[3].replace("euro", "dinar") + "\n"
    project.merge(with_others(twice))
    code, line, done = project.job("plan")
    assert code == 4 and line.startswith("factsmith plan"), done.stderr[-2000:]


def test_ci_rolls_back_from_another_clone(project: Project) -> None:
    """Needs the tests above: the server carries two revisions."""
    before = project.served()
    assert len(before["adapters"]) == 2
    code, _, done = project.job("rollback")
    after = project.served()
    assert code == 0, done.stderr[-2000:]
    assert [each["name"] for each in after["adapters"]] == [before["adapters"][0]["name"]]
    assert f"taken out: {before['adapters'][1]['name']}" in done.stdout
    assert not after["up_to_date"] and "behind" in after["adapters"][0]["standing"]


def test_a_clone_of_a_commit_that_came_too_early(project: Project) -> None:
    """The newest revision is still in ledger.db-wal, which git ignores."""
    project.did("git pull -q --ff-only origin main", "ada")
    with sqlite3.connect(project.place / "ada/space/ledger.db") as reader:
        reader.execute("SELECT * FROM revisions").fetchall()
        fact = '--subject Fiat --prompt "The headquarters of {} are in" --target Oslo'
        project.did(f"factsmith patch -w space {fact} --force", "ada")
        ignored = project.did("git status --short --ignored space", "ada").stdout
        assert "space/ledger.db-wal" in ignored, "the case is there"
        project.did(
            "git add -A; git -c user.name=a -c user.email=a@b commit -qm Early;"
            "rm -rf ../early; git clone -q . ../early",
            "ada",
        )
    reader.close()
    early = project.place / "early"
    done = shell("factsmith status -w space", early, project.environment)
    assert done.returncode == 5 and "factsmith recover" in done.stderr
    project.did("factsmith recover -w space; factsmith status -w space", "early")
    ids = [
        project.did("factsmith log -w space --json | jq -r .current", folder).stdout
        for folder in ("ada", "early")
    ]
    assert ids[0] == ids[1]


# ── Docker Compose ────────────────────────────────────────────────────────────────────────────────


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return content


SERVICE_KEYS = set(
    "build command environment healthcheck image ipc ports profiles restart volumes working_dir".split()
)
"""Keys of a service, by the specification of Compose, that the file uses."""


def test_the_compose_file_is_one() -> None:
    content = compose()
    assert set(content) == {"services", "volumes"}
    settings = (DEPLOY / "env.example").read_text()
    for name, service in content["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        assert re.fullmatch(r"[\w./-]+:(v\d+\.\d+\.\d+|local)", service["image"])
        for volume in service["volumes"]:
            source, target = re.fullmatch(r"(\$\{.*\}|\w+):(/[\w./-]+)(?::ro)?", volume).groups()  # type: ignore[union-attr]
            assert source in content["volumes"] or source[2:].partition(":")[0] in settings
            assert target.startswith("/")
        for setting in re.findall(r"\$\{(\w+):\?", str(service)):
            assert re.search(rf"^{setting}=\S", settings, flags=re.MULTILINE), setting
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    server = content["services"]["server"]
    assert all(volume.endswith(":ro") for volume in server["volumes"])
    mine = [volume.split(":")[-2] for volume in server["volumes"]]
    theirs = [re.sub(":ro$", "", v).split(":")[-1] for v in content["services"]["factsmith"]["volumes"]]
    assert set(mine) <= set(theirs), "both see the model and the adapters by the same paths"
    assert ".env" in (DEPLOY / ".gitignore").read_text().splitlines()
    dockerfile = (ROOT / content["services"]["factsmith"]["build"]["dockerfile"]).read_text()
    assert '".[serve]"' in dockerfile


def test_the_server_of_the_compose_file_takes_its_options() -> None:
    server = compose()["services"]["server"]
    options = vllm_parser().parse_args(["serve", *server["command"]])
    assert options.enable_lora and options.model == "/models/base"
    assert server["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    with pytest.raises(SystemExit):
        vllm_parser().parse_args(["serve", *server["command"], "--no-such-option"])


DOCKER = """
docker() {{  # what compose.yaml would run, without containers
    case "$2" in
    up)
        VLLM_API_KEY=$FACTSMITH_API_KEY VLLM_ALLOW_RUNTIME_LORA_UPDATING=True \\
            vllm serve {command} --port {port} > ../vllm.log 2>&1 &
        echo $! > ../vllm.pid
        until curl -fs http://127.0.0.1:{port}/health; do kill -0 $! || return 1; sleep 1; done
        ;;
    run) shift 4; (cd ../facts && factsmith "$@") ;;
    esac
}}
"""


def test_the_commands_of_compose_run(path: str, place: Path) -> None:
    (port,) = free_ports(1)
    (text,) = [block for block in PAGE.blocks("sh") if "docker compose" in block]
    (place / "facts").mkdir()
    (place / "facts/facts.yaml").write_text(PAGE.blocks("yaml")[0])
    paths = {"/models/base": f"{place}/model", "/adapters": f"{place}/adapters"}
    command = " ".join(compose()["services"]["server"]["command"])
    script = DOCKER.format(command=command, port=port) + text
    for old, new in {**paths, "http://server:8000": f"http://127.0.0.1:{port}"}.items():
        script = script.replace(old, new)
    keyed = environment(path, place, FACTSMITH_API_KEY="secret")
    done = shell(f"set -e\n{script}", place, keyed)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(": proved") == 1 and "checked out" in done.stdout
    assert list((place / "adapters").glob("factsmith-*.json"))
    assert "secret" not in done.stdout + done.stderr
    without = shell(
        f"factsmith served http://127.0.0.1:{port} -w facts/space", place, environment(path, place)
    )
    assert without.returncode == 6 and "FACTSMITH_API_KEY" in without.stderr, "control: no key"


def test_the_python_of_the_page_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lm = fs.load("model")
    with fs.Workbench(lm, "space") as bench:
        bench.apply(fs.Fact("Eiffel Tower", "The {} is located in the city of", "Rome"))
    with ModelServer(place / "model") as server:
        (code,) = PAGE.blocks("python")
        names: dict[str, Any] = {}
        exec(code.replace("http://127.0.0.1:8000", server.url), names)
    (pushed,) = names["pushed"]
    assert pushed.model.startswith("capitals-") and server.names == [], "rolled back"
