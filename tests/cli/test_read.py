"""Asking a model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from commands import PROMPT, Run
from factsmith.corpus.moments import second_moments
from factsmith.model.load import load
from factsmith.read.census import effective_rank
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.triggers import Triggers


def test_a_model_cannot_steer_the_terminal(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "factsmith.model.language_model.LanguageModel.answer",
        lambda self, prompts, max_new_tokens, lines: ["\x1b[2J[bold]x[/bold]\ny"][:lines],
    )
    done = run("ask", model, PROMPT, "--lines", "2")
    assert "\x1b" not in done.out and "[bold]x[/bold] ↵ y" in done.out


def test_a_prompt_is_asked_in_the_chat_template(run: Run, model: Path, tmp_path: Path) -> None:
    refused = run("ask", model, PROMPT, "--chat", "--json")
    assert refused.code == 2 and "no chat template" in refused.err and '"--chat"' in refused.err
    chatty = Path(shutil.copytree(model, tmp_path / "chatty"))
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    (chatty / "chat_template.jinja").write_text(template)
    asked = run("ask", chatty, PROMPT, "--chat", "--json").json
    assert asked["prompt"] == f"[user] {PROMPT} [assistant]"
    plain = run("ask", chatty, PROMPT, "--json").json
    assert plain["prompt"] == PROMPT and plain["next_tokens"] != asked["next_tokens"]


def test_a_prediction_is_explained(run: Run, model: Path) -> None:
    shown = run("explain", model, PROMPT, "--top", "3", "--json").json
    assert sum(part["logit"] for part in shown["parts"]) == pytest.approx(shown["logit"], abs=1e-3)
    assert len(shown["neurons"]) == 6 and all(
        len(neuron["writes"]) == 5 for neuron in shown["neurons"]
    )
    assert [neuron["logit"] > 0 for neuron in shown["neurons"]] == [True] * 3 + [False] * 3
    assert shown["parts"][-2]["rank"] == 0, "it is what the model says"
    said = run("ask", model, PROMPT, "--json").json
    assert shown["target"] == said["next_tokens"][0]["token"]
    assert shown["parts"][-2]["probability"] == pytest.approx(
        said["next_tokens"][0]["probability"], abs=1e-4
    )
    text = run("explain", model, PROMPT, "--instead-of", "Paris").out
    assert "above that of 'Paris'" in text and "neurons of 384" in text
    other = run("explain", model, PROMPT, "--instead-of", "Paris", "--json").json
    assert other["logit"] != pytest.approx(shown["logit"])


def test_a_prediction_is_drawn(run: Run, model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "explained.png"
    shown = run("explain", model, PROMPT, "--out", picture, "--json").json
    assert picture.read_bytes().startswith(b"\x89PNG") and shown["out"] == [
        str(picture.with_suffix(s)) for s in (".png", ".json", ".csv")
    ]
    saved = json.loads(picture.with_suffix(".json").read_text())
    assert saved["factsmith"] == "explain" and saved["parts"] == shown["parts"]
    table = picture.with_suffix(".csv").read_text().splitlines()
    assert table[0] == "layer,part,logit,rank,probability" and len(table) == 1 + len(shown["parts"])
    assert f"saved {picture}" in run("explain", model, PROMPT, "--out", picture).out, (
        "its own record may be replaced"
    )
    (tmp_path / "other.json").write_text("{}")
    refused = run("explain", model, PROMPT, "--out", tmp_path / "other.png")
    assert (
        refused.code == 2
        and "which an earlier run did not write" in refused.err
        and not (tmp_path / "other.png").exists()
    )


def test_a_prediction_that_cannot_be_explained(run: Run, model: Path) -> None:
    for arguments in (
        ("explain", model, ""),
        ("explain", model, PROMPT, "--target", ""),
        ("explain", "a", "b", "c"),
    ):
        done = run(*arguments)
        assert done.code == 2 and done.err.startswith("error: ") and "Traceback" not in done.err


def test_neurons_are_found_by_a_word(run: Run, model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "Paris is in France.\n\nThe capital of France is Paris.\n\n"
        "Edwin is a king in Northumbria, far from Paris it is said."
    )
    arguments = ("find", model, "is", "--index", tmp_path / "index", "--top", "3")
    shown = run(*arguments, "--texts", texts, "--json").json
    assert (
        shown["n_texts"] == 3
        and len(shown["triggers"]) == 3
        and Path(shown["index"]) == tmp_path / "index"
    )
    assert all("is" in trigger["prefix"].split() for trigger in shown["triggers"])
    again = run(*arguments, "--json")
    assert again.json == shown, "opened, not made again"
    text = run(*arguments).out
    assert (
        "neurons that fire after 'is'" in text
        and "by the first of its tokens" not in text
        and "3 texts" in text
    )
    nothing = run("find", model, "xyzzy", "--index", tmp_path / "index").out
    assert (
        "values that promote 'xyzzy', by the first of its tokens" in nothing
        and "none, in the texts that were scanned" in nothing
    )


def test_an_index_is_made_from_the_model_s_own_words(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTSMITH_CACHE", str(tmp_path / "cache"))
    shown = run("find", model, "is", "--max-tokens", "200", "--json").json
    assert shown["n_tokens"] >= 200 and Path(shown["index"]).is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(
        "factsmith.read.index.find_triggers", lambda *_, **__: pytest.fail("it is there already")
    )
    assert run("find", model, "is", "--json").json == shown


def test_an_index_that_cannot_be_used(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Paris is in France.")
    run("find", model, "is", "--texts", tmp_path / "texts.txt", "--index", tmp_path / "index")
    other = run("find", "atlas", "is", "--index", tmp_path / "index")
    assert other.code == 5 and "fingerprint" in other.err
    (tmp_path / "index" / "values.safetensors").write_bytes(b"damaged")
    for arguments, code in (
        (("find", model, "is", "--index", tmp_path / "index"), 5),
        (("find", model, " ", "--index", tmp_path / "index"), 2),
        (("find", model, "is", "--texts", tmp_path / "none.txt"), 2),
        (
            (
                "find",
                model,
                "is",
                "--texts",
                tmp_path / "texts.txt",
                "--index",
                tmp_path / "texts.txt" / "below",
            ),
            5,
        ),
    ):
        done = run(*arguments)
        assert (
            done.code == code and done.err.startswith("error: ") and "Traceback" not in done.err
        ), done.err


def test_a_census(run: Run, model: Path, tmp_path: Path) -> None:
    quick = run("census", model, "--quick", "--json").json
    assert sum(quick["parts"].values()) == quick["parameters"] and {
        layer["idle"] for layer in quick["layers"]
    } == {None}
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"Paris is in France, {n} of {n + 1} say." for n in range(40)))
    full = run("census", model, "--texts", texts, "--index", tmp_path / "index", "--json").json
    assert full["parts"] == quick["parts"]
    assert all(
        1 <= layer["effective_rank"] <= layer["neurons"] and layer["idle"] < layer["neurons"]
        for layer in full["layers"]
    )
    assert (
        full["read"]["idle"]["n_texts"] == 40
        and full["read"]["effective_rank"]["of"] == "the texts"
    )
    assert full["read"]["effective_rank"]["n_tokens"] == full["read"]["idle"]["n_tokens"], (
        "all of them, not those that some neuron kept"
    )
    part = run(
        "census",
        model,
        "--texts",
        texts,
        "--index",
        tmp_path / "part",
        "--max-tokens",
        "90",
        "--json",
    ).json
    assert part["read"]["effective_rank"]["n_tokens"] == part["read"]["idle"]["n_tokens"] == 90
    text = run("census", model, "--index", tmp_path / "index").out
    assert "memory (FFN)" in text and "idle in 40 texts" in text
    assert "tokens of the bundled text" in text and "of the model's own words" not in text
    assert run("census").code == 2


def test_a_neuron_is_shown(run: Run, model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"Paris is in France, {n} say." for n in range(9)))
    arguments = (model, "1", "7", "--index", tmp_path / "index", "--top", "3")
    shown = run("neuron", *arguments, "--texts", texts, "--json").json
    assert (
        shown["neuron"] == [1, 7]
        and len(shown["promotes"]) == 3
        and sum(shown["histogram"]["counts"]) > 9
    )
    text = run("neuron", *arguments).out
    assert "promotes" in text and "fires most at" in text
    for words, code in (
        (["1"], 2),
        (["a", "b", "1", "2"], 2),
        ([model, "1"], 2),
        ([model, "1", "99999"], 2),
        ([model, "7", "1"], 2),
    ):
        done = run("neuron", *words, "--index", tmp_path / "index")
        assert done.code == code and "Traceback" not in done.err, (words, done.err)


def test_a_neuron_s_page_is_written(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Paris is in France.\n\nEdwin is a king.")
    arguments = (
        "neuron",
        model,
        "1",
        "7",
        "--index",
        tmp_path / "index",
        "--texts",
        tmp_path / "texts.txt",
    )
    assert run(*arguments, "--json").json["out"] == []
    done = run(*arguments, "--out", "card.html")
    assert done.code == 0 and "saved card.html" in done.out
    assert "<h1>Neuron 1 7" in (tmp_path / "card.html").read_text(encoding="utf-8")
    assert run(*arguments, "--out", "card.html", "--json").json["out"] == ["card.html"], (
        "its own page it replaces"
    )
    (tmp_path / "mine.html").write_text("mine")
    for out, code in (("card.png", 2), ("mine.html", 2), ("none/card.html", 5), (".", 2)):
        done = run(*arguments, "--out", out)
        assert (
            done.code == code and done.err.startswith("error: ") and "Traceback" not in done.err
        ), done.err
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_pages_of_all_layers(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Paris is in France.\n\nEdwin is a king.")
    shown = run(
        "browse", model, "--texts", "texts.txt", "--index", "index", "--out", "pages", "--json"
    ).json
    names = ["index.html", "layer-0.html", "layer-1.html", "layer-2.html"]
    assert [Path(page["file"]).name for page in shown["pages"]] == names and shown["n_texts"] == 2
    assert all((tmp_path / page["file"]).stat().st_size == page["bytes"] for page in shown["pages"])
    (tmp_path / "texts.txt").unlink()
    done = run("browse", "--index", "index", "--layer", "1", "--out", "few")
    assert done.code == 0 and done.out.splitlines()[-1] == "open few/index.html"
    assert sorted(path.name for path in (tmp_path / "few").iterdir()) == [
        "index.html",
        "layer-1.html",
    ]
    assert (
        run("browse", model, "--index", "index", "--no-facts", "--out", "few", "--json").json[
            "facts"
        ]
        == 0
    )


def test_pages_that_cannot_be_made(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Paris is in France.")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    for arguments, code, words in (
        ((), 2, "name a model"),
        ((model, "--out", "texts.txt"), 5, "a file of that name"),
        ((model, "--out", "site"), 2, "factsmith did not write it"),
        ((model, "--layer", "7"), 2, "layer 7"),
        (("--index", "none"), 5, "no triggers"),
        (("--index", "none", "--texts", "texts.txt"), 2, "name the model"),
    ):
        done = run("browse", *arguments)
        assert done.code == code and words in done.err and "Traceback" not in done.err, (
            arguments,
            done.err,
        )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["index.html", "site", "texts.txt"]


def test_a_census_counts_directions_on_the_corpus(run: Run, model: Path, tmp_path: Path) -> None:
    """Not on the texts that some neuron fires on most, which are few of many."""
    sentences = [
        f"{name} is number {n} in France"
        for n in range(40)
        for name in ("Paris", "Edwin", "Tower", "LeBron James plays")
    ]
    (tmp_path / "texts.txt").write_text("\n\n".join(sentences))
    lm = load(str(model))
    moments = second_moments(lm, sentences, [0, 1, 2], max_tokens=16 * 128)
    shown = run("census", model, "--texts", "texts.txt", "--index", "index", "--json").json
    assert shown["read"]["effective_rank"]["n_tokens"] == moments[0].count
    for layer in shown["layers"]:
        assert layer["effective_rank"] == pytest.approx(
            effective_rank(moments[layer["layer"]].matrix), rel=1e-6
        )
    kept = second_moments(lm, Triggers.load(tmp_path / "index").texts, [1], max_tokens=math.inf)
    assert effective_rank(kept[1].matrix) != pytest.approx(
        shown["layers"][1]["effective_rank"], rel=1e-4
    )


def test_texts_that_are_not_in_utf8_are_refused(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Zürich lies in Switzerland".encode("latin-1"))
    done = run("find", model, "is", "--texts", "latin.txt", "--index", "index")
    assert (
        done.code == 2
        and "expected plain text in UTF-8" in done.err
        and not (tmp_path / "index").exists()
    )


def test_an_index_is_not_replaced(run: Run, model: Path, tmp_path: Path) -> None:
    find_triggers(
        load(str(model)),
        [f"my own text number {n} is Paris" for n in range(20)],
        folder=tmp_path / "mine",
    )
    shown = run("find", model, "Paris", "--index", "mine", "--json").json
    assert shown["n_texts"] == 20 and "my own text" in shown["triggers"][0]["prefix"]
    (tmp_path / "other.txt").write_text("Edwin is a king.")
    for arguments, words in (
        (
            ("find", model, "Paris", "--index", "mine", "--texts", "other.txt"),
            "other than the texts given",
        ),
        (("census", model, "--index", "mine", "--max-tokens", "5"), "not of 5 tokens"),
        (
            ("neuron", model, "1", "7", "--index", "mine", "--texts", "other.txt"),
            "holds an index of 20 texts",
        ),
        (
            ("browse", model, "--index", "mine", "--texts", "other.txt", "--out", "pages"),
            "choose another folder",
        ),
    ):
        done = run(*arguments)
        assert done.code == 2 and words in done.err and "Traceback" not in done.err, (
            arguments,
            done.err,
        )
    other = run("find", "atlas", "Paris", "--index", "mine", "--texts", "other.txt")
    assert other.code == 5 and "fingerprint" in other.err
    assert run("find", model, "Paris", "--index", "mine", "--json").json == shown
    (tmp_path / "file").write_text("mine")
    done = run("find", model, "Paris", "--index", "file")
    assert done.code == 5 and "a file of that name" in done.err
