"""Tracing, neurons and layers."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from commands import CURRENCY, PROMPT, Run, atlas_model
from factsmith.core.fact import Fact
from factsmith.core.factfile import FactFile
from factsmith.model.load import load


def test_trace(run: Run, model: Path, tmp_path: Path) -> None:
    done = run(
        "trace",
        model,
        PROMPT,
        "--subject",
        "Danielle Darrieux",
        "--kind",
        "mlp",
        "--out",
        "trace.png",
    )
    assert done.code == 0 and "saved trace.png" in done.out and "*" in done.out
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    record = run(
        "trace", model, PROMPT, "--subject", "Danielle Darrieux", "--samples", 2, "--json"
    ).json
    assert (
        len(record["scores"]) == len(record["tokens"])
        and record["samples"] == 2
        and record["out"] == []
    )


def test_a_trace_without_a_suffix_is_drawn_twice_with_its_numbers_beside(
    run: Run, model: Path, tmp_path: Path
) -> None:
    asked = ("trace", model, PROMPT, "--subject", "Danielle Darrieux", "--samples", 2)
    assert run(*asked, "--sever", "mlp", "--out", "map").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "map.csv",
        "map.json",
        "map.png",
        "map.svg",
    ]
    record = json.loads((tmp_path / "map.json").read_text())
    header, *rows = (tmp_path / "map.csv").read_text().splitlines()
    assert (
        header == "column,token,subject,layer,score,effect"
        and len(rows) == len(record["tokens"]) * 3
        and record["sever"] == "mlp"
    )
    quick = run(*asked, "--fast", "--json").json
    assert -1 <= quick["rank_correlation"] <= 1 and quick["scores"] != record["scores"]
    replaced = run(
        *asked, "--corruption", "replace", "--replacement", "Edwin Northumbria", "--json"
    )
    assert replaced.code in (0, 2) and "Traceback" not in replaced.err


def test_a_target_that_the_model_does_not_say_is_traced_only_when_forced(
    run: Run, model: Path
) -> None:
    asked = (
        "trace",
        model,
        PROMPT,
        "--subject",
        "Danielle Darrieux",
        "--samples",
        2,
        "--target",
        "Brazil",
    )
    said = load(model).answer([PROMPT])[0]
    refused = run(*asked)
    assert (
        refused.code == 2
        and repr(said)[1:-1] in refused.err
        and "--force" in refused.err
        and refused.out == ""
    )
    assert run(*asked, "--force", "--json").json["is_correct"] is False


def test_the_average_over_a_file_of_facts(run: Run, model: Path, tmp_path: Path) -> None:
    lm = load(model)
    prompts = ["The mother tongue of {} is\n", "{} is the capital of\n"]
    known = [
        Fact(subject, prompt, lm.next_tokens(prompt.replace("{}", subject), 1)[0][0])
        for subject, prompt in itertools.product(("Danielle Darrieux", "Edwin", "Paris"), prompts)
        if lm.next_tokens(prompt.replace("{}", subject), 1)[0][0].strip()
    ]
    known = [fact for fact in known if lm.says([fact.text], [fact.target], by_tokens=True)[0]]
    assert known, "the random model says nothing that can be traced"
    FactFile.write("facts.yaml", [*known, Fact("Edwin", "The mother tongue of {} is", "Zürich")])
    record = run(
        "trace", model, "facts.yaml", "--window", 1, "--samples", 2, "--out", "average", "--json"
    ).json
    assert (
        record["n_facts"] == len(known)
        and record["n_skipped"] == 1
        and list(record["effects"]) == ["state", "mlp", "attention"]
    )
    assert {path.name for path in tmp_path.glob("average*")} == {
        *(f"average.{suffix}" for suffix in ("png", "svg", "json", "csv")),
        *(f"average-curves.{suffix}" for suffix in ("png", "svg")),
    }
    shown = run("trace", model, "facts.yaml", "--kind", "mlp", "--samples", 2)
    assert (
        "1 left out" in shown.out
        and "average total effect" in shown.out
        and "attention" not in shown.out
    )
    assert run("trace", model, "facts.yaml", "--target", "x").code == 2


def test_neurons(run: Run, model: Path, tmp_path: Path) -> None:
    asked = (
        "neurons",
        model,
        "The mother tongue of {} is",
        "--subject",
        "Edwin",
        "--paraphrase",
        "{} speaks",
    )
    done = run(
        *asked,
        "--target",
        load(model).next_tokens("The mother tongue of Edwin is", 1)[0][0],
        "--force",
        "--out",
        "chart.svg",
    )
    assert done.code == 0 and "refined" in done.out and "\nrandom " in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chart.csv",
        "chart.json",
        "chart.svg",
    ]
    record = json.loads((tmp_path / "chart.json").read_text())
    assert (
        record["prompts"] == ["The mother tongue of Edwin is", "Edwin speaks"] and record["refined"]
    )
    header, first, *_ = (tmp_path / "chart.csv").read_text().splitlines()
    assert header.startswith("layer,expert,neuron,attribution") and float(
        first.split(",")[3]
    ) == pytest.approx(record["top"][0][1])
    refused = run(*asked, "--target", "Zürich")
    assert refused.code == 2 and "--force" in refused.err
    assert run("neurons", model, "The mother tongue of {} is").code == 2


def test_without_a_target_the_whole_first_phrase_is_followed(run: Run, atlas: str) -> None:
    whole = run("trace", atlas, CURRENCY, "--subject", "Bulgaria", "--samples", 2, "--json")
    (p,) = atlas_model().log_prob([CURRENCY], ["lev"]).exp().tolist()
    assert (
        whole.json["answer"] == " lev"
        and len(whole.json["answer_ids"]) > 1
        and whole.json["clean"] == pytest.approx(p, rel=1e-4)
    )
    assert (
        run(
            "trace",
            atlas,
            "The currency of {} is the",
            "--subject",
            "Bulgaria",
            "--samples",
            2,
            "--json",
        ).json
        == whole.json
    )
    assert "warning" not in whole.err
    fast = run("trace", atlas, CURRENCY, "--subject", "Bulgaria", "--samples", 2, "--fast")
    assert fast.code == 0 and "p(lev)" in fast.out and "its ranks correlate" in fast.out
    record = run("neurons", atlas, CURRENCY, "--steps", 1, "--json").json
    assert record["target"] == "lev" and record["probability"] == [pytest.approx(p, rel=1e-4)]


def test_an_own_answer_that_is_no_word_is_said(run: Run, atlas: str) -> None:
    answer = atlas_model().answer(["Bulgaria"])[0]
    assert answer.startswith(","), "the prompt of this test ends where a sentence goes on"
    refused = run("neurons", atlas, "Bulgaria")
    assert (
        refused.code == 2
        and repr(answer) in refused.err
        and "not an answer of whole words" in refused.err
    )
    traced = run("trace", atlas, "Bulgaria", "--subject", "Bulgaria", "--samples", 1, "--json")
    assert traced.json["answer"] == "," and "its first token is followed" in traced.err


def test_white_space_at_the_end_is_warned_of(run: Run, model: Path) -> None:
    asked = ("trace", model, PROMPT, "--subject", "Danielle", "--samples", 1, "--json")
    assert "ends in white space" not in run(*asked).err
    assert "ends in white space" in run(*asked[:2], f"{PROMPT} ", *asked[3:]).err


def test_what_the_model_says_instead_of_a_forced_target_is_said(run: Run, atlas: str) -> None:
    for command in (
        ["trace", atlas, CURRENCY, "--subject", "Bulgaria", "--samples", 1],
        ["neurons", atlas, CURRENCY, "--steps", 1],
    ):
        done = run(*command, "--target", "dinar", "--force", "--json")
        assert done.code == 0 and "with 'lev' (p = 0.932), not 'dinar'" in done.err
        assert "not 'lev'" not in run(*command, "--target", "lev", "--force", "--json").err


def test_a_corruption_that_takes_nothing_away_is_warned_of(run: Run, atlas: str) -> None:
    asked = ("trace", atlas, CURRENCY, "--subject", "Bulgaria", "--samples", 1)
    assert "the map shows nothing" in run(*asked, "--noise", 0.0001).err
    assert "the map shows nothing" not in run(*asked).err
    replaced = run(*asked, "--corruption", "replace", "--replacement", "Danielle Darrieux")
    assert replaced.code == 2 and "fit into the 1 token of 'Bulgaria'" in replaced.err


def test_the_table_of_averages_fits_a_pipe(
    run: Run, atlas: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    facts = [
        Fact("Bulgaria", "The currency of {} is the", "lev"),
        Fact("Danielle Darrieux", "The mother tongue of {} is", "French"),
    ]
    FactFile.write("facts.yaml", facts)
    asked = ("trace", atlas, "facts.yaml", "--window", 2, "--sever", "attention", "--samples", 1)
    record, shown = run(*asked, "--json").json, run(*asked).out
    assert max(map(len, shown.splitlines())) <= 80
    last = shown[shown.index("\nlast token") :]
    for name, effects in record["effects"].items():
        best = max(range(len(effects[-1])), key=lambda layer: effects[-1][layer])
        half = (record["high"][name][-1][best] - record["low"][name][-1][best]) / 2
        assert f"{name}: {effects[-1][best]:.3f} ± {half:.3f} @{best}" in last
    monkeypatch.setenv("COLUMNS", "120")
    assert re.search(
        r"last token +2( +\d\.\d{3} ± \d\.\d{3} @\d){4}$", run(*asked).out, re.MULTILINE
    )
    FactFile.write("facts.yaml", facts[:1])
    assert run("trace", atlas, "facts.yaml", "--kind", "state", "--samples", 1).out.startswith(
        "1 fact: "
    )


def test_layers(run: Run, model: Path, tmp_path: Path) -> None:
    fallen = run("layers", model, "--json").json
    assert fallen["source"] == "depth" and fallen["rome"] in range(3)
    assert run("layers", model, "--preset").code == 2
    assert run("layers").code == 2 and not list(tmp_path.iterdir())
