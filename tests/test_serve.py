"""docs/serve.md and deploy/: every command runs, with servers that hold a real small model."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import factsmith as fs
from factsmith import atlas
from factsmith.keep.push.tolerance import TOLERANCES
from forked import forked
from model_server import ModelServer
from pages import shell
from recipes import (
    DEPLOY,
    NOT_RUN,
    PAGE,
    ROOT,
    TEN,
    Project,
    check_page,
    environment,
    free_ports,
    placed,
    prepared,
    with_others,
)
from server_programs import programs, vllm_parser

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a PATH with the programs factsmith, vllm and llama-server."""
    with forked(tmp_path_factory.mktemp("bin")) as folder:
        programs(folder)
        yield f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with placed(tmp_path, atlas.folder("atlas-llama")) as folder:
        yield folder


def test_every_command_of_the_page_runs(path: str, place: Path) -> None:
    ports, port = prepared(place)
    ran = PAGE.run(place, environment(path, place, PORT=port), leave_out=NOT_RUN, replace=ports)
    check_page(ran, place)


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


@pytest.fixture(scope="module")
def project(path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Return a repository of facts, with a server that runs."""
    place = tmp_path_factory.mktemp("project")
    with placed(place, atlas.folder("atlas-llama")):
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


def test_the_script_says_why_a_server_does_not_start(path: str, place: Path) -> None:
    """Needs no server."""
    port = free_ports(1)[0]
    wrong = environment(path, place, PORT=port, OPTIONS="--no-such-option")
    done = shell("deploy/serve.sh start", place, wrong)
    assert done.returncode == 1 and "unrecognized arguments: --no-such-option" in done.stderr
    assert not (place / "run/pid").exists()
    assert shell("deploy/serve.sh status", place, wrong).returncode == 1
    done = shell("deploy/serve.sh begin", place, wrong)
    assert done.returncode == 2 and "deploy/serve.sh start" in done.stdout


# ── Docker Compose ────────────────────────────────────────────────────────────────────────────────


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return content


SERVICE_KEYS = {
    *("build", "command", "environment", "healthcheck", "image", "ipc", "ports", "profiles"),
    *("restart", "volumes", "working_dir"),
}
"""Keys of a service, by the specification of Compose, that the file uses."""


def test_the_compose_file_is_one() -> None:
    content = compose()
    assert set(content) == {"services", "volumes"}
    settings = (DEPLOY / "env.example").read_text()
    for name, service in content["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        assert re.fullmatch(r"[\w./-]+:(v\d+\.\d+\.\d+|local)", service["image"])
        for volume in service["volumes"]:
            parts = re.fullmatch(r"(\$\{.*\}|\w+):(/[\w./-]+)(?::ro)?", volume)
            assert parts is not None, volume
            source = parts.group(1)
            assert source in content["volumes"] or source[2:].partition(":")[0] in settings
        for setting in re.findall(r"\$\{(\w+):\?", str(service)):
            assert re.search(rf"^{setting}=\S", settings, flags=re.MULTILINE), setting
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    server = content["services"]["server"]
    assert all(volume.endswith(":ro") for volume in server["volumes"])
    mine = [volume.split(":")[-2] for volume in server["volumes"]]
    theirs = [
        re.sub(":ro$", "", v).split(":")[-1] for v in content["services"]["factsmith"]["volumes"]
    ]
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


def test_the_messages_of_the_table_are_those_of_the_library() -> None:
    """The second column quotes messages."""
    files = [*ROOT.glob("src/factsmith/remote/*.py"), *ROOT.glob("src/factsmith/keep/push/*.py")]
    texts = " ".join(file.read_text(encoding="utf-8") for file in files)
    texts = re.sub(r'"\s+f?"', "", texts)
    table = PAGE.text.partition("## When something goes wrong")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if " | " in line][1:]
    quoted = [text for row in rows for text in re.findall("`(.+?)`", row[1])]
    assert len(quoted) >= 8
    for text in quoted:
        known = text.replace("401", "{status}").replace("60 s", "{seconds:g} s")
        assert known in texts, text
    assert "no such message" not in texts, "control"


def test_the_tolerances_of_the_page_are_those_of_the_library() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) nats \| ([\d.]+) nats \|", PAGE.text, re.MULTILINE)
    assert {dtype: (float(tie), float(far)) for dtype, tie, far in rows} == {
        name: (each.tie, each.difference) for name, each in TOLERANCES.items()
    }


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
