"""Runs of the command line, and models to run it on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from commands import Done, Run, atlas_model
from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith import cli
from factsmith.edit.configs import RomeConfig
from factsmith.keep import bench as keep_bench
from factsmith.model import load as load_module
from factsmith.model.load import load
from factsmith.patch import bench
from factsmith.patch.layer_choice import depth_choice
from factsmith.patch.proposal import Proposal


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Run the command line in this process, in an empty folder, with `factsmith` on the PATH."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    program = tmp_path_factory.mktemp("bin") / "factsmith"
    program.touch(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("FACTSMITH_TRACEBACK", raising=False)

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = end.value.code
        return Done(code if isinstance(code, int) else 0, out, err)

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model as a folder on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("gpt2", **GPT2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def atlas(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the bundled model, which knows facts; loaded once."""
    monkeypatch.setattr(
        load_module,
        "load",
        lambda name, **options: atlas_model() if name == "atlas" else load(name, **options),
    )
    return "atlas"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches that take no time: what is tested here is the command line."""
    monkeypatch.setattr(
        RomeConfig, "recommended", classmethod(lambda cls, lm: cls(layer=1, steps=2))
    )
    for module in (bench, keep_bench):
        monkeypatch.setattr(module, "first_choice", lambda lm: depth_choice(lm, 1, "it is tiny"))
    monkeypatch.setattr(Proposal, "failed", False)  # two steps are not enough to hold
