"""What a server says, judged: a real small model behind a server, next to the same in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import factsmith as fs
from factsmith import atlas
from factsmith.core.errors import InputError, ServerError
from factsmith.judge.rows import BASE, Row
from factsmith.judge.served import ServedRun, evaluate_served
from factsmith.keep.export.adapter import export_adapter
from factsmith.remote import client as client_module
from factsmith.remote.server import Server
from model_server import Faults, ModelServer
from scripted import Answer, Asked, scripted

SUITE = fs.load_suite("atlas", limit=4, seed=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def lm() -> fs.LanguageModel:
    return fs.load("atlas-llama")


@pytest.fixture(scope="module")
def delta(lm: fs.LanguageModel) -> fs.Delta:
    config = fs.RomeConfig.recommended(lm)
    moments = fs.find_moments(lm, [config.layer or 0])
    return fs.rome(lm, SUITE.records[0].facts, config, moments=moments)


@pytest.fixture(scope="module")
def adapter(
    lm: fs.LanguageModel, delta: fs.Delta, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "edited"
    export_adapter(lm, delta, folder, verify=False)
    return folder


@pytest.fixture(scope="module")
def running(adapter: Path) -> Iterator[ModelServer]:
    with ModelServer(atlas.folder("atlas-llama")) as server:
        server.load({"lora_name": "edited", "lora_path": str(adapter)})
        yield server


@pytest.fixture(scope="module")
def judged(running: ModelServer) -> fs.Evaluation:
    return evaluate_served(running.url, SUITE)


class Notes:
    """A progress that keeps notes and reports."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.reports: list[tuple[str, int, int | None]] = []

    def __call__(self, step: str, done: int, total: int | None) -> None:
        self.reports.append((step, done, total))

    def note(self, text: str, *, argument: str | None = None) -> None:
        self.texts.append(text)


def texts_of(body: Any) -> list[str]:
    """Return the texts of a request for completions."""
    prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
    return [prompt for prompt in prompts if isinstance(prompt, str)]


def by_question(evaluation: fs.Evaluation, editor: str) -> dict[tuple[str, str, str], Row]:
    return {(row.record, row.kind, row.prompt): row for row in evaluation.asked(editor)}


def differences(one: fs.Evaluation, other: fs.Evaluation, editors: tuple[str, str]) -> list[str]:
    """Return how the rows of two editors differ, beyond 1e-3 in a log-probability."""
    rows, others = by_question(one, editors[0]), by_question(other, editors[1])
    assert rows.keys() == others.keys() and rows
    listed = []
    for key, row in rows.items():
        for name in ("answer", "exact", "stayed", "success"):
            if getattr(row, name) != getattr(others[key], name):
                listed.append(f"{key} {name}")
        for name in ("log_wanted", "log_against", "tokens"):
            ours, theirs = getattr(row, name), getattr(others[key], name)
            if (ours is None) != (theirs is None) or abs((ours or 0) - (theirs or 0)) > 1e-3:
                listed.append(f"{key} {name}: {ours} {theirs}")
    return listed


def test_the_numbers_are_those_of_the_model_in_memory(
    lm: fs.LanguageModel, delta: fs.Delta, judged: fs.Evaluation
) -> None:
    expected = fs.evaluate(lm, SUITE, delta=delta, drift_tokens=0, continued=0)
    assert differences(judged, expected, (BASE, BASE)) == []
    assert differences(judged, expected, ("edited", "delta")) == []
    assert any("exact" in each for each in differences(judged, expected, ("edited", BASE)))
    other = fs.evaluate(fs.load("atlas"), SUITE, drift_tokens=0, continued=0)
    assert differences(judged, other, (BASE, BASE)) != [], "control: another model"
    assert judged.summaries["edited"].keys() == expected.summaries["delta"].keys()


def test_the_evaluation_says_that_a_server_answered(judged: fs.Evaluation) -> None:
    assert judged.editors == (BASE, "edited") and judged.unfinished == {}
    assert judged.model == "base-model" and "vllm, base-model from" in judged.served
    assert "as served" in judged.tables()[0].title and judged.pace == "as served"
    assert judged.measured("edited") == {}, "nothing was written"
    assert judged.to_dict()["served"] == judged.served
    assert "edited" in judged.settings and "served from" in judged.settings["edited"]


def test_only_what_the_base_model_knows_is_judged(
    lm: fs.LanguageModel, running: ModelServer
) -> None:
    known = SUITE.records[1]
    fact = fs.Fact(known.facts[0].subject, known.facts[0].prompt, "x", target_true="Wrongtown")
    question = fs.Question(kind="prompt", prompt=fact.text, answers=("x",), against="Wrongtown")
    unknown = fs.Record(id="unknown", facts=(fact,), questions=(question,))
    open_fact = fs.Fact("Ada Quill", "{} lives in", "Oslo")
    no_old = fs.Record(
        id="no old",
        facts=(open_fact,),
        questions=(fs.Question(kind="prompt", prompt=open_fact.text, answers=("Oslo",)),),
    )
    records = [known, unknown, no_old]
    notes = Notes()
    few = evaluate_served(running.url, records, [], progress=notes)
    assert {row.record for row in few.rows} == {known.id} and few.editors == (BASE,)
    expected, left_out = fs.usable(lm, records)
    assert [each.id for each in expected] == [known.id]
    assert sum("left out" in text for text in notes.texts) == len(left_out) == 2
    everything = evaluate_served(running.url, [known, no_old], [], known_only=False)
    assert {row.record for row in everything.rows} == {known.id, "no old"}
    with pytest.raises(InputError, match="none of 1 record can be judged"):
        evaluate_served(running.url, [unknown])


def test_a_server_without_log_probabilities_is_judged_by_what_it_says(
    running: ModelServer, judged: fs.Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.faults, "no_log_probs", True)
    notes = Notes()
    bare = evaluate_served(running.url, SUITE, progress=notes)
    assert sum("how likely" in text for text in notes.texts) == 1
    names = {name.split(" ", 1)[1] for name in bare.summaries["edited"] if " " in name}
    assert names == {"exact", "stayed"} and not bare.gives_log_probs
    for editor in (BASE, "edited"):
        for name, share in bare.summaries[editor].items():
            assert share == judged.summaries[editor][name]


def test_progress_goes_from_nothing_to_all(running: ModelServer) -> None:
    notes = Notes()
    evaluate_served(running.url, SUITE, progress=notes)
    reports = [(done, total) for step, done, total in notes.reports if step == "judging"]
    total = 2 * sum(len(record.questions) for record in SUITE.records)
    assert reports[0] == (0, total) and reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert len(reports) > 4


def test_a_run_that_lost_its_server_goes_on(
    adapter: Path,
    judged: fs.Evaluation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("factsmith.judge.served._TOGETHER", 1)
    monkeypatch.setattr("factsmith.judge.served._ASKED_AGAIN", 1)
    calls = 0
    whole = Server.complete

    def dying(self: Server, *given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # one asks what is known
            server.faults.dies_at = "/v1/completions"
        return whole(self, *given, **more)

    with ModelServer(atlas.folder("atlas-llama")) as server:
        server.load({"lora_name": "edited", "lora_path": str(adapter)})
        monkeypatch.setattr(Server, "complete", dying)
        with pytest.raises(ServerError, match=r"cannot be reached|connection broke"):
            evaluate_served(server.url, SUITE, folder=tmp_path)
    monkeypatch.setattr(Server, "complete", whole)
    kept = fs.Evaluation.load(tmp_path)
    assert kept.editors == (BASE,) and kept.unfinished == {BASE: 2}
    with ModelServer(atlas.folder("atlas-llama")) as server:
        server.load({"lora_name": "edited", "lora_path": str(adapter)})
        done = evaluate_served(server.url, SUITE, folder=tmp_path)
    assert done.summaries == judged.summaries
    first = [q.prompt for q in SUITE.records[0].questions if q.kind == "paraphrase"]
    asked = {
        prompt
        for body in server.called("/v1/completions")
        if body["model"] == "base-model"
        for prompt in texts_of(body)
    }
    assert first and not asked & set(first), "what was kept is not asked again"
    last = [q.prompt for q in SUITE.records[3].questions if q.kind == "paraphrase"]
    assert last and asked >= set(last), "control: the rest is"


def test_a_folder_belongs_to_one_model_whatever_its_name(tmp_path: Path) -> None:
    with ModelServer(atlas.folder("atlas-llama")) as server:
        first = evaluate_served(server.url, SUITE, known_only=False, folder=tmp_path)
    with ModelServer(atlas.folder("atlas-llama")) as server:
        again = evaluate_served(server.url, SUITE, known_only=False, folder=tmp_path)
        assert again.summaries == first.summaries
        for layer in server.model.model.layers:
            layer.mlp.down_proj.weight.data.zero_()
        with pytest.raises(InputError, match="holds answers of another model"):
            evaluate_served(server.url, SUITE, known_only=False, folder=tmp_path)


def test_a_folder_belongs_to_one_server_and_suite(running: ModelServer, tmp_path: Path) -> None:
    evaluate_served(running.url, SUITE, [], folder=tmp_path)
    with pytest.raises(InputError, match="another run"):
        evaluate_served(running.url, SUITE.records[:2], [], folder=tmp_path)
    with (
        ModelServer(atlas.folder("atlas-llama"), name="other") as other,
        pytest.raises(InputError, match=r"served is .*base-model.*other"),
    ):
        evaluate_served(other.url, SUITE, [], folder=tmp_path)


def test_models_are_chosen_by_name(running: ModelServer) -> None:
    with Server.open(running.url) as server:
        assert list(ServedRun.of(server, None).models) == ["edited"]
        assert list(ServedRun.of(server, ["base-model"]).models) == []
        assert list(ServedRun.of(server, ["edited", "base-model"]).models) == ["edited"]
        with pytest.raises(InputError, match=r"no model 'nobody'; it has base-model, edited"):
            ServedRun.of(server, ["nobody"])
        with pytest.raises(InputError, match="each once"):
            ServedRun.of(server, ["edited", "edited"])
        with pytest.raises(InputError, match="list of names"):
            ServedRun.of(server, "edited")


def test_a_server_of_several_base_models_is_asked_one() -> None:
    def several(asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            return Answer({"data": [{"id": "first"}, {"id": "second"}, {"id": "base"}]})
        if asked.path == "/v1/completions":
            said = f" {asked.body['model']}"
            choices = [{"index": at, "text": said} for at, _ in enumerate(texts_of(asked.body))]
            return Answer({"choices": choices})
        return Answer({}, 404)

    notes = Notes()
    with scripted(several) as running:
        few = evaluate_served(
            running.url, SUITE, known_only=False, max_new_tokens=3, progress=notes
        )
        assert few.editors == (BASE,) and {row.answer for row in few.rows} == {"first"}
        assert any("2 other base models" in text for text in notes.texts)
        two = evaluate_served(running.url, SUITE, ["second", "base"], known_only=False)
    answers = {editor: {row.answer for row in two.asked(editor)} for editor in two.editors}
    assert answers == {BASE: {"second"}, "base (served)": {"base"}}


def test_a_record_that_the_server_refuses_is_left_out() -> None:
    bad = SUITE.records[1].questions[0].prompt

    def refusing(asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            return Answer({"data": [{"id": "m"}]})
        if asked.body is None:
            return Answer({}, 404)
        texts = texts_of(asked.body)
        if bad in texts:
            return Answer({"error": {"message": "the prompt is too long"}}, 400)
        choices = [{"index": at, "text": " Paris"} for at, _ in enumerate(texts)]
        return Answer({"choices": choices})

    with scripted(refusing) as running:
        few = evaluate_served(running.url, SUITE, known_only=False, max_new_tokens=3)
        (reasons,) = few.unusable.values()
        assert list(reasons) == [SUITE.records[1].id]
        assert "the prompt is too long" in reasons[SUITE.records[1].id]
        assert len({row.record for row in few.rows}) == len(SUITE.records) - 1
        with pytest.raises(ServerError, match="too long"):
            evaluate_served(running.url, [SUITE.records[1]], known_only=False, max_new_tokens=3)


def test_a_server_that_wants_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelServer(atlas.folder("atlas-llama"), faults=Faults(key="s3cret")) as server:
        with pytest.raises(ServerError, match="FACTSMITH_API_KEY"):
            evaluate_served(server.url, SUITE)
        monkeypatch.setenv("FACTSMITH_API_KEY", "s3cret")
        assert evaluate_served(server.url, SUITE.records[:1]).editors == (BASE,)
