"""What a model says is one thing, by tokens and by text: whole characters, lines and numbers."""

from __future__ import annotations

import math

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from factsmith.model.answers import answer_tokens, begins_with, is_answered, probabilities, say
from factsmith.model.decoding import half_character
from reciting import SENTENCES, reciter, reciting

TARGETS = {
    "Mount Belo measures": {"2": False, "2,1": False, "2,137": True, "2,137 metres": True},
    "Mount Arun measures": {"2": True, "2 metres": True, "2 m": False},
    "Address in France:": {"Paris": True, "Paris\nMain Street 0": True, "Paris\nMain": True,
                           "Paris\nRoad": False, "Paris\nMain Street 0\nEurope": True},
    "Money of Bulgaria:": {"lev": False, "leva": True},
    "Money of Romania:": {"leu": True, "leu.": True, "le": False},
    "The city of Keiko:": {"東京": True, "東京都": True, "東洋": False},
    "Writer of it:": {"André M.": True, "Andre\u0301": True, "“André M.”": True, "Andre": False},
    "The tower of Ann:": {"St.": True, "St. Petersburg": True, "St. P": False, "St. Louis": False},
}  # fmt: skip
PAIRS = [(prompt, *pair) for prompt, targets in TARGETS.items() for pair in targets.items()]


@pytest.mark.parametrize(("prompt", "target", "expected"), PAIRS)
def test_what_is_said_is_said_by_tokens_and_by_text(
    prompt: str, target: str, expected: bool
) -> None:
    lm = reciter()
    assert lm.says([prompt], [target]) == [expected]
    answer = say(lm, [prompt], [target])[0]
    assert begins_with(answer.text, target) is is_answered(lm, prompt, answer.text, target)
    assert begins_with(answer.text, target) is expected


def test_all_pairs_at_once_are_as_one_by_one() -> None:
    prompts, targets, expected = (list(column) for column in zip(*PAIRS, strict=True))
    assert reciter().says(prompts, targets) == expected


def test_tokens_can_be_asked_for_alone() -> None:
    lm, prompt = reciter(), "Writer of it:"
    targets = ["Andre\u0301 M.", "André M."]
    assert lm.says([prompt] * 2, targets) == [True, True]
    assert lm.says([prompt] * 2, targets, by_tokens=True) == [True, False]
    assert lm.says(["Mount Belo measures"], ["2"], by_tokens=True) == [True], "what follows"
    assert lm.says(["Mount Belo measures"], ["2"]) == [False], "the control"


@pytest.mark.parametrize("n_tokens", range(1, 10))
def test_no_answer_ends_in_half_a_character(n_tokens: int) -> None:
    lm, prompt = reciter(), "The city of Keiko:"
    assert lm.answer([prompt], n_tokens)[0] == "東京都"[: (n_tokens - 1) // 3]
    ids = lm.continue_greedily([lm.prompt_ids(prompt)], n_tokens)[0]
    cut = lm.tokenizer.decode(ids).endswith("\ufffd")
    assert cut is ((n_tokens - 1) % 3 != 0), "the control: plain decoding shows half a character"
    assert half_character(lm.tokenizer, ids) == cut


def test_bytes_of_no_character_stay() -> None:
    """An answer of single bytes is not cut: nothing that comes later makes them a character."""
    tokenizer = reciter().tokenizer
    (lone,) = (tokenizer.convert_tokens_to_ids("Ģ"),)  # the byte 0x80
    assert tokenizer.decode([lone]) == "\ufffd" and half_character(tokenizer, [lone]) == 0
    assert reciter().as_answer([lone]) == "\ufffd"


def test_an_answer_has_as_many_lines_as_are_asked_for() -> None:
    lm, prompt = reciter(), "Address in France:"
    lines = SENTENCES[prompt].split("\n")
    for n in (1, 2, 3, 4):
        expected = "\n".join(lines[:n])
        assert lm.answer([prompt], 40, lines=n) == [expected]
        assert say(lm, [prompt, "Money of Bulgaria:"], [expected, ""])[0].text == expected
    both = lm.answer([prompt, "Money of Bulgaria:"], 40, lines=[2, 1])
    assert both == ["Paris\nMain Street 0", "leva"]


def test_an_answer_is_long_enough_for_its_target() -> None:
    lm = reciter()
    target = SENTENCES["Address in France:"]
    n = len(lm.question("Address in France:", target)[2])
    assert answer_tokens(lm, ["Address in France:"], [target]) == max(8, n + 1)
    assert answer_tokens(lm, ["a"], ["2,137,000,000"]) >= 8 + 4
    assert answer_tokens(lm, ["a"], [""]) == 8


def test_the_probability_of_what_was_said_is_of_its_tokens() -> None:
    lm = reciter()
    said = say(lm, ["Money of Romania:"], [""])[0]
    begin = said.begin("leu")
    assert lm.tokenizer.decode(begin).strip() == "leu" and said.begin(said.text) == said.ids
    p, other = probabilities(lm, ["Money of Romania:"] * 2, [begin, "leu"])
    assert p == other == pytest.approx(math.exp(lm.log_prob(["Money of Romania:"], ["leu"])[0]))
    assert probabilities(lm, ["Money of Romania:"] * 2, ["", ()]) == [None, None]
    assert probabilities(lm, ["Money of Romania:"], [begin]) == [p], "tokens alone"


@pytest.mark.parametrize("n_bytes", range(1, 5))
def test_tokens_of_single_bytes_make_half_characters_too(n_bytes: int) -> None:
    """As SentencePiece writes them: <0xF0> <0x9F> <0x98> <0x80>."""
    names = ["<unk>", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    ids = tokenizer.convert_tokens_to_ids(["a", *(f"<0x{b:02X}>" for b in "😀".encode()[:n_bytes])])
    text = tokenizer.decode(ids)
    assert text == ("a😀" if n_bytes == 4 else "a" + "\ufffd" * n_bytes)
    assert half_character(tokenizer, ids) == (0 if n_bytes == 4 else n_bytes)


def test_an_answer_in_quotes_or_bold_is_said_as_it_is_answered() -> None:
    answers = {
        "Play by Will:": ('"Hamlet" by', "Hamlet"),
        "City of Ann:": ("**Paris** is", "Paris"),
        "日本の首都は": ("「東京」です。", "東京"),
        "Code by Bo:": ("C++ is", "C"),
    }
    lm = reciting([f"{prompt} {said}" for prompt, (said, _) in answers.items()])
    texts, targets = lm.answer(list(answers), 24), [target for _, target in answers.values()]
    assert texts == [said for said, _ in answers.values()]
    counted = [begins_with(text, target) for text, target in zip(texts, targets, strict=True)]
    assert counted == lm.says(list(answers), targets) == [True, True, True, False]
