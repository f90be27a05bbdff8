"""A wrong argument is found before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands import FACT, PROMPT, Run
from factsmith.model import load as load_module

FACTS = json.dumps(
    {"facts": [{"subject": "Edwin", "prompt": "The home of {} is", "target": "Rome"}]}
)


class Loaded(BaseException):
    """A model was loaded."""


@pytest.fixture
def space(run: Run, model: Path, tmp_path: Path) -> Path:
    """A workspace, and files that commands read."""
    assert run("init", model, "space").code == 0
    (tmp_path / "facts.json").write_text(FACTS)
    (tmp_path / "gate.yaml").write_text(
        "gates: {effcacy: 1}\nfacts: [{subject: E, prompt: '{} is', target: x}]"
    )
    (tmp_path / "gate2.yaml").write_text(
        "gates: {efficacy: 7}\nfacts: [{subject: E, prompt: '{} is', target: x}]"
    )
    (tmp_path / "text.txt").write_text("A text.\n")
    (tmp_path / "bytes.txt").write_bytes(b"Caf\xe9 \xfa")
    (tmp_path / "a-file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("x")
    return tmp_path / "space"


TRACE = ("trace", "MODEL", PROMPT, "--subject", "Danielle Darrieux")
IN = ("-w", "space")
WRONG: list[tuple[tuple[str, ...], str]] = [
    (("init", "MODEL", "a-file"), "a-file"),
    (("init", "MODEL", "a-file/below"), "a-file"),
    (("init", "MODEL", "space"), "already"),
    (("init", "MODEL", "/proc/space"), "/proc"),
    (("ask", "MODEL", ""), "empty"),
    (("explain", "MODEL", ""), "empty"),
    (("explain", "MODEL", PROMPT, "--target", ""), "target"),
    (("explain", "MODEL", PROMPT, "--instead-of", ""), "--instead-of"),
    (("explain", "MODEL", PROMPT, "--out", "x.jpg"), ".jpg"),
    (("explain", "MODEL", PROMPT, "--out", "nowhere/x.png"), "nowhere"),
    (("find", "MODEL", ""), "empty"),
    (("find", "MODEL", "x", "--texts", "nowhere.txt"), "nowhere.txt"),
    (("find", "MODEL", "x", "--texts", "full"), "full"),
    (("find", "MODEL", "x", "--texts", "bytes.txt"), "bytes.txt"),
    (("find", "MODEL", "x", "--index", "a-file"), "a-file"),
    (("find", "MODEL", "x", "--index", "/proc/index"), "/proc"),
    (("neuron", "MODEL", "1", "2", "--index", "a-file"), "a-file"),
    (("neuron", "MODEL", "1", "2", "--out", "x.png"), ".html"),
    (("neuron", "MODEL", "1", "2", "--out", "nowhere/x.html"), "nowhere"),
    (("neuron", "MODEL", "1"), "layer and number"),
    (("browse", "MODEL", "--out", "a-file"), "a-file"),
    (("browse", "MODEL", "--out", "/proc/pages"), "/proc"),
    (("browse", "MODEL", "--layer", "-1"), "--layer"),
    (("browse", "MODEL", "--index", "a-file"), "a-file"),
    (("browse", "--index", "nowhere"), "nowhere"),
    (("census", "MODEL", "--index", "a-file"), "a-file"),
    (("census", "MODEL", "--texts", "nowhere.txt"), "nowhere.txt"),
    ((*TRACE, "--out", "x.jpg"), ".jpg"),
    ((*TRACE, "--samples", "0"), "--samples"),
    ((*TRACE, "--noise", "0"), "--noise"),
    ((*TRACE, "--noise", "-1"), "--noise"),
    ((*TRACE, "--noise", "nan"), "--noise"),
    ((*TRACE, "--kind", "mlp", "--window", "0"), "--window"),
    ((*TRACE, "--kind", "no"), "--kind"),
    ((*TRACE, "--target", ""), "--target"),
    ((*TRACE, "--replacement", "Edwin"), "--replacement"),
    ((*TRACE, "--corruption", "replace", "--noise", "1"), "--noise"),
    ((*TRACE, "--corruption", "replace", "--fast", "--sever", "mlp"), "--sever"),
    (("trace", "MODEL", "nowhere.yaml"), "nowhere.yaml"),
    (("trace", "MODEL", "facts.json", "--samples", "0"), "--samples"),
    (("trace", "MODEL", "facts.json", "--window", "0"), "--window"),
    (("trace", "MODEL", "facts.json", "--noise", "-1"), "--noise"),
    (("neurons", "MODEL", PROMPT, "--target", ""), "--target"),
    (("neurons", "MODEL", PROMPT, "--threshold", "2"), "--threshold"),
    (("neurons", "MODEL", PROMPT, "--threshold", "nan"), "--threshold"),
    (("neurons", "MODEL", PROMPT, "--share", "0"), "--share"),
    (("neurons", "MODEL", PROMPT, "--share", "1.5"), "--share"),
    (("neurons", "MODEL", PROMPT, "--paraphrase", ""), "empty"),
    (("neurons", "MODEL", PROMPT, "--out", "x.jpg"), ".jpg"),
    (("layers", "MODEL", "--facts", "nowhere.yaml"), "nowhere.yaml"),
    (("layers", "MODEL", "--refresh"), "--refresh"),
    (("layers", "MODEL", "--preset", "--facts", "facts.json"), "--preset"),
    (("moments", "MODEL", "--layer", "-1"), "--layer"),
    (("moments", "MODEL", "--layer", "1", "--layer", "1"), "--layer"),
    (("moments", "MODEL", "--texts", "nowhere.txt"), "nowhere.txt"),
    (("moments", "MODEL", "--max-tokens", "0"), "--max-tokens"),
    (("moments", "MODEL", "--max-tokens", "nan"), "--max-tokens"),
    (("moments", "MODEL", "--out", "a-file"), "a-file"),
    (("moments", "MODEL", "--out", "/proc/moments"), "/proc"),
    (("patch", "MODEL", *FACT, "--method", "rme"), "rme"),
    (("patch", "MODEL", *FACT, "--set", "stps=3"), "stps"),
    (("patch", "MODEL", *FACT, "--set", "steps=0"), "steps"),
    (("patch", "MODEL", *FACT, "--set", "steps"), "--set"),
    (("patch", "MODEL", *FACT, "--set", "clamp=many"), "clamp"),
    (("patch", "MODEL", *FACT, "--layer", "-1"), "--layer"),
    (("patch", "MODEL", *FACT, "--layer", "0", "--layer", "1"), "--layer"),
    (("patch", "MODEL", *FACT, "--moments", "nowhere"), "nowhere"),
    (("patch", "MODEL", *FACT, "--moments", "full"), "full"),
    (("patch", "MODEL", *FACT, "--texts", "nowhere.txt"), "nowhere.txt"),
    (("patch", "MODEL", *FACT, "--neighbour", ""), "neighbour"),
    (("patch", "MODEL", *FACT, "--paraphrase", ""), "paraphrase"),
    (("patch", "MODEL", "gate.yaml"), "effcacy"),
    (("patch", "MODEL", "gate2.yaml"), "efficacy"),
    (("patch", *FACT, "-w", "nowhere"), "nowhere"),
    (("evaluate", "MODEL", "--methods", "rome,mmit"), "mmit"),
    (("evaluate", "MODEL", "--methods", ""), "--methods"),
    (("evaluate", "MODEL", "--methods", "rome,rome"), "rome"),
    (("evaluate", "MODEL", "--sizes", "1,x"), "--sizes"),
    (("evaluate", "MODEL", "--sizes", ""), "--sizes"),
    (("evaluate", "MODEL", "--suite", "nowhere.json"), "nowhere.json"),
    (("evaluate", "MODEL", "--suite", "zsre-no:facts.json"), "zsre-no"),
    (("evaluate", "MODEL", "--suite", "bytes.txt"), "bytes.txt"),
    (("evaluate", "MODEL", "--set", "rome.stps=3"), "stps"),
    (("evaluate", "MODEL", "--set", "rome.steps=0"), "steps"),
    (("evaluate", "MODEL", "--set", "mmit.steps=3"), "mmit"),
    (("evaluate", "MODEL", "--set", "emmet.steps=3"), "emmet"),
    (("evaluate", "MODEL", "--set", "steps=3"), "--set"),
    (("evaluate", "MODEL", "--texts", "nowhere.txt"), "nowhere.txt"),
    (("evaluate", "MODEL", "--out", "a-file"), "a-file"),
    (("evaluate", "MODEL", "--out", "/proc/judged"), "/proc"),
    (("evaluate", "MODEL", "--tasks", "no_such_task"), "no_such_task"),
    (("evaluate", "MODEL", "--tasks", "hellaswag", "--tasks-folder", "nowhere"), "nowhere"),
    (("drift", "MODEL"), "--delta"),
    (("drift", "MODEL", "--delta", "nowhere"), "nowhere"),
    (("drift", "MODEL", "--delta", "full"), "full"),
    (("drift", *IN, "--limit", "kl=1"), "kl"),
    (("drift", *IN, "--limit", "kl_text=x"), "--limit"),
    (("drift", *IN, "--limit", "kl_text=-1"), "kl_text"),
    (("drift", *IN, "--texts", "nowhere.txt"), "nowhere.txt"),
    (("drift", *IN), "no patch"),
    (("plan", "nowhere.yaml", *IN), "nowhere.yaml"),
    (("plan", "facts.json", *IN, "--method", "rme"), "rme"),
    (("plan", "facts.json", *IN, "--set", "stps=3"), "stps"),
    (("apply", "gate.yaml", *IN), "effcacy"),
    (("apply", "facts.json", *IN, "--method", "rme"), "rme"),
    (("apply", "facts.json", *IN, "--set", "steps=0"), "steps"),
    (("apply", "facts.json", *IN, "--texts", "nowhere.txt"), "nowhere.txt"),
    (("diff", "ffff", "latest", *IN), "ffff"),
    (("diff", "base", "ffff", *IN), "ffff"),
    (("diff", "base", "latest", "-w", "nowhere"), "nowhere"),
    (("revert", "ffff", *IN), "ffff"),
    (("revert", "latest", *IN, "--moments", "nowhere"), ""),
    (("verify", "-w", "nowhere"), "nowhere"),
    (("capacity", *IN, "--limit", "0"), "--limit"),
    (("capacity", *IN, "--limit", "nan"), "--limit"),
    (("capacity", *IN, "--limit", "101"), "--limit"),
    (("capacity", *IN, "--texts", "nowhere.txt"), "nowhere.txt"),
    (("export", "out", *IN, "--format", "gguf"), "gguf"),
    (("export", "out", *IN, "--dtype", "int8"), "int8"),
    (("export", "out", *IN, "--rank", "4"), "--rank"),
    (("export", "out", *IN, "--base", "x"), "--base"),
    (("export", "out", *IN, "-f", "adapter", "--rank", "0"), "--rank"),
    (("export", "out", *IN, "-f", "patch", "--dtype", "float16"), "dtype"),
    (("export", "a-file", *IN), "a-file"),
    (("export", "full", *IN), "full"),
    (("export", "full", *IN, "--overwrite"), "full"),
    (("export", "/proc/out", *IN), "/proc"),
    (("export", "out", *IN, "--dtype", "float16"), "no patch"),
    (("import", "nowhere", *IN), "nowhere"),
    (("import", "full", *IN), "full"),
    (("import", "a-file", *IN), "a-file"),
    (("demo", "a-file"), "a-file"),
    (("demo", "space"), "another model"),
]


RIGHT: list[tuple[str, ...]] = [
    ("init", "MODEL", "other"),
    ("ask", "MODEL", PROMPT),
    ("explain", "MODEL", PROMPT, "--target", "x", "--out", "x.png"),
    ("lens", "MODEL", PROMPT, "--target", "x"),
    ("at", "MODEL", PROMPT, "--layer", "1", "--token", "-1"),
    ("intervene", "MODEL", PROMPT, "--neuron", "1 2", "--factor", "2"),
    ("find", "MODEL", "x", "--texts", "text.txt", "--index", "index"),
    ("neuron", "MODEL", "1", "2", "--out", "x.html"),
    ("browse", "MODEL", "--layer", "1", "--index", "index"),
    ("census", "MODEL", "--quick"),
    (*TRACE, "--noise", "0.1", "--kind", "mlp", "--window", "2", "--out", "x.svg"),
    (*TRACE, "--corruption", "replace", "--replacement", "Edwin"),
    ("trace", "MODEL", "facts.json", "--noise", "1"),
    ("neurons", "MODEL", PROMPT, "--threshold", "1", "--share", "0.5"),
    ("layers", *IN, "--refresh"),
    ("layers", "MODEL", "--preset"),
    ("moments", "MODEL", "--layer", "1", "--layer", "2", "--max-tokens", "inf", "--out", "m"),
    ("patch", "MODEL", *FACT, "--method", "memit", "--set", "steps=3", "--layer", "1"),
    ("evaluate", "MODEL", "--methods", "rome,ft", "--set", "rome.steps=3", "--set", "ft.lr=1"),
    ("plan", "facts.json", *IN),
    ("apply", "facts.json", *IN, "--set", "steps=3"),
    ("diff", "base", "base", *IN),
    ("verify", *IN),
    ("capacity", *IN, "--limit", "5"),
]


def unloadable(*_: Any, **__: Any) -> None:
    """Stand for `load` where no model may be loaded."""
    raise Loaded


def named(words: tuple[str, ...], model: Path) -> list[str]:
    """Return the words with the model's folder in its place."""
    return [str(model) if word == "MODEL" else word for word in words]


@pytest.mark.usefixtures("space")
@pytest.mark.parametrize("words", RIGHT, ids=lambda words: " ".join(words)[:60])
def test_right_arguments_load_a_model(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(load_module, "load", unloadable)
    with pytest.raises(Loaded):
        run(*named(words, model))


@pytest.mark.usefixtures("space")
@pytest.mark.parametrize(
    ("words", "wanted"), [pytest.param(*case, id=" ".join(case[0])[:60]) for case in WRONG]
)
def test_a_wrong_argument_is_found_before_a_model_is_loaded(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], wanted: str
) -> None:
    monkeypatch.setattr(load_module, "load", unloadable)
    done = run(*named(words, model))
    assert done.code in (2, 5) and done.out == "", done
    assert wanted in done.err and "Traceback" not in done.err, done.err
