"""`factsmith evaluate URL` on real servers: the numbers of the same model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tools.servers import BASE, llama_server, vllm

from factsmith.core.fact import Fact
from factsmith.edit.configs import RomeConfig
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.records import Question, Record
from factsmith.judge.rows import Row
from factsmith.judge.run import evaluate
from factsmith.judge.served import evaluate_served
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel

TOWER = Fact("The Eiffel Tower", "{} is located in the city of", "Rome", target_true="Paris")
JAPAN = Fact("Japan", "The capital of {} is", "Berlin", target_true="Tokyo")


def record(name: str, fact: Fact, paraphrase: str, *neighbours: tuple[str, str]) -> Record:
    """Return a record with questions of three kinds."""
    new, old = str(fact.target), str(fact.target_true)
    stay = (
        Question(kind="neighbour", prompt=prompt, answers=(answer,), against=new)
        for prompt, answer in neighbours
    )
    return Record(
        id=name,
        facts=(fact,),
        questions=(
            Question(kind="prompt", prompt=fact.text, answers=(new,), against=old),
            Question(kind="paraphrase", prompt=paraphrase, answers=(new,), against=old),
            *stay,
        ),
    )


RECORDS = [
    record(
        "tower",
        TOWER,
        "If you want to see the Eiffel Tower, you have to travel to the city of",
        ("The Louvre is located in the city of", "Paris"),
        ("The Brandenburg Gate is located in the city of", "Berlin"),
    ),
    record("japan", JAPAN, "Japan's capital is", ("The capital of France is", "Paris")),
]


@dataclass(frozen=True)
class Made:
    """A patch that says that the tower is in Rome, on disk, and what the model says with it."""

    base: Path
    adapter: Path
    gguf_adapter: Path
    judged: Evaluation


@pytest.fixture(scope="module")
def made(smollm2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("judged")
    smollm2.module.save_pretrained(folder / "base")
    smollm2.tokenizer.save_pretrained(folder / "base")
    with Workbench(smollm2, folder / "space") as bench:
        outcome = bench.apply(TOWER, "rome", RomeConfig(layer=5, scale="auto"), contexts=["{}"])
        assert outcome.revision is not None
        bench.export(folder / "adapter", "adapter", verify=False)
        bench.export(folder / "patch.gguf", "gguf-adapter", verify=False)
        deltas = list(bench.deltas_at(outcome.revision.id).values())
    judged = evaluate(smollm2, RECORDS, delta=deltas, drift_tokens=0, continued=0)
    return Made(folder / "base", folder / "adapter", folder / "patch.gguf", judged)


def rows(evaluation: Evaluation, editor: str) -> dict[str, Row]:
    return {row.prompt: row for row in evaluation.asked(editor)}


def test_vllm_has_the_numbers_of_the_model_in_memory(with_vllm: Path, made: Made) -> None:
    with vllm(with_vllm, made.base, adapters=1, dtype="float32") as server:
        server.post("/v1/load_lora_adapter", {"lora_name": "rome", "lora_path": str(made.adapter)})
        judged = evaluate_served(server.url, RECORDS)
    assert judged.editors == ("base", "rome") and judged.model == BASE
    for editor, in_memory in (("base", "base"), ("rome", "delta")):
        expected = rows(made.judged, in_memory)
        for prompt, row in rows(judged, editor).items():
            assert row.answer == expected[prompt].answer
            assert (row.exact, row.stayed) == (expected[prompt].exact, expected[prompt].stayed)
            for name in ("log_wanted", "log_against", "tokens"):
                expected_value = getattr(expected[prompt], name)
                assert getattr(row, name) == pytest.approx(expected_value, abs=1e-2)
    tower = rows(judged, "rome")[TOWER.text], rows(judged, "base")[TOWER.text]
    assert [row.exact for row in tower] == [row.success for row in tower] == [True, False]


def test_llama_server_is_judged_by_what_it_says(
    with_llama_cpp: Path, gguf_file: Path, made: Made
) -> None:
    """It computes with 4-bit weights, so answers are compared by what they begin with."""
    with llama_server(with_llama_cpp, gguf_file, adapters=[made.gguf_adapter]) as server:
        judged = evaluate_served(server.url, RECORDS)
    assert judged.editors == ("base", "patch") and not judged.gives_log_probs
    for editor, in_memory in (("base", "base"), ("patch", "delta")):
        expected = rows(made.judged, in_memory)
        for prompt, row in rows(judged, editor).items():
            assert (row.exact, row.stayed) == (expected[prompt].exact, expected[prompt].stayed)
            assert row.success is None and row.tokens is None
    tower = rows(judged, "patch")[TOWER.text], rows(judged, "base")[TOWER.text]
    assert [row.exact for row in tower] == [True, False]
