"""Many questions in one pass each, against asking them one by one."""

from __future__ import annotations

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.judge.asking import ask
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.tokens import target_ids
from factsmith.model.trace import hook_count

PROMPTS = [
    "Paris is the capital of",
    "The",
    "Where is the Eiffel Tower? It is in",
    "Paris is the capital of",
    "東京は",
]
CANDIDATES = [["France", "a country far away"], [], ["Paris", "Rome", "Paris"], ["Rome"], ["日本"]]
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gemma2": {**LLAMA, "head_dim": 8},
    "gptj": {**GPT2, "rotary_dim": 4},
}


def one_by_one(lm: LanguageModel, prompt: str, candidate: str) -> tuple[float, float]:
    """Mean log-probability and share of likeliest tokens in one pass without cache or padding."""
    head, tail = lm.prompt_ids(prompt), target_ids(lm, prompt, candidate)
    with torch.no_grad():
        logits = (
            lm.module(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].float()
        )
    due = torch.tensor(tail)
    log_p = logits.log_softmax(-1).gather(1, due[:, None])
    return float(log_p.mean()), float((logits.argmax(-1) == due).float().mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [4096, 1])
def test_the_numbers_are_those_of_asking_one_by_one(family: str, batch_tokens: int) -> None:
    lm = wrap(
        tiny_model(family, **FAMILIES[family]), byte_tokenizer(bos=family in ("llama", "gemma2"))
    )
    replies = ask(lm, PROMPTS, CANDIDATES, max_new_tokens=6, batch_tokens=batch_tokens)
    for prompt, candidates, reply in zip(PROMPTS, CANDIDATES, replies, strict=True):
        expected = [one_by_one(lm, prompt, candidate) for candidate in candidates]
        assert reply.log_probs == pytest.approx([log for log, _ in expected], abs=2e-5)
        assert reply.right == pytest.approx([right for _, right in expected])
        assert reply.says == tuple(right == 1 for _, right in expected)
        assert reply.n_tokens == tuple(
            len(target_ids(lm, prompt, candidate)) for candidate in candidates
        )
        assert reply.answer == lm.answer([prompt], max_new_tokens=6)[0]
    assert hook_count([lm.module]) == 0
    assert replies[0].log_probs != pytest.approx(
        [log for log, _ in (one_by_one(lm, PROMPTS[2], c) for c in CANDIDATES[0])], abs=1e-3
    )


def test_what_a_model_says_it_says_whole(tiny_gpt2: LanguageModel) -> None:
    """The model says its greedy answer; with another last token it says the tokens before."""
    ids = tiny_gpt2.continue_greedily([tiny_gpt2.prompt_ids("The")], 4)[0]
    assert ids, "the random model must say something"
    said = tiny_gpt2.tokenizer.decode(ids)
    right, wrong = ask(tiny_gpt2, ["The"], [[said, said[:-1] + ("q" if said[-1] != "q" else "z")]])[
        0
    ].right
    expected = [
        one_by_one(tiny_gpt2, "The", text)[1]
        for text in (said, said[:-1] + ("q" if said[-1] != "q" else "z"))
    ]
    assert [right, wrong] == pytest.approx(expected) and wrong < 1


def test_without_candidates_or_answers_there_are_none(tiny_llama: LanguageModel) -> None:
    (only,) = ask(tiny_llama, ["The"])
    assert (only.answer, only.log_probs, only.says) == ("", (), ())
    steps: list[tuple[str, int, int | None]] = []
    ask(tiny_llama, ["The", "Where", "The"], progress=lambda *given: steps.append(given))
    assert steps[-1] == ("asking", 2, 2), "equal prompts are asked once"


def test_bad_input_is_refused_in_words(tiny_llama: LanguageModel) -> None:
    for prompts, candidates in (
        ([], None),
        (["a"], []),
        (["a"], ["b"]),
        (["a", "b"], [["c"]]),
        (["a"], [[""]]),
        ("ab", None),
    ):
        with pytest.raises(InputError):
            ask(tiny_llama, prompts, candidates)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_new_tokens"):
        ask(tiny_llama, ["a"], max_new_tokens=-1)
    with pytest.raises(InputError, match="positions"):
        ask(tiny_llama, ["a"], [["b" * 5000]])


def test_no_answer_is_cut_short_for_anothers_sake(tiny_gpt2: LanguageModel) -> None:
    """A prompt with room for two more tokens does not shorten the answer to a similar prompt."""
    long = "q" * 62
    near = "q" * 55
    assert len(tiny_gpt2.prompt_ids(long)) == 62 and len(tiny_gpt2.prompt_ids(near)) == 55, (
        "of 64 positions"
    )
    together = ask(tiny_gpt2, [long, near], max_new_tokens=8)
    assert [reply.answer for reply in together] == [
        ask(tiny_gpt2, [text], max_new_tokens=8)[0].answer for text in (long, near)
    ]
    assert len(together[1].answer) > len(together[0].answer)
