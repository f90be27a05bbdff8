"""A method of one's own is named by its function, and judged like the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.judge.run import evaluate
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.patch.editors import check_methods, configured, editors
from factsmith.patch.own_method import function_of
from judging import RECORDS

SOURCE = """
from contextlib import contextmanager
from factsmith.edit.delta import read_weights, written

NUMBER = 3

def weights(lm, facts):
    return {1: 2 * read_weights(lm, [1])[1]}

@contextmanager
def block(lm, facts):
    with written(lm, weights(lm, facts)):
        yield {"facts": len(facts), "word": "x"}

def delta(lm, facts):
    from factsmith.edit.configs import RomeConfig
    from factsmith.edit.methods import rome
    from factsmith.corpus.moments import second_moments
    moments = second_moments(lm, ["one text of some words", "and another one"], [1])
    config = RomeConfig(layer=1, steps=5)
    return rome(lm, facts, config, moments=moments, contexts=["{}"])

def nothing(lm, facts):
    return 3

def broken(lm, facts):
    raise ZeroDivisionError("a mistake")

class Holder:
    @staticmethod
    def weights(lm, facts):
        return weights(lm, facts)
"""


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "own_method_file.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.parametrize("function", ["weights", "block", "delta", "Holder.weights"])
def test_a_function_writes_and_is_taken_back(lm: LanguageModel, file: str, function: str) -> None:
    before, name = lm.fingerprint, f"{file}:{function}"
    check_methods([name])
    assert configured(lm, [name]) == {}
    evaluation = evaluate(lm, RECORDS[:2], editors(lm, [name]), drift_tokens=0)
    assert lm.fingerprint == before and not evaluation.failed
    notes = evaluation.notes[name, 0]
    assert notes["seconds"] >= 0
    assert notes.get("norm", 1.0) > 0 and notes.get("facts", 1) == 1
    answers = [[row.log_wanted for row in evaluation.asked(each)] for each in ("base", name)]
    assert answers[0] != answers[1]


def test_a_module_of_this_folder_is_found(
    lm: LanguageModel, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(file).parent)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    method = function_of("own_method_file:weights")
    assert set(method(lm, [])) == {1}
    sys.modules.pop("own_method_file")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "there is no module no_such_module"),
        ("factsmith.no_such:f", "there is no module factsmith.no_such"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("FILE:missing", "has no missing; it has .*block, .*weights"),
        ("FILE:NUMBER", "is a int; give a function"),
        ("FILE:", "names no function"),
        (":f", "names no function"),
    ],
)
def test_a_wrong_name_is_refused_before_a_model_is_there(file: str, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        check_methods([name.replace("FILE", file)])
    assert error.value.argument == "methods"


@pytest.mark.parametrize(
    ("source", "words"),
    [("import nosuchthing", "nosuchthing"), ("x = (", "SyntaxError"), ("1 / 0", "ZeroDivision")],
)
def test_a_module_that_fails_is_refused_in_words(tmp_path: Path, source: str, words: str) -> None:
    path = tmp_path / "failing.py"
    path.write_text(source)
    with pytest.raises(InputError, match=f"failing.py cannot be imported: .*{words}"):
        function_of(f"{path}:f")


def test_settings_are_refused(file: str) -> None:
    with pytest.raises(InputError, match="has no setting steps"):
        check_methods([f"{file}:weights"], {f"{file}:weights": {"steps": 3}})


def test_mistakes_of_the_function_end_the_run(lm: LanguageModel, file: str) -> None:
    with pytest.raises(InputError, match="returned a int; it must return a Delta"):
        evaluate(lm, RECORDS[:1], editors(lm, [f"{file}:nothing"]), drift_tokens=0)
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        evaluate(lm, RECORDS[:1], editors(lm, [f"{file}:broken"]), drift_tokens=0)
