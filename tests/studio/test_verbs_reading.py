"""The verbs of Ask, Trace, Lens and Memory: what they give, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from factsmith.core.errors import FactsmithError, InputError, NumericsError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.read import index_store
from factsmith.studio.app import create_app
from factsmith.studio.desk import Desk
from factsmith.studio.rooms import ROOMS
from factsmith.studio.session import Studio
from factsmith.studio.verb import Verb
from factsmith.studio.verbs import ask, explain, find, index, lens, memory, neurons, trace
from factsmith.studio.verbs.ask import AskArguments, sources_of
from factsmith.studio.verbs.lens import LensArguments
from factsmith.studio.verbs.memory import InterveneArguments, NeuronArguments
from factsmith.studio.verbs.neurons import NeuronsArguments
from factsmith.studio.verbs.trace import AtArguments, TraceArguments, unsupported
from reading_rooms import PATIENCE, TOKENS, patched_studio, run
from studios import LEV


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Studio]:
    with patched_studio(tmp_path_factory.mktemp("reading") / "space", cache) as opened:
        yield opened


@pytest.fixture(scope="module")
def desk(studio: Studio) -> Desk:
    return studio.desk


@pytest.fixture(autouse=True)
def run_cache(fresh_cache: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the cache of the run, which has the indices of the studio's model."""
    monkeypatch.setenv("FACTSMITH_CACHE", str(cache))


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return load("atlas")


# ── ask ───────────────────────────────────────────────────────────────────────────────────────────


def test_ask_gives_the_document_of_the_command(
    studio: Studio, desk: Desk, base: LanguageModel
) -> None:
    document = run(studio, ask.ASK, prompt=LEV, revision="base", top=3).result
    likely = [{"token": t, "probability": pytest.approx(p)} for t, p in base.next_tokens(LEV, 3)]
    assert document == {
        "prompt": LEV,
        "answer": "lev.",
        "next_tokens": likely,
        "model": "atlas",
        "revision": "base",
    }
    patched = run(studio, ask.ASK, prompt=LEV).result
    assert patched["answer"].startswith("euro") and patched["next_tokens"] != likely


def test_ask_puts_revisions_and_models_side_by_side(studio: Studio, desk: Desk) -> None:
    answer = run(studio, ask.ASK, prompt=LEV, sources=["base", "latest", "atlas-llama"])
    said = {each["source"].split()[0]: each["answer"] for each in answer.result["answers"]}
    assert said["base"] == "lev." and said["latest"].startswith("euro")
    assert answer.result["difference"] == answer.view["difference"]
    assert "base and atlas-llama say 'lev'" in answer.result["difference"]
    assert "says 'euro'" in answer.result["difference"]
    columns = list(answer.tables[-1].columns)
    assert columns[1] == "base" and columns[2].startswith("latest (")
    first = dict(zip(columns, answer.tables[-1].rows[0], strict=True))
    assert first["next token"] == "'le'", "tokens of several models are compared without spaces"
    assert float(first["base"].rstrip("%")) > 90 and float(first["atlas-llama"].rstrip("%")) > 90


def test_equal_weights_are_asked_once(desk: Desk) -> None:
    same = AskArguments(prompt=LEV, sources=["latest", desk_revision(desk), "atlas@latest"])
    assert len(sources_of(desk, same)) == 1
    other = AskArguments(prompt=LEV, sources=["latest", "base"])
    assert sources_of(desk, other) == [("", "latest"), ("", "base")]
    assert sources_of(desk, AskArguments(prompt=LEV, revision="base")) == [("", "base")]


def desk_revision(desk: Desk) -> str:
    with desk.ledger() as ledger:
        return ledger.current[:12]


@pytest.mark.parametrize("source", ["gpt2@base", "nothing", "atlas-llama@latest"])
def test_an_unknown_source_is_refused_by_its_name(desk: Desk, source: str) -> None:
    with pytest.raises(FactsmithError) as refused:
        sources_of(desk, AskArguments(prompt=LEV, sources=["base", source]))
    assert refused.value.argument == "sources"


def test_chat_needs_a_template_and_is_greyed_out_without(studio: Studio, desk: Desk) -> None:
    assert "atlas has no chat template" in ask.ask_limits(desk, {})["chat"]
    assert ask.ask_limits(desk, {"model": "atlas-llama"}) == {}, "it is not loaded yet"
    with pytest.raises(InputError, match="no chat template") as refused:
        run(studio, ask.ASK, prompt=LEV, chat=True)
    assert refused.value.argument == "chat"


def test_a_chat_template_frames_the_prompt(
    studio: Studio, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
    monkeypatch.setattr(desk.lm.tokenizer, "chat_template", template)
    assert ask.ask_limits(desk, {}) == {}
    document = run(studio, ask.ASK, prompt="What {is} it?", chat=True).result
    assert document["prompt"] == "<user> What {is} it?\n<assistant>"


def test_explain_is_the_composition(studio: Studio, desk: Desk) -> None:
    answer = run(studio, explain.EXPLAIN, prompt=LEV, revision="base", instead_of="euro", top=4)
    assert answer.result["target"] == " le" and answer.result["instead_of"] == "euro"
    total = sum(row["logit"] for row in answer.result["parts"])
    assert total == pytest.approx(answer.result["logit"], abs=1e-2)
    links = answer.view["neuron_links"]
    assert len(links) == len(answer.tables[1].rows) == 8
    layer, number = answer.result["neurons"][0]["neuron"]
    assert links[0] == f"/memory/neuron?revision=base&layer={layer}&number={number}"


# ── trace ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_cell_of_the_map_leads_to_the_neurons_at_its_token(studio: Studio, desk: Desk) -> None:
    values = {"prompt": "The currency of {} is the", "subject": "Bulgaria", "revision": "base"}
    answer = run(studio, trace.TRACE, **values)
    token, layer = 3, 0
    assert answer.view["trace"].peak == (token, layer)
    (chart,) = answer.charts
    row = next(row for row in chart.rows if (row["column"], row["layer"]) == (token, layer))
    assert row["score"] == pytest.approx(answer.result["scores"][token][layer])
    at = AtArguments.of_query(pairs_of(row["href"]))
    assert (at.prompt, at.position, at.layer, at.revision) == (LEV, token, layer, "base")
    spot = run(studio, trace.AT, **at.model_dump())
    assert spot.result["tokens"] == list(answer.result["tokens"]), "the same tokens, also with BOS"
    assert spot.result["tokens"][spot.result["position"]] == " Bulgaria"


def pairs_of(address: str) -> list[tuple[str, str]]:
    from urllib.parse import parse_qsl, urlsplit

    return parse_qsl(urlsplit(address).query, keep_blank_values=True)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"kind": "state", "window": "2"}, "window"),
        ({"kind": "mlp", "sever": "attention"}, "sever"),
        ({"fast": "true", "sever": "mlp"}, "sever"),
        ({"corruption": "replace", "noise": "0.1"}, "noise"),
        ({"corruption": "noise", "replacements": ["Romania"]}, "replacements"),
    ],
)
def test_what_has_no_effect_together_is_greyed_out_and_refused(
    values: dict[str, Any], field: str
) -> None:
    reason = unsupported(values)[field]
    with pytest.raises(InputError) as refused:
        TraceArguments.of({"prompt": LEV, "subject": "Bulgaria", **values})
    assert refused.value.argument == field and reason in str(refused.value)
    allowed = {name: value for name, value in values.items() if name != field}
    TraceArguments.of({"prompt": LEV, "subject": "Bulgaria", **allowed})


def test_what_fits_is_not_greyed_out() -> None:
    assert "sever" not in unsupported({"kind": "state"})
    assert "window" not in unsupported({"kind": "attention"})
    assert unsupported({"corruption": "replace"}).keys() == {"window", "noise"}
    assert unsupported({"kind": "nonsense"}).get("sever")


def test_a_subject_that_is_not_there_is_refused_before_the_model_is_asked(studio: Studio) -> None:
    with pytest.raises(InputError) as refused:
        run(studio, trace.TRACE, prompt=LEV, subject="Romania")
    assert refused.value.argument == "subject"


def test_the_neurons_of_a_fact_link_to_their_cards(studio: Studio, desk: Desk) -> None:
    answer = run(
        studio,
        neurons.NEURONS,
        prompt="The currency of {} is the",
        subject="Bulgaria",
        paraphrases=["In {} people pay with the"],
        revision="base",
        steps=4,
        top=5,
    )
    assert answer.result["target"] == "lev"
    assert [len(table.rows) for table in answer.tables] == [5, 3]
    card = NeuronArguments.of_query(pairs_of(answer.view["neuron_links"][0]))
    assert card.neuron == tuple(answer.result["top"][0][0])
    silence = InterveneArguments.of_query(pairs_of(answer.view["silence"]))
    assert silence.addresses == [tuple(each) for each in answer.result["refined"]]
    with pytest.raises(InputError, match="slot"):
        run(studio, neurons.NEURONS, prompt="The currency of {} is the")


# ── lens ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_lens_says_where_the_answer_stays(studio: Studio, desk: Desk) -> None:
    before, after = (
        run(studio, lens.LENS, prompt=LEV, revision=revision, target="lev").result
        for revision in ("base", "latest")
    )
    assert before["states"][-1][-1]["target_rank"] == 0
    assert after["states"][-1][-1]["target_rank"] > 0, "the patched model says euro"
    chart = run(studio, lens.LENS, prompt=LEV).charts[0]
    spots = {row["href"] for row in chart.rows}
    assert len(spots) == 6 * 6 + 1 and "" in spots, "the embedding has no neurons"


# ── memory ────────────────────────────────────────────────────────────────────────────────────────


def test_find_links_to_cards_and_a_card_to_its_trials(studio: Studio, desk: Desk) -> None:
    answer = run(studio, find.FIND, word="Paris", top=4, revision="base")
    assert len(answer.result["promoted_by"]) == len(answer.view["promoting_links"]) == 4
    assert len(answer.view["firing_links"]) == len(answer.result["triggers"])
    neuron = NeuronArguments.of_query(pairs_of(answer.view["promoting_links"][0]))
    assert list(neuron.neuron) == answer.result["promoted_by"][0]["neuron"]
    card = run(studio, memory.NEURON, **{**neuron.model_dump(), "facts": 2})
    assert any("Paris" in each["token"] for each in card.result["promotes"])
    label, address = card.view["tries"][0]
    trial = InterveneArguments.of_query(pairs_of(address))
    assert label == "silence it" and trial.factor == 0
    assert trial.prompt == card.result["facts"][0]["prompt"]
    silenced = run(studio, memory.INTERVENE, **trial.model_dump())
    use = card.result["facts"][0]
    assert silenced.result["after"] and use["p_silenced"] != use["p"]


def test_intervene_changes_the_answer_and_leaves_the_model(studio: Studio, desk: Desk) -> None:
    every = [f"{layer} {i}" for layer in (0, 1, 2) for i in range(1024)]
    answer = run(studio, memory.INTERVENE, prompt=LEV, neurons=every, revision="base")
    assert answer.result["before"] == "lev."
    assert answer.result["after"] != "lev.", "three layers are silent"
    assert answer.result["divergence"] > 0.1
    assert run(studio, ask.ASK, prompt=LEV, revision="base").result["answer"] == "lev."
    with pytest.raises(InputError) as refused:
        run(studio, memory.INTERVENE, prompt=LEV, neurons=["99 0"])
    assert "layer 99" in str(refused.value)


def test_numbers_that_overflow_are_refused_by_their_field(studio: Studio) -> None:
    with pytest.raises(NumericsError) as refused:
        run(studio, memory.INTERVENE, prompt=LEV, neurons=["1 296"], factor=1e30)
    assert refused.value.argument == "factor"


@pytest.mark.parametrize(
    ("verb", "values", "field"),
    [
        (ask.ASK, {"prompt": " "}, "prompt"),
        (ask.ASK, {"prompt": "word " * 3000}, "prompt"),
        (explain.EXPLAIN, {"prompt": LEV, "target": "\n"}, "target"),
        (explain.EXPLAIN, {"prompt": LEV, "target": "lev", "instead_of": "lev"}, "instead_of"),
        (lens.LENS, {"prompt": ""}, "prompt"),
        (lens.LENS, {"prompt": "word " * 3000}, "prompt"),
        (trace.TRACE, {"prompt": LEV, "subject": ""}, "subject"),
        (trace.TRACE, {"prompt": LEV, "subject": "Bulgaria", "occurrence": 2}, "occurrence"),
        (trace.TRACE, {"prompt": LEV, "subject": "Bulgaria", "target": "euros"}, "force"),
        (trace.AT, {"prompt": LEV, "layer": 99}, "layer"),
        (trace.AT, {"prompt": LEV, "layer": 0, "position": 99}, "position"),
        (neurons.NEURONS, {"prompt": "word " * 3000}, "prompt"),
        (memory.NEURON, {"layer": 99, "number": 0}, "layer"),
        (memory.NEURON, {"layer": 0, "number": 99999}, "number"),
        (memory.INTERVENE, {"prompt": LEV, "neurons": ["0 99999"]}, "neurons"),
        (memory.INTERVENE, {"prompt": LEV, "neurons": ["99 0"]}, "neurons"),
        (memory.INTERVENE, {"prompt": "word " * 3000, "neurons": ["0 1"]}, "prompt"),
        (find.FIND, {"word": "  "}, "word"),
    ],
)
def test_what_is_refused_names_its_field(
    studio: Studio, verb: Verb[Any], values: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputError) as refused:
        run(studio, verb, revision="base", **values)
    assert refused.value.argument == field, refused.value


def test_without_an_index_pages_say_so_and_offer_to_build_it(
    studio: Studio, client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTSMITH_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(index_store, "_TOKENS", TOKENS)
    address = find.FindArguments(word="Paris", revision="base", top=3).address
    values = {"word": "Paris", "revision": "base", "top": 3}
    word = run(studio, find.FIND, **values)
    assert word.result["triggers"] is None and len(word.result["promoted_by"]) == 3
    page = client.get(address("/memory/find")).text
    assert 'action="/memory/index"' in page and 'value="base"' in page
    layer, number = word.result["promoted_by"][0]["neuron"]
    card = run(studio, memory.NEURON, layer=layer, number=number, revision="base", facts=1, top=3)
    assert card.result["triggers"] is None and len(card.result["facts"]) == 1
    with pytest.raises(InputError) as refused:
        run(studio, memory.CENSUS, quick=False, revision="base")
    assert refused.value.argument == "quick"

    built = run(studio, index.INDEX, revision="base")
    assert built.result["n_tokens"] == TOKENS and str(tmp_path) in built.result["index"]
    run(studio, find.FIND, **values)  # so that the page does not wait
    page = client.get(address("/memory/find")).text
    assert 'action="/memory/index"' not in page and "neurons that fire after" in page
    whole = run(studio, memory.NEURON, layer=layer, number=number, revision="base", facts=1, top=3)
    assert whole.result["triggers"] and whole.result["histogram"]["counts"]
    for ends in ("promotes", "demotes", "facts"):
        for one, other in zip(card.result[ends], whole.result[ends], strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_an_index_of_a_revision_is_of_its_weights(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTSMITH_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(index_store, "_TOKENS", TOKENS)
    folders = {run(studio, index.INDEX, revision=each).result["index"] for each in ("base", "")}
    assert len(folders) == 2
    assert run(studio, find.FIND, word="Paris", top=2).result["index"] in folders
    assert run(studio, ask.ASK, prompt=LEV).result["answer"].startswith("euro"), "it is as before"


@pytest.mark.parametrize("text", ["5 992", "5:992", "(5, 992)", "5.992"])
def test_a_neuron_is_written_in_several_ways(text: str) -> None:
    assert memory.neuron_of(text) == (5, 992)
    assert memory.neuron_of("3 1 7") == (3, 1, 7)


@pytest.mark.parametrize("text", ["", "5", "5 -992", "five 992", "1 2 3 4", "<b>5 9"])
def test_other_texts_are_no_neurons(text: str) -> None:
    with pytest.raises(ValueError, match="not a neuron"):
        memory.neuron_of(text)
    with pytest.raises(InputError) as refused:
        InterveneArguments.of({"prompt": LEV, "neurons": [text]})
    assert refused.value.argument == "neurons"


def test_a_card_asks_for_an_expert_only_where_there_are_some(desk: Desk) -> None:
    assert "no experts" in memory.neuron_limits(desk, {})["expert"]
    assert NeuronArguments(layer=1, expert=2, number=3).neuron == (1, 2, 3)


# ── pages ─────────────────────────────────────────────────────────────────────────────────────────

HOSTILE = "<img src=x onerror=alert(1)></script>{{7*7}}"


@pytest.fixture(scope="module")
def client(studio: Studio, desk: Desk) -> TestClient:
    return TestClient(create_app(studio), raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("verb", "path"),
    [(verb, f"/{room.name}/{verb.name}") for room in ROOMS[:4] for verb in room.verbs],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_each_room_opens_with_examples_that_give_answers(
    client: TestClient, studio: Studio, verb: Verb[Any], path: str
) -> None:
    page = client.get(path)
    assert page.status_code == 200
    examples = [] if verb.examples is None else verb.examples(studio.desk)
    for label, arguments in examples[:1]:
        assert label.replace("'", "&#39;") in page.text
        fragment = client.get(arguments.address(f"/view/{verb.name}"))
        identity = studio.submit(verb, arguments)
        assert identity.over.wait(PATIENCE) and identity.error is None
        fragment = client.get(arguments.address(f"/view/{verb.name}"))
        assert "as Python" in fragment.text and "box error" not in fragment.text
        assert ("as command" in fragment.text) == bool(verb.command(arguments, studio.desk.place))


def test_hostile_texts_stay_texts(client: TestClient, studio: Studio) -> None:
    for verb, arguments in (
        (ask.ASK, AskArguments(prompt=HOSTILE, sources=["base", "latest"])),
        (explain.EXPLAIN, explain.ExplainArguments(prompt=HOSTILE)),
        (lens.LENS, LensArguments(prompt=HOSTILE)),
        (trace.AT, AtArguments(prompt=HOSTILE, layer=0)),
        (find.FIND, find.FindArguments(word=HOSTILE)),
        (memory.INTERVENE, InterveneArguments(prompt=HOSTILE, neurons=["0 1"])),
        (trace.TRACE, TraceArguments(prompt=f"{HOSTILE} is", subject=HOSTILE)),
        (neurons.NEURONS, NeuronsArguments(prompt=HOSTILE, target=HOSTILE, force=True)),
    ):
        studio.submit(verb, arguments).over.wait(PATIENCE)
        room = next(room for room in ROOMS if verb in room.verbs)
        for path in (f"/view/{verb.name}", f"/{room.name}/{verb.name}"):
            page = client.get(arguments.address(path)).text
            assert "onerror" in page, verb.name
            for markup in ("<img", "</script>{{", ">49<"):
                assert markup not in page, (verb.name, markup)


def test_what_is_refused_is_said_next_to_its_field(client: TestClient) -> None:
    page = client.get("/trace/trace", params={"prompt": LEV, "subject": "Romania"})
    assert page.status_code == 400
    field = page.text.partition('id="f-subject"')[2].partition('id="f-target"')[0]
    assert "is not in" in field
    greyed = client.get("/form/trace", params={"kind": "mlp"}).text
    assert "Only a restored state can be cut off" in greyed
    assert "A state is restored alone" not in greyed
