"""lm-evaluation-harness through its own API, on tasks that lie in a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.judge.ability import ability
from factsmith.judge.records import Question, Record
from factsmith.judge.rows import BASE
from factsmith.judge.run import evaluate
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

pytest.importorskip("lm_eval", reason='the harness is not installed: pip install "factsmith[eval]"')

QUESTIONS = [
    {
        "question": f"The home of Entity{n} is",
        "choices": ["Oslo", "Rome", "Nairobi"],
        "right": n % 3,
    }
    for n in range(9)
]


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task, "homes", that reads a local file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "homes.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    task = {
        "task": "homes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "homes.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "homes.yaml").write_text(json.dumps(task))
    return folder


def plain(lm: LanguageModel) -> float:
    """The share of right choices, by the largest sum of log-probabilities in one pass."""
    hits = 0
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            head, tail = (
                lm.tokenizer(row["question"])["input_ids"],
                lm.tokenizer(f" {choice}")["input_ids"],
            )
            with torch.no_grad():
                log_p = (
                    lm.module(input_ids=torch.tensor([head + tail]))
                    .logits[0, len(head) - 1 : -1]
                    .log_softmax(-1)
                )
            sums.append(float(log_p.gather(1, torch.tensor(tail)[:, None]).sum()))
        hits += sums.index(max(sums)) == row["right"]
    return hits / len(QUESTIONS)


def test_it_measures_the_model_as_it_is(
    lm: LanguageModel, tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    measure = ability(lm, ["homes"], folder=tasks)
    before = measure()
    assert before == {"homes acc": pytest.approx(plain(lm))}
    row = lm.module.get_output_embeddings().weight[
        lm.tokenizer("N", add_special_tokens=False)["input_ids"][0]
    ]

    @contextmanager
    def write(_: object) -> Iterator[None]:
        with torch.no_grad():
            lm.module.transformer.ln_f.bias += 300 * row
        try:
            yield
        finally:
            with torch.no_grad():
                lm.module.transformer.ln_f.bias -= 300 * row

    with write([]):
        assert measure() == {"homes acc": pytest.approx(plain(lm))} and plain(lm) == pytest.approx(
            1 / 3
        )
    asked = Question(kind="prompt", prompt="The home of Entity0 is", answers=("Nairobi",))
    record = Record(
        id="r", facts=(Fact("Entity0", "The home of {} is", "Nairobi"),), questions=(asked,)
    )
    evaluation = evaluate(lm, [record], {"pusher": write}, probe=measure, drift_tokens=0)
    assert evaluation.probed(BASE) == before and evaluation.probed("pusher") == {
        "homes acc": pytest.approx(1 / 3)
    }
    assert ability(lm, ["homes"], folder=tasks, limit=3)() != {}
    assert capfd.readouterr().out == ""


def test_what_cannot_be_run_is_refused(
    lm: LanguageModel, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no task 'castles'"):
        ability(lm, ["castles"], folder=tasks)
    with pytest.raises(InputError, match="at least one"):
        ability(lm, [], folder=tasks)
    with pytest.raises(InputError, match="no folder"):
        ability(lm, ["homes"], folder=tmp_path / "nowhere")
    measure = ability(lm, ["homes"], folder=tasks)
    (tasks / "homes.jsonl").unlink()
    with pytest.raises(InputError, match="homes cannot be run"):
        measure()
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(InputError, match="factsmith\\[eval\\]"):
        ability(lm, ["homes"], folder=tasks)
