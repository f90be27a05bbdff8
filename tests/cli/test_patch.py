"""Patches by every way to ask for them, models that cannot be patched, and second moments."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from commands import FACT, PROMPT, Run
from conftest import LLAMA, byte_tokenizer, tiny_model
from factsmith.cli.options import read_settings
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.edit.methods import METHODS
from factsmith.keep.ledger import Ledger
from factsmith.model.load import load
from patching import proposed


@pytest.mark.usefixtures("quick")
def test_without_a_workspace_the_proof_is_shown_and_nothing_kept(
    run: Run, model: Path, tmp_path: Path
) -> None:
    done = run("patch", model, *FACT)
    assert (
        done.code == 0 and "nothing was kept" in done.out and f"factsmith init {model}" in done.out
    )
    assert list(tmp_path.iterdir()) == []
    run("init", model, "space")
    done = run("patch", "-w", "space", *FACT, "--dry-run", "--json")
    assert done.json["revision"] is None and done.json["delta"]["rank"] == 1
    assert run("log", "-w", "space", "--json").json["revisions"] == []


@pytest.mark.usefixtures("quick")
def test_facts_from_a_file(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "facts.yaml").write_text(
        "facts:\n"
        "- {subject: Edwin, prompt: '{} is a', target: king}\n"
        "- {subject: Paris, prompt: '{} is in', target: Brazil}\n"
    )
    (tmp_path / "corpus.txt").write_text(
        "\n\n".join(
            f"Paris is in {x}. Edwin is {x}, a king. {x} is {x}." for x in "abcdefghijklmnopqrst"
        )
    )
    run("init", model, ".")
    done = run(
        "patch",
        "facts.yaml",
        "--method",
        "rome",
        "--texts",
        "corpus.txt",
        "--layer",
        0,
        "--force",
        "--json",
    ).json  # little text
    assert [fact["target"] for fact in done["revision"]["facts"]] == ["king", "Brazil"]
    assert done["delta"]["rank"] == 2 and done["delta"]["layers"] == [0]
    assert (tmp_path / "moments" / "layer0.safetensors").is_file()
    assert run("patch", "facts.yaml", *FACT).code == 2


@pytest.mark.usefixtures("quick")
def test_what_is_known_is_a_warning(run: Run, model: Path) -> None:
    run("init", model, "space")
    said = run("ask", model, PROMPT, "--json").json["answer"]
    done = run("patch", "-w", "space", *FACT[:-1], said)
    assert done.code == 0 and "warning: the model already answers" in done.err
    assert run("log", "-w", "space", "--json").json["revisions"] == []
    assert run("patch", "-w", "space", *FACT[:-1], said, "--layer", 99).code == 2
    assert (
        run("patch", "-w", "space", *FACT[:-1], said, "--force", "--json").json["revision"]
        is not None
    )


def test_any_method_and_its_settings(run: Run, atlas: str, tmp_path: Path) -> None:
    facts = tmp_path / "facts.yaml"
    facts.write_text(
        "facts:\n"
        "- {subject: Bulgaria, prompt: 'The currency of {} is the', target: euro}\n"
        "- {subject: Japan, prompt: 'The capital of {} is', target: Paris}\n"
    )
    done = run(
        "patch",
        atlas,
        facts,
        "--method",
        "memit",
        "--layer",
        0,
        "--layer",
        1,
        "--set",
        "repair=2",
        "--set",
        "steps=50",
        "--json",
    )
    assert (
        done.code == 0
        and done.json["delta"]["method"] == "memit"
        and done.json["delta"]["layers"] == [0, 1]
    )
    assert done.json["verification"]["efficacy"] == 1.0
    for wrong, words in (
        (("--method", "magic"), "no method"),
        (("--method", "memit", "--set", "size=3"), "no setting size"),
        (("--method", "memit", "--set", "steps"), "NAME=VALUE"),
        (("--method", "memit", "--set", "steps=2.5"), "steps"),
        (
            ("--method", "alphaedit", "--set", "threshold=0.02", "--set", "energy=0.5"),
            "threshold or an energy",
        ),
        (("--method", "alphaedit", "--set", "energy=abc"), "energy is 'abc'"),
        (
            ("--method", "alphaedit", "--set", "threshold=abc", "--set", "energy=none"),
            "threshold is 'abc'",
        ),
        (("--method", "memit", "--paper"), "no memit settings were published"),
        (("--method", "rome", "--layer", 0, "--layer", 1), "one layer"),
    ):
        refused = run("patch", atlas, facts, *wrong)
        assert refused.code == 2 and words in refused.err, refused.err


def test_a_fact_is_forgotten_and_stays_so(run: Run, atlas: str) -> None:
    run("init", atlas, "space")
    fact = ("--subject", "Bulgaria", "--prompt", "The capital of {} is")
    done = run("patch", "-w", "space", *fact, "--forget")
    assert done.code == 0 and "committed" in done.out, done.out + done.err
    assert (
        "Sofia"
        not in run("ask", "-w", "space", "The capital of Bulgaria is", "--json").json["answer"]
    )
    assert (
        "(forgotten)" in run("show", "latest", "-w", "space").out
        and "(forgotten)" in run("log", "-w", "space").out
    )
    again = run("patch", "-w", "space", *fact, "--forget", "--target", "Sofia")
    assert again.code == 2 and "give one" in again.err
    proof = run("status", "-w", "space", "--verify", "--json").json["verification"]
    assert (
        proof["efficacy"] == 1.0
        and proof["checks"][0]["wanted"] == "Sofia"
        and proof["checks"][0]["forget"]
    )
    run("revert", "latest", "-w", "space")
    assert (
        "Sofia" in run("ask", "-w", "space", "The capital of Bulgaria is", "--json").json["answer"]
    )


@pytest.mark.parametrize("method", list(METHODS))
def test_a_model_of_experts_is_refused(run: Run, tmp_path: Path, method: str) -> None:
    folder = tmp_path / "experts"
    tiny_model("mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2).save_pretrained(
        folder
    )
    byte_tokenizer(bos=True).save_pretrained(folder)
    run("init", folder, "space")
    for where in ((folder,), ("-w", "space")):
        for more in ((), ("--layer", 1), ("--set", "steps=3")):
            done = run("patch", *where, *FACT, "--method", method, *more)
            assert (
                (done.code, done.out) == (3, "")
                and "mixture of experts" in done.err
                and "Traceback" not in done.err
            )
            assert "take a model without experts" in " ".join(done.err.split())
    with Ledger(tmp_path / "space") as ledger:
        assert ledger.log() == []
    assert not (tmp_path / "space" / "moments").exists() or not list(
        (tmp_path / "space" / "moments").iterdir()
    )


def test_a_quantised_model_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "quantised"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    for command in (["init", folder, "space"], ["patch", folder, *FACT]):
        done = run(*command)
        assert (done.code, done.out) == (3, "") and "is quantised (bitsandbytes)" in " ".join(
            done.err.split()
        )
        assert "Traceback" not in done.err and not (tmp_path / "space").exists()


@pytest.mark.usefixtures("quick")
def test_ctrl_c_in_the_middle_of_a_patch(
    run: Run,
    quick: None,
    request: pytest.FixtureRequest,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
        patching.setitem(METHODS, "rome", dataclasses.replace(METHODS["rome"], solve=solve))
        done = run("patch", "-w", "space", "--layer", 1, *FACT)
    assert reached and done.code == 130 and done.out == ""
    assert done.err.startswith("interrupted: ") and "Traceback" not in done.err
    with Ledger(tmp_path / "space") as ledger:
        assert ledger.log() == [] and ledger.verify().orphans == ()
    assert (
        run("patch", "-w", "space", *FACT, "--json").json["revision"] is not None
    )  # and the next one works


def test_second_moments_are_computed_kept_and_used(
    run: Run, model: Path, tmp_path: Path, quick: None
) -> None:
    (tmp_path / "one.txt").write_text(
        "The capital of France is Paris.\n\nKeys open doors.\nAnd values?\n"
    )
    (tmp_path / "two.txt").write_text("Another text, to be read after the first.")
    computed = run(
        "moments",
        model,
        "--layer",
        1,
        "--texts",
        "one.txt",
        "--texts",
        "two.txt",
        "--out",
        "kept",
        "--json",
    ).json
    lm = load(str(model))
    texts = [
        "The capital of France is Paris.",
        "Keys open doors.\nAnd values?",
        "Another text, to be read after the first.",
    ]
    assert computed["moments"][0]["tokens"] == sum(len(lm.prompt_ids(text)) for text in texts)
    kept = SecondMoment.load(tmp_path / "kept" / "layer1.safetensors", lm, 1)
    assert torch.allclose(kept.matrix, second_moments(lm, texts, [1], max_tokens=1e9)[1].matrix)
    assert list((tmp_path / "kept").iterdir()) == [tmp_path / "kept" / "layer1.safetensors"], (
        "no checkpoint is left"
    )
    cut = run(
        "moments",
        model,
        "--layer",
        1,
        "--texts",
        "one.txt",
        "--max-tokens",
        10,
        "--packed",
        "--bf16",
        "--out",
        "cut",
    )
    assert cut.code == 0 and "layer 1: 10 tokens" in cut.out

    done = run("patch", model, *FACT, "--moments", "kept", "--json").json
    by_hand = proposed(
        lm, Fact("Danielle Darrieux", "The mother tongue of {} is", "English"), moments=kept
    )
    assert done["moments"] == by_hand.moments
    (tmp_path / "other").mkdir()
    other = SecondMoment.from_matrix(kept.matrix, count=kept.count, fingerprint="0" * 64, layer=1)
    other.save(tmp_path / "other" / "layer1.safetensors")
    wrong = run("patch", model, *FACT, "--moments", "other")
    assert wrong.code != 0 and "another" not in wrong.out and "fingerprint 000000" in wrong.err


def test_second_moments_of_a_workspace(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("init", model, "ws").code == 0
    first = run("moments", "-w", "ws", "--layer", 0, "--max-tokens", 500)
    assert (
        first.code == 0
        and "tokens" in first.out
        and (tmp_path / "ws" / "moments" / "layer0.safetensors").is_file()
    )
    written = (tmp_path / "ws" / "moments" / "layer0.safetensors").stat().st_mtime_ns
    described, wrote, file = first.out.partition("wrote ")
    assert wrote and file.strip() == str(Path("ws/moments/layer0.safetensors"))
    assert run("moments", "-w", "ws", "--layer", 0).out == described, "what is kept is described"
    assert (tmp_path / "ws" / "moments" / "layer0.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--texts", "nowhere.txt", "--out", "kept"], "cannot read nowhere.txt"),
        (["--texts", "latin.txt", "--out", "kept"], "UTF-8"),
        (["--texts", "empty.txt", "--out", "kept"], "no text"),
        (["--layer", "1", "--out", "empty.txt"], "cannot write into empty.txt"),
        (["--layer", "9", "--out", "kept"], "layers 0 to 2"),
        (["--layer", "1", "--bf16"], "no folder to keep the second moments in"),
        (["--texts", "own"], "no folder to keep the second moments in"),
        (["--texts", "own", "--texts", "empty.txt", "--out", "kept"], "the word own alone"),
        (["--max-tokens", "0", "--out", "kept"], "at least 1"),
        (["--max-tokens", "nan", "--out", "kept"], "at least 1"),
        (["--max-tokens", "inf", "--out", "kept", "--texts", "own"], "give texts"),
    ],
)
def test_moments_refuses(
    run: Run, model: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n\n")
    done = run("moments", model, *arguments)
    assert done.code not in (0, 1) and says in done.err and "Traceback" not in done.err
    assert not list(tmp_path.glob("kept/layer*"))


def test_a_patch_weighed_by_two_sentences_is_not_kept(run: Run, atlas: str, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("Sofia is a city.\n\nKeys open doors.")
    run("init", atlas, "space")
    fact = ("--subject", "Bulgaria", "--prompt", "The currency of {} is the", "--target", "euro")
    asked = ("patch", "-w", "space", *fact, "--texts", "two.txt")
    done = run(*asked)
    assert (
        done.code == 4
        and "layer 0 is from too little text (" in done.err
        and "at least 16,384 tokens" in done.err
    )
    assert (
        "nothing was written" in done.err
        and run("log", "-w", "space", "--json").json["revisions"] == []
    )
    forced = run(*asked, "--force", "--json").json
    assert forced["revision"] is not None and forced["disturbance"] == {}
    enough = run("patch", atlas, *fact, "--json").json  # the control: with what came with the model
    assert enough["thin"] == {} and 0 < enough["disturbance"]["0"] < 0.25


def test_moments_of_a_bundled_model_are_written_where_asked(
    run: Run, atlas: str, tmp_path: Path
) -> None:
    done = run("moments", atlas, "--layer", 0, "--out", "fresh")
    assert done.code == 0
    kept = SecondMoment.load(tmp_path / "fresh" / "layer0.safetensors", load(atlas), 0)
    assert kept.count == 776_532


def test_fewer_tokens_than_asked_for_are_computed_anew(
    run: Run, model: Path, tmp_path: Path
) -> None:
    def tokens(*more: object) -> int:
        return int(
            run("moments", model, "--layer", 1, "--out", "kept", "--json", *more).json["moments"][
                0
            ]["tokens"]
        )

    assert tokens("--max-tokens", 300) == 300
    assert tokens("--max-tokens", 200) == 300 == tokens()
    assert (
        tokens("--max-tokens", 500)
        == 500
        == SecondMoment.load(tmp_path / "kept" / "layer1.safetensors").count
    )


def test_numbers_of_settings_are_read_as_what_they_are() -> None:
    assert read_settings(["steps=1e3", "lr=1.5e-3"]) == {"steps": 1000, "lr": 0.0015}
    assert isinstance(read_settings(["steps=1e3"])["steps"], int)


FILE = """
facts:
- {subject: Bulgaria, prompt: "The currency of {} is the", target: euro}
- {subject: Japan, prompt: "The capital of {} is", target: Paris}
"""


def test_a_file_decides_method_settings_and_gates(run: Run, atlas: str, tmp_path: Path) -> None:
    """`patch FILE` reads the file as `apply` does: nothing of it is dropped."""
    facts = tmp_path / "facts.yaml"
    facts.write_text("method: emmet\nsettings: {layers: [0, 1], steps: 33}\n" + FILE)
    run("init", atlas, "space")
    done = run("patch", "-w", "space", facts, "--json").json
    assert (done["delta"]["method"], done["delta"]["layers"]) == ("emmet", [0, 1])
    assert done["revision"]["config"]["steps"] == 33 and done["gates"] == []
    overruled = run(
        "patch", "-w", "space", facts, "--method", "memit", "--dry-run", "--force", "--json"
    )
    assert overruled.json["delta"]["method"] == "memit" and overruled.json["revision"] is None

    facts.write_text("gates: {neighbours: 1.0, kl_text: 0.0}\n" + FILE.replace("Paris", "Oslo"))
    gated = run("patch", "-w", "space", facts, "--json")
    assert gated.code == 4 and gated.json["revision"] is None
    assert {gate["name"]: gate["passed"] for gate in gated.json["gates"]}["kl_text"] is False
    assert "kl_text" in gated.err


def test_the_default_method_is_one_for_all_commands(run: Run, atlas: str, tmp_path: Path) -> None:
    run("init", atlas, "space")
    facts = tmp_path / "facts.yaml"
    facts.write_text(FILE)
    planned = run("plan", facts, "-w", "space", "--json").json
    patched = run("patch", "-w", "space", facts, "--dry-run", "--json").json
    assert planned["method"] == patched["delta"]["method"] == patched["plan"]["method"] == "memit"
    one = run("patch", "-w", "space", *FIAT, "--dry-run", "--json").json
    assert one["delta"]["method"] == "rome"


FIAT = ("--subject", "Fiat 127", "--prompt", "The maker of {} is", "--target", "Toyota")


@pytest.mark.usefixtures("quick")
def test_a_patch_on_an_older_revision_is_refused_before_the_model_is_loaded(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("init", model, "space")
    assert run("patch", *FACT, "--force", "-w", "space").code == 0
    done = run("checkout", "base", "-w", "space")
    assert done.code == 0
    monkeypatch.setattr("factsmith.cli.models.load_model", lambda *_: pytest.fail("it is loaded"))
    done = run("patch", *FACT, "-w", "space")
    assert done.code == 5 and "is checked out at base" in done.err, done.err
