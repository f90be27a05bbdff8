"""The command line: every command explains itself, prints one JSON document, and fails in one block with its exit code."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith import cli, workbench
from factsmith.edit.methods import METHODS, RomeConfig
from factsmith.edit.moments import SecondMoment, second_moments
from factsmith.fact import Fact, FactFile
from factsmith.ledger import Ledger
from factsmith.model.load import LanguageModel, load

DOCS = Path(__file__).resolve().parents[1] / "docs"
COMMANDS = sorted(command.callback.__name__ for command in cli.app.registered_commands if command.callback is not None)
PROMPT = "The mother tongue of Danielle Darrieux is"
FACT = ["--subject", "Danielle Darrieux", "--prompt", "The mother tongue of {} is", "--target", "English"]


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
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
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches that take no time: what is tested here is the command line."""
    monkeypatch.setattr(RomeConfig, "recommended", classmethod(lambda cls, lm: cls(layer=1, steps=2)))
    monkeypatch.setattr(workbench.Proposal, "failed", False)  # two steps are not enough to hold


# ---- every command ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_is_documented(run: Run, name: str) -> None:
    done = run(name, "--help")
    assert done.code == 0
    assert re.search(rf"Examples?:\s+factsmith {name}\b", done.out), "no example"
    assert "--json" in done.out
    pages = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    assert re.search(rf"^factsmith {name}\b", pages, re.MULTILINE), "not shown in docs/"


def test_the_commands_are_those_promised(run: Run) -> None:
    assert {"init", "ask", "trace", "neurons", "layers", "patch", "log", "show", "revert", "checkout", "status"} <= set(COMMANDS)
    assert re.fullmatch(r"factsmith \d+\.\d+\S*\n", run("--version").out)


def test_help_needs_no_torch() -> None:
    code = "import sys, factsmith.cli; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "factsmith", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("factsmith ")


# ---- the flow --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_patch_there_and_back(run: Run, model: Path, tmp_path: Path) -> None:
    made = run("init", model, "space", "--json").json
    assert made["model"] == str(model) and made["dtype"] == "float32" and made["fingerprint"] == load(model).fingerprint

    asked = run("ask", model, PROMPT, "--top", 3, "--json").json
    assert asked["answer"] == load(model).answer([PROMPT])[0] and len(asked["next_tokens"]) == 3 and asked["revision"] is None

    patched = run("patch", "-w", "space", *FACT, "--neighbour", "Paris is", "--paraphrase", "{} speaks", "-m", "as asked", "--json").json
    identity = patched["revision"]["id"]
    assert patched["revision"]["message"] == "as asked" and patched["delta"]["layers"] == [1]
    assert [check["role"] for check in patched["verification"]["checks"]] == ["prompt", "paraphrase", "neighbour"]

    changed = run("ask", "-w", "space", PROMPT, "--json").json
    assert changed["revision"] == identity and changed["next_tokens"] != asked["next_tokens"]
    assert run("ask", "space", PROMPT, "--json").json == changed, "a workspace may stand where a model does"
    assert [r["id"] for r in run("log", "-w", "space", "--json").json["revisions"]] == [identity]
    assert run("show", identity[:8], "-w", "space", "--json").json["facts"][0]["target"] == "English"

    proof = run("status", "--verify", "-w", "space", "--json").json
    assert proof["active"] == [identity] and proof["fingerprint_now"] != proof["fingerprint"]

    undone = run("revert", "latest", "-w", "space", "--json").json
    assert undone["reverts"] == identity and undone["active"] == 0
    proof = run("status", "--verify", "-w", "space", "--json").json
    assert proof["active"] == [] and proof["fingerprint_now"] == proof["fingerprint"]
    again = run("ask", "-w", "space", PROMPT, "--top", 3, "--json").json
    assert again["next_tokens"] == asked["next_tokens"]

    assert run("checkout", identity[:8], "-w", "space", "--json").json["active"] == 1
    assert run("ask", "-w", "space", PROMPT, "--json").json["next_tokens"] == changed["next_tokens"]
    assert run("checkout", "base", "-w", "space", "--json").json == {"current": "base", "head": undone["id"], "active": 0}


@pytest.mark.usefixtures("quick")
def test_text_for_people(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "next: factsmith patch" in run("init", model, "space").out
    monkeypatch.chdir(tmp_path / "space")  # from here on, the workspace is where we are
    done = run("patch", *FACT, "--neighbour", "Paris is")
    (identity,) = re.findall(r"factsmith revert ([0-9a-f]{10})", done.out)
    assert "layer 1, rank 1" in done.out and "neighbour" in done.out
    assert identity in run("log").out and "active" in run("log").out
    shown = run("show", identity).out
    assert "rome, layer 1" in shown and "steps=2" in shown
    assert "1 patch" in run("status", "--verify").out
    assert f"reverted {identity}" in run("revert", identity).out
    assert "the base model, bit for bit" in run("status", "--verify").out
    assert "checkout latest" in run("checkout", "base").out
    assert "later" in run("log").out
    assert run("ask", PROMPT).out.startswith(PROMPT)


@pytest.mark.usefixtures("quick")
def test_without_a_workspace_the_proof_is_shown_and_nothing_kept(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("patch", model, *FACT)
    assert done.code == 0 and "nothing was kept" in done.out and f"factsmith init {model}" in done.out
    assert list(tmp_path.iterdir()) == []
    run("init", model, "space")
    done = run("patch", "-w", "space", *FACT, "--dry-run", "--json")
    assert done.json["revision"] is None and done.json["delta"]["rank"] == 1
    assert run("log", "-w", "space", "--json").json["revisions"] == []


@pytest.mark.usefixtures("quick")
def test_facts_from_a_file(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "facts.yaml").write_text(
        "facts:\n- {subject: Edwin, prompt: '{} is a', target: king}\n- {subject: Paris, prompt: '{} is in', target: Brazil}\n"
    )
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"Paris is in {x}. Edwin is {x}, a king. {x} is {x}." for x in "abcdefghijklmnopqrst"))
    run("init", model, ".")
    done = run("patch", "facts.yaml", "--texts", "corpus.txt", "--layer", "0", "--json").json
    assert [fact["target"] for fact in done["revision"]["facts"]] == ["king", "Brazil"]
    assert done["delta"]["rank"] == 2 and done["delta"]["layers"] == [0]
    assert (tmp_path / "moments" / "layer0.safetensors").is_file()
    assert run("patch", "facts.yaml", *FACT).code == 2


def test_trace(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("trace", model, PROMPT, "--subject", "Danielle Darrieux", "--kind", "mlp", "--out", "trace.png")
    assert done.code == 0 and "saved trace.png" in done.out and "*" in done.out
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    found = run("trace", model, PROMPT, "--subject", "Danielle Darrieux", "--samples", 2, "--json").json
    assert len(found["scores"]) == len(found["tokens"]) and found["samples"] == 2 and found["out"] == []


def test_a_trace_without_a_suffix_is_drawn_twice_with_its_numbers_beside(run: Run, model: Path, tmp_path: Path) -> None:
    asked = ("trace", model, PROMPT, "--subject", "Danielle Darrieux", "--samples", 2)
    assert run(*asked, "--sever", "mlp", "--out", "map").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.csv", "map.json", "map.png", "map.svg"]
    found = json.loads((tmp_path / "map.json").read_text())
    header, *rows = (tmp_path / "map.csv").read_text().splitlines()
    assert header == "column,token,subject,layer,score,effect" and len(rows) == len(found["tokens"]) * 3 and found["sever"] == "mlp"
    quick = run(*asked, "--fast", "--json").json
    assert -1 <= quick["rank_correlation"] <= 1 and quick["scores"] != found["scores"]
    replaced = run(*asked, "--corruption", "replace", "--replacement", "Edwin Northumbria", "--json")
    assert replaced.code in (0, 2) and "Traceback" not in replaced.err


def test_a_target_that_the_model_does_not_say_is_traced_only_when_forced(run: Run, model: Path) -> None:
    asked = ("trace", model, PROMPT, "--subject", "Danielle Darrieux", "--samples", 2, "--target", "Brazil")
    said = load(model).answer([PROMPT])[0]
    refused = run(*asked)
    assert refused.code == 2 and repr(said)[1:-1] in refused.err and "--force" in refused.err and refused.out == ""
    assert run(*asked, "--force", "--json").json["is_correct"] is False


def test_the_average_over_a_file_of_facts(run: Run, model: Path, tmp_path: Path) -> None:
    lm = load(model)
    prompts = ["The mother tongue of {} is ", "{} is the capital of "]
    known = [
        Fact(subject, prompt, lm.next_tokens(prompt.replace("{}", subject), 1)[0][0])
        for subject, prompt in itertools.product(("Danielle Darrieux", "Edwin", "Paris"), prompts)
        if lm.next_tokens(prompt.replace("{}", subject), 1)[0][0].strip()
    ]
    known = [fact for fact in known if lm.says([fact.text], [fact.target])[0]]
    assert known, "the random model says nothing that can be traced"
    FactFile.write("facts.yaml", [*known, Fact("Edwin", "The mother tongue of {} is", "Zürich")])
    found = run("trace", model, "facts.yaml", "--window", 1, "--samples", 2, "--out", "average", "--json").json
    assert found["n_facts"] == len(known) and found["n_skipped"] == 1 and list(found["effects"]) == ["state", "mlp", "attention"]
    assert {path.name for path in tmp_path.glob("average*")} == {
        *(f"average.{suffix}" for suffix in ("png", "svg", "json", "csv")),
        *(f"average-curves.{suffix}" for suffix in ("png", "svg")),
    }
    shown = run("trace", model, "facts.yaml", "--kind", "mlp", "--samples", 2)
    assert "1 left out" in shown.out and "average total effect" in shown.out and "attention" not in shown.out
    assert run("trace", model, "facts.yaml", "--target", "x").code == 2


def test_neurons(run: Run, model: Path, tmp_path: Path) -> None:
    asked = ("neurons", model, "The mother tongue of {} is", "--subject", "Edwin", "--paraphrase", "{} speaks")
    done = run(*asked, "--target", load(model).next_tokens("The mother tongue of Edwin is", 1)[0][0], "--force", "--out", "chart.svg")
    assert done.code == 0 and "refined" in done.out and "random:" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chart.csv", "chart.json", "chart.svg"]
    found = json.loads((tmp_path / "chart.json").read_text())
    assert found["prompts"] == ["The mother tongue of Edwin is", "Edwin speaks"] and found["refined"]
    header, first, *_ = (tmp_path / "chart.csv").read_text().splitlines()
    assert header.startswith("layer,expert,neuron,attribution") and float(first.split(",")[3]) == pytest.approx(found["top"][0][1])
    refused = run(*asked, "--target", "Zürich")
    assert refused.code == 2 and "--force" in refused.err
    assert run("neurons", model, "The mother tongue of {} is").code == 2


@pytest.fixture
def atlas(monkeypatch: pytest.MonkeyPatch) -> str:
    """The bundled model, which knows facts; loaded once."""
    monkeypatch.setattr(cli, "_load", lambda name, device, dtype, tell: _atlas() if name == "atlas" else load(name, device=device))
    return "atlas"


@functools.cache
def _atlas() -> LanguageModel:
    return load("atlas")


CURRENCY = "The currency of Bulgaria is the"


def test_without_a_target_the_whole_first_phrase_is_followed(run: Run, atlas: str) -> None:
    whole = run("trace", atlas, CURRENCY, "--subject", "Bulgaria", "--samples", 2, "--json")
    (p,) = _atlas().log_prob([CURRENCY], ["lev"]).exp().tolist()
    assert whole.json["answer"] == " lev" and len(whole.json["answer_ids"]) > 1 and whole.json["clean"] == pytest.approx(p, rel=1e-4)
    assert run("trace", atlas, "The currency of {} is the", "--subject", "Bulgaria", "--samples", 2, "--json").json == whole.json
    assert "warning" not in whole.err
    fast = run("trace", atlas, CURRENCY, "--subject", "Bulgaria", "--samples", 2, "--fast")
    assert fast.code == 0 and "p(lev)" in fast.out and "its ranks correlate" in fast.out
    found = run("neurons", atlas, CURRENCY, "--steps", 1, "--json").json
    assert found["target"] == "lev" and found["probability"] == [pytest.approx(p, rel=1e-4)]


def test_an_own_answer_that_is_no_word_is_said(run: Run, atlas: str) -> None:
    answer = _atlas().answer(["Bulgaria"])[0]
    assert answer.startswith(","), "the prompt of this test ends where a sentence goes on"
    refused = run("neurons", atlas, "Bulgaria")
    assert refused.code == 2 and repr(answer) in refused.err and "no answer of whole words" in refused.err
    traced = run("trace", atlas, "Bulgaria", "--subject", "Bulgaria", "--samples", 1, "--json")
    assert traced.json["answer"] == "," and "its first token is followed" in traced.err


def test_white_space_at_the_end_is_warned_of(run: Run, model: Path) -> None:
    asked = ("trace", model, PROMPT, "--subject", "Danielle", "--samples", 1, "--json")
    assert "ends in white space" not in run(*asked).err
    assert "ends in white space" in run(*asked[:2], f"{PROMPT} ", *asked[3:]).err


def test_what_the_model_says_instead_of_a_forced_target_is_said(run: Run, atlas: str) -> None:
    for command in (["trace", atlas, CURRENCY, "--subject", "Bulgaria", "--samples", 1], ["neurons", atlas, CURRENCY, "--steps", 1]):
        done = run(*command, "--target", "dinar", "--force", "--json")
        assert done.code == 0 and "with 'lev' (p = 0.932), not 'dinar'" in done.err
        assert "not 'lev'" not in run(*command, "--target", "lev", "--force", "--json").err


def test_a_corruption_that_takes_nothing_away_is_warned_of(run: Run, atlas: str) -> None:
    asked = ("trace", atlas, CURRENCY, "--subject", "Bulgaria", "--samples", 1)
    assert "the map shows nothing" in run(*asked, "--noise", 0.0001).err
    assert "the map shows nothing" not in run(*asked).err
    replaced = run(*asked, "--corruption", "replace", "--replacement", "Danielle Darrieux")
    assert replaced.code == 2 and "fit into the 1 token of 'Bulgaria'" in replaced.err


def test_the_table_of_averages_fits_a_pipe(run: Run, atlas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    facts = [Fact("Bulgaria", "The currency of {} is the", "lev"), Fact("Danielle Darrieux", "The mother tongue of {} is", "French")]
    FactFile.write("facts.yaml", facts)
    asked = ("trace", atlas, "facts.yaml", "--window", 2, "--sever", "attention", "--samples", 1)
    found, shown = run(*asked, "--json").json, run(*asked).out
    assert max(map(len, shown.splitlines())) <= 80
    last = shown[shown.index("last token") :].splitlines()
    for name, effects in found["effects"].items():
        best = max(range(len(effects[-1])), key=lambda layer: effects[-1][layer])
        half = (found["high"][name][-1][best] - found["low"][name][-1][best]) / 2
        assert f"{effects[-1][best]:.3f} @{best}" in last[0] and f"± {half:.3f}" in last[1]
    monkeypatch.setenv("COLUMNS", "120")
    assert re.search(r"last token( +\d\.\d{3} ± \d\.\d{3} @\d){4}$", run(*asked).out, re.MULTILINE)
    FactFile.write("facts.yaml", facts[:1])
    assert run("trace", atlas, "facts.yaml", "--kind", "state", "--samples", 1).out.startswith("1 fact: ")


def test_layers(run: Run, model: Path, tmp_path: Path) -> None:
    fallen = run("layers", model, "--json").json
    assert fallen["source"] == "depth" and fallen["rome"] in range(3)
    assert run("layers", model, "--preset").code == 2
    assert run("layers").code == 2 and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_what_is_known_is_a_warning(run: Run, model: Path) -> None:
    run("init", model, "space")
    said = run("ask", model, PROMPT, "--json").json["answer"]
    done = run("patch", "-w", "space", *FACT[:-1], said)
    assert done.code == 0 and "warning: the model already answers" in done.err
    assert run("log", "-w", "space", "--json").json["revisions"] == []
    assert run("patch", "-w", "space", *FACT[:-1], said, "--layer", 99).code == 2
    assert run("patch", "-w", "space", *FACT[:-1], said, "--force", "--json").json["revision"] is not None


# ---- files that are not ours -----------------------------------------------------------------------------------------------------------


def test_no_file_of_others_is_replaced(run: Run, model: Path, tmp_path: Path) -> None:
    FactFile.write("input.json", [Fact("Edwin", "{} is a", "king")])
    (tmp_path / "config.json").write_text('{"factsmith": {"rome": {"layer": 1}}}')
    (tmp_path / "data.csv").write_text("a,b\n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "folder.png").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    text = ("trace", model, PROMPT, "--subject", "Danielle Darrieux", "--samples", 1, "--out")
    for arguments, words in (
        (("trace", "nosuchmodel", "input.json", "--out", "input"), "input.json, which is the file of facts itself"),
        (("trace", "nosuchmodel", "input.json", "--out", "./input.svg"), "input.json, which is the file of facts itself"),
        ((*text, "config.png"), "config.json, which is no record"),
        ((*text, "data"), "data.csv, which is no record"),
        ((*text, "broken.pdf"), "broken.json, which is no record"),
        ((*text, "folder"), "folder.png, which is a folder"),
        (("neurons", model, PROMPT, "--out", "config"), "config.json, which is no record"),
    ):
        done = run(*arguments)
        assert (done.code, done.out) == (2, "") and words in done.err, (arguments, done)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_earlier_records_are_replaced(run: Run, model: Path, tmp_path: Path) -> None:
    text = ("trace", model, PROMPT, "--subject", "Danielle Darrieux", "--out", "map.svg", "--samples")
    assert run(*text, 1).code == 0 and json.loads((tmp_path / "map.json").read_text())["factsmith"] == "trace"
    (tmp_path / "map.csv").write_text("old\n")
    assert run(*text, 2).code == 0 and json.loads((tmp_path / "map.json").read_text())["samples"] == 2
    assert (tmp_path / "map.csv").read_text().startswith("column,")


@pytest.mark.parametrize("out", ["", ".", "..", ".png", "d/", "space", "space/.."])
def test_out_needs_a_file_name(run: Run, model: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "space").mkdir()
    for command in (["trace", model, PROMPT, "--subject", "Danielle"], ["neurons", model, PROMPT]):
        done = run(*command, "--out", out)
        assert done.code == 2 and "names no file" in done.err and "trace.png" in done.err


def test_digits_after_a_point_are_no_suffix(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("trace", model, PROMPT, "--subject", "Danielle", "--samples", 1, "--out", "v1.2").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"v1.2.{suffix}" for suffix in ("csv", "json", "png", "svg")]


# ---- what goes wrong -------------------------------------------------------------------------------------------------------------------


def test_exit_codes(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("facts: [1, {subject: x}]")
    run("init", model, "space")
    cases: list[tuple[int, list[object], str]] = [
        (2, ["frob"], "No such command"),
        (2, ["ask"], "Missing argument"),
        (2, ["ask", model, PROMPT, "--top", "0"], "--top"),
        (2, ["ask", model, "one", "two"], "put the text in quotes"),
        (2, ["ask", model, "\udcff"], "UTF-8"),
        (2, ["patch", model], "--subject"),
        (2, ["patch", model, *FACT[:-1], " "], "target"),
        (2, ["patch", model, "--subject", "Edwin", "--prompt", "Edwin is", "--target", "a king"], "prompt has 0 slots"),
        (2, ["patch", model, "--subject", "Edwin", "--prompt", "Edwin and {} are", "--target", "kings"], "Edwin"),
        (2, ["patch", model, *FACT, "--layer", "3"], "layer 3"),
        (2, ["patch", model, *FACT, "--layer", "-1"], "layer"),
        (2, ["patch", model, *FACT, "--texts", "nowhere.txt"], "nowhere.txt"),
        (2, ["patch", model, "bad.yaml"], "bad.yaml, entry 1"),
        (2, ["patch", model, "nowhere.yaml"], "nowhere.yaml"),
        (2, ["trace", model, PROMPT, "--subject", "Nobody"], "Nobody"),
        (2, ["trace", model, PROMPT, "--subject", "Danielle", "--out", "x.doc"], ".doc"),
        (2, ["trace", model, PROMPT, "--subject", " "], "--subject is empty"),
        (2, ["trace", model, " ", "--subject", "x"], "a prompt is empty"),
        (2, ["trace", model, "{} and {}", "--subject", "Edwin"], "2 slots"),
        (2, ["trace", model, "Edwin and {}", "--subject", "Edwin"], "more than once"),
        (2, ["trace", model, PROMPT, "--subject", "Danielle", "--window", "3"], "--kind mlp"),
        (2, ["trace", model, PROMPT, "--subject", "Danielle", "--kind", "state", "--window", "3"], "--kind mlp"),
        (2, ["trace", model, PROMPT, "--subject", "Danielle", "--seed", "-1"], "--seed"),
        (2, ["trace", PROMPT, "--subject", "Danielle"], "name a model"),
        (2, ["trace", "Danielle wrote facts.yaml", "--subject", "Danielle"], "name a model"),
        (2, ["trace", "bad.yaml", model], "the model comes first"),
        (2, ["neurons", model, PROMPT, "--subject", "Romania"], "'Romania' is not in"),
        (2, ["neurons", model, PROMPT, "--subject", ""], "--subject is empty"),
        (2, ["neurons", model, ""], "a prompt is empty"),
        (2, ["neurons", model, PROMPT, "--seed", "-1"], "--seed"),
        (2, ["neurons", model, PROMPT, "--top", "61"], "--top"),
        (2, ["neurons", PROMPT], "name a model"),
        (2, ["layers", model, "--seed", "-1"], "--seed"),
        (2, ["layers", model, "--refresh"], "--refresh"),
        (3, ["ask", "nosuchmodel", PROMPT], "nosuchmodel"),
        (3, ["ask", "./empty", PROMPT], "empty"),
        (3, ["init", "nosuchmodel", "other"], "nosuchmodel"),
        (5, ["ask", PROMPT], "factsmith init"),
        (5, ["log"], "factsmith init"),
        (5, ["init", model, "space"], "already holds a ledger"),
        (5, ["show", "ffff", "-w", "space"], "ffff"),
        (5, ["revert", "latest", "-w", "space"], "no record"),
        (5, ["checkout", "../..", "-w", "space"], "names no revision"),
    ]
    before = sorted(str(path) for path in tmp_path.rglob("*") if not path.name.startswith("ledger.db-"))
    for code, arguments, words in cases:
        done = run(*arguments)
        assert (done.code, done.out) == (code, ""), (arguments, done)
        assert words in done.err and "Traceback" not in done.err, (arguments, done.err)
    assert sorted(str(path) for path in tmp_path.rglob("*") if not path.name.startswith("ledger.db-")) == before


@pytest.mark.parametrize("method", list(METHODS))
def test_a_model_of_experts_is_refused(run: Run, tmp_path: Path, method: str) -> None:
    folder = tmp_path / "experts"
    tiny_model("mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2).save_pretrained(folder)
    byte_tokenizer(bos=True).save_pretrained(folder)
    run("init", folder, "space")
    for where in ((folder,), ("-w", "space")):
        for more in ((), ("--layer", 1), ("--set", "steps=3")):
            done = run("patch", *where, *FACT, "--method", method, *more)
            assert (done.code, done.out) == (3, "") and "mixture of 4 experts" in done.err and "Traceback" not in done.err
            assert "take a model without experts" in " ".join(done.err.split())
    with Ledger(tmp_path / "space") as ledger:
        assert ledger.log() == []
    assert not (tmp_path / "space" / "moments").exists() or not list((tmp_path / "space" / "moments").iterdir())


def test_a_quantised_model_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "quantised"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    for command in (["init", folder, "space"], ["patch", folder, *FACT]):
        done = run(*command)
        assert (done.code, done.out) == (3, "") and "is quantised (bitsandbytes)" in " ".join(done.err.split())
        assert "Traceback" not in done.err and not (tmp_path / "space").exists()


def test_another_model_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model("gpt2", seed=5, **GPT2).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    run("init", model, "space")
    done = run("patch", other, "-w", "space", *FACT)
    assert done.code == 5 and "was made for" in done.err


def test_a_fault_of_ours_is_said_without_a_traceback(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    run("init", model, "space")
    monkeypatch.setattr(Ledger, "log", fault)
    done = run("log", "-w", "space")
    assert done.code == 1 and "ZeroDivisionError: division by zero" in done.err and "report" in done.err
    monkeypatch.setenv("FACTSMITH_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["log", "-w", "space"])


def test_a_model_cannot_steer_the_terminal(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factsmith.model.load.LanguageModel.answer", lambda self, prompts, max_new_tokens: ["\x1b[2J[bold]x[/bold]"])
    done = run("ask", model, PROMPT)
    assert "\x1b" not in done.out and "[bold]x[/bold]" in done.out


@pytest.mark.usefixtures("quick")
def test_ctrl_c_in_the_middle_of_a_patch(
    run: Run, quick: None, request: pytest.FixtureRequest, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []

    def solve(*_: object, **__: object) -> None:
        reached.append(True)
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    # A runner in the background may have been started with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    run("init", model, "space")
    with monkeypatch.context() as patching:
        patching.setitem(METHODS, "rome", (solve, RomeConfig))
        done = run("patch", "-w", "space", *FACT)
    assert reached and done.code == 130 and done.out == ""
    assert done.err.startswith("interrupted: ") and "Traceback" not in done.err
    with Ledger(tmp_path / "space") as ledger:
        assert ledger.log() == [] and ledger.verify().orphans == ()
    assert run("patch", "-w", "space", *FACT, "--json").json["revision"] is not None  # and the next one works


# ── methods, settings, forgetting ───────────────────────────────────────────────────────────────────────────────────────────


def test_any_method_and_its_settings(run: Run, atlas: str, tmp_path: Path) -> None:
    facts = tmp_path / "facts.yaml"
    facts.write_text(
        "facts:\n"
        "- {subject: Bulgaria, prompt: 'The currency of {} is the', target: euro}\n"
        "- {subject: Japan, prompt: 'The capital of {} is', target: Paris}\n"
    )
    done = run("patch", atlas, facts, "--method", "memit", "--layer", 0, "--layer", 1, "--set", "repair=2", "--set", "steps=50", "--json")
    assert done.code == 0 and done.json["delta"]["method"] == "memit" and done.json["delta"]["layers"] == [0, 1]
    assert done.json["verification"]["efficacy"] == 1.0
    for wrong, words in (
        (("--method", "magic"), "no method"),
        (("--method", "memit", "--set", "size=3"), "no setting size"),
        (("--method", "memit", "--set", "steps"), "NAME=VALUE"),
        (("--method", "memit", "--set", "steps=2.5"), "steps"),
        (("--method", "alphaedit", "--set", "threshold=0.02"), "threshold or an energy"),
        (("--method", "memit", "--paper"), "no memit settings were published"),
        (("--layer", 0, "--layer", 1), "one layer"),
    ):
        refused = run("patch", atlas, facts, *wrong)
        assert refused.code == 2 and words in refused.err, refused.err


def test_a_fact_is_forgotten_and_stays_so(run: Run, atlas: str) -> None:
    run("init", atlas, "space")
    fact = ("--subject", "Bulgaria", "--prompt", "The capital of {} is")
    done = run("patch", "-w", "space", *fact, "--forget")
    assert done.code == 0 and "committed" in done.out, done.out + done.err
    assert "Sofia" not in run("ask", "-w", "space", "The capital of Bulgaria is", "--json").json["answer"]
    assert "(forgotten)" in run("show", "latest", "-w", "space").out and "(forgotten)" in run("log", "-w", "space").out
    again = run("patch", "-w", "space", *fact, "--forget", "--target", "Sofia")
    assert again.code == 2 and "give one" in again.err
    proof = run("status", "-w", "space", "--verify", "--json").json["verification"]
    assert proof["efficacy"] == 1.0 and proof["checks"][0]["wanted"] == "Sofia" and proof["checks"][0]["forget"]
    run("revert", "latest", "-w", "space")
    assert "Sofia" in run("ask", "-w", "space", "The capital of Bulgaria is", "--json").json["answer"]


def test_second_moments_are_computed_kept_and_used(run: Run, model: Path, tmp_path: Path, quick: None) -> None:
    (tmp_path / "one.txt").write_text("The capital of France is Paris.\n\nKeys open doors.\nAnd values?\n")
    (tmp_path / "two.txt").write_text("Another text, to be read after the first.")
    computed = run("moments", model, "--layer", 1, "--texts", "one.txt", "--texts", "two.txt", "--out", "kept", "--json").json
    lm = load(str(model))
    texts = ["The capital of France is Paris.", "Keys open doors.\nAnd values?", "Another text, to be read after the first."]
    assert computed["moments"][0]["tokens"] == sum(len(lm.prompt_ids(text)) for text in texts)
    kept = SecondMoment.load(tmp_path / "kept" / "layer1.safetensors", lm, 1)
    assert torch.allclose(kept.matrix, second_moments(lm, texts, [1], max_tokens=1e9)[1].matrix)
    assert list((tmp_path / "kept").iterdir()) == [tmp_path / "kept" / "layer1.safetensors"], "no checkpoint is left"
    cut = run("moments", model, "--layer", 1, "--texts", "one.txt", "--max-tokens", 10, "--packed", "--bf16", "--out", "cut")
    assert cut.code == 0 and "layer 1: 10 tokens" in cut.out

    done = run("patch", model, *FACT, "--moments", "kept", "--json").json
    by_hand = workbench.propose(lm, Fact("Danielle Darrieux", "The mother tongue of {} is", "English"), moments=kept)
    assert done["moments"] == by_hand.moments
    (tmp_path / "other").mkdir()
    other = SecondMoment.from_matrix(kept.matrix, count=kept.count, fingerprint="0" * 64, layer=1)
    other.save(tmp_path / "other" / "layer1.safetensors")
    wrong = run("patch", model, *FACT, "--moments", "other")
    assert wrong.code != 0 and "another" not in wrong.out and "fingerprint 000000" in wrong.err


def test_second_moments_of_a_workspace(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("init", model, "ws").code == 0
    first = run("moments", "-w", "ws", "--layer", 0, "--max-tokens", 500)
    assert first.code == 0 and "tokens" in first.out and (tmp_path / "ws" / "moments" / "layer0.safetensors").is_file()
    written = (tmp_path / "ws" / "moments" / "layer0.safetensors").stat().st_mtime_ns
    assert run("moments", "-w", "ws", "--layer", 0).out == first.out, "what is kept is described"
    assert (tmp_path / "ws" / "moments" / "layer0.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--texts", "nowhere.txt", "--out", "kept"], "cannot read nowhere.txt"),
        (["--texts", "latin.txt", "--out", "kept"], "UTF-8"),
        (["--texts", "empty.txt", "--out", "kept"], "no text"),
        (["--layer", "1", "--out", "empty.txt"], "cannot write into empty.txt"),
        (["--layer", "9", "--out", "kept"], "layers 0 to 2"),
        (["--layer", "1"], "name a folder with --out"),
        (["--max-tokens", "0", "--out", "kept"], "at least 1"),
        (["--max-tokens", "nan", "--out", "kept"], "at least 1"),
        (["--max-tokens", "inf", "--out", "kept"], "give texts"),
    ],
)
def test_moments_refuses(run: Run, model: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n\n")
    done = run("moments", model, *arguments)
    assert done.code not in (0, 1) and says in done.err and "Traceback" not in done.err
    assert not list(tmp_path.glob("kept/layer*"))
