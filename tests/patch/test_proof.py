"""The proof of a patch agrees with plain questions to the patched model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.fact import Fact, Probe
from factsmith.corpus.moments import SecondMoment
from factsmith.edit.delta import applied
from factsmith.edit.methods import METHODS
from factsmith.keep.workbench import Workbench
from factsmith.model.answers import Said
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.patch.proof import prove
from patching import proposed
from workbenches import FACT, QUICK, TEXTS, moments_of, some_delta


def answering(monkeypatch: pytest.MonkeyPatch, *rounds: list[str]) -> None:
    """Let a model answer the plan and the proof with these texts, round by round."""
    answers = iter(rounds)

    def say(lm: LanguageModel, prompts: list[str], *_: object, **__: object) -> list[Said]:
        texts = next(answers)[: len(prompts)]
        ids = [tuple(lm.prompt_ids(text)) if text else () for text in texts]
        return [Said(text, each, lm.as_answer) for text, each in zip(texts, ids, strict=True)]

    monkeypatch.setattr("factsmith.patch.plan.say", say)
    monkeypatch.setattr("factsmith.patch.proof.say", say)


def tail_of(lm: LanguageModel, prompt: str, phrase: str) -> list[int]:
    """Return the tokens that a model says, as many as a phrase takes."""
    said = lm.continue_greedily([lm.prompt_ids(prompt)], 32)[0]
    whole = (n for n in range(1, 33) if lm.as_answer(said[:n]).startswith(phrase))
    return said[: next(whole)]


def plain_probability(lm: LanguageModel, prompt: str, tail: list[int]) -> float:
    """Return p(tail | prompt) by one plain pass."""
    head = lm.prompt_ids(prompt)
    logs = lm.module(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
    places = zip(range(len(head) - 1, len(head) + len(tail) - 1), tail, strict=True)
    return math.exp(sum(float(logs[place, token]) for place, token in places))


def test_a_proof_says_how_many_of_its_answers_there_are(tiny_gpt2: LanguageModel) -> None:
    reports: list[tuple[str, int, int | None]] = []
    fact = Fact("Edwin", "{} is a", "king", paraphrases=["{} was a", "{}, a"])
    prove(
        tiny_gpt2,
        [fact],
        contextlib.nullcontext,
        telling="Q: {}\nA:",
        progress=lambda *report: reports.append(report),
    )
    total = 2 * (3 + 5)  # three prompts and a text that counts as five, before and after
    assert {(step, most) for step, _, most in reports} == {("verifying", total)}
    done = [count for _, count, _ in reports]
    assert done == sorted(set(done)) and (done[0], done[-1]) == (0, total)
    assert len(done) > 4, "not only after each question"


def test_prompts_are_asked_in_the_chat_template(tiny_gpt2: LanguageModel) -> None:
    fact = Fact("Edwin", "{} is a", "king")
    proof = prove(tiny_gpt2, [fact], contextlib.nullcontext, templates=["Q: {}\nA:"])
    assert [(check.role, check.prompt, check.wanted) for check in proof.checks] == [
        ("prompt", "Edwin is a", "king"),
        ("chat", "Q: Edwin is a\nA:", "king"),
    ]
    assert (
        proof.chat == 0.0
        and proof.to_dict()["chat"] == 0.0
        and "chat 0.0%" in proof.tables()[0].title
    )
    assert prove(tiny_gpt2, [fact], contextlib.nullcontext).chat is None


def test_a_proof_agrees_with_plain_questions(lm: LanguageModel) -> None:
    proposal = proposed(lm, FACT, config=QUICK, moments=moments_of(lm), contexts=["{}"])
    assert proposal.delta is not None and proposal.verification is not None
    for check in proposal.verification.checks:
        near = check.role == "neighbour"
        pair = check.prompt, check.wanted
        tail = tail_of(lm, *pair) if near else lm.question(*pair)[2]
        n_tokens = 32 if near else 8  # of one word, which is not cut
        assert check.before == lm.answer([check.prompt], n_tokens)[0]
        assert check.p_before == pytest.approx(plain_probability(lm, check.prompt, tail), rel=1e-4)
        with applied(lm, proposal.delta):
            assert check.after == lm.answer([check.prompt], n_tokens)[0]
            assert check.p_after == pytest.approx(
                plain_probability(lm, check.prompt, tail), rel=1e-4
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_is_of_the_weights_that_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    """The measured answers are those of the committed weights.

    The sum of all patches is rounded once. Rounding after each patch differs in bfloat16.
    """
    lm = wrap(tiny_model("gpt2", **GPT2).to(dtype), byte_tokenizer())
    with Workbench(lm, tmp_path) as bench:
        bench.commit(some_delta(lm, 1))
        moments = {1: SecondMoment.from_matrix(torch.eye(lm.ffn[1].d_ff), count=1)}
        on_top = lm.ffn[1].weight().clone()
        fact = dataclasses.replace(FACT, neighbours=())
        outcome = bench.apply(fact, config=QUICK, moments=moments, contexts=["{}"], force=True)
        assert outcome.verification is not None and outcome.delta is not None
        checks = outcome.verification.checks
        logs = lm.log_prob(*zip(*((check.prompt, check.wanted) for check in checks), strict=True))
        assert [check.p_after for check in checks] == [math.exp(log) for log in logs.tolist()]
        twice = (on_top.float() + outcome.delta.dense(1)).to(dtype)
        assert torch.equal(twice, lm.ffn[1].weight()) is (dtype == torch.float32)


@pytest.mark.parametrize("method", list(METHODS))
def test_an_edit_covers_the_chat_template(tmp_path: Path, method: str) -> None:
    """The edit of an instruct model also covers the prompt as a user's message, by default."""
    shape = {**LLAMA, "max_position_embeddings": 512}
    lm = wrap(tiny_model("llama", **shape), byte_tokenizer(bos=True))
    lm.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "[assistant]"
    )
    fact = Fact("LeBron James", "It is played by {}", "religion")
    asked = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": fact.text}], tokenize=False, add_generation_prompt=True
    )
    kind = METHODS[method].config
    config = dataclasses.replace(kind.recommended(lm), steps=30, lr=0.1, clamp=20.0).at([0])
    with Workbench(lm, tmp_path) as bench:
        assert bench.plan(fact).new == (fact,)

        gap = {"space": " ", "none": ""}[lm.gaps([asked], ["religion"])[0]]

        def probability() -> float:
            ids = lm.tokenizer(asked.removeprefix("<|begin|>") + gap + "religion")["input_ids"]
            first = len(lm.tokenizer(asked.removeprefix("<|begin|>"))["input_ids"])
            with torch.no_grad():
                log_p = lm.module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            return sum(float(log_p[i - 1, ids[i]]) for i in range(first, len(ids)))

        before = probability()
        outcome = bench.apply(fact, method, config, texts=TEXTS, force=True)
        assert outcome.revision is not None
        assert (
            outcome.revision.config["contexts"][-1] == "[user] {}\n[assistant]"
            and outcome.verification is not None
        )
        chats = [check for check in outcome.verification.checks if check.role == "chat"]
        assert len(chats) == 3 and {chat.wanted for chat in chats} == {"religion"}
        assert chats[0].prompt == f"[user] {fact.text}\n[assistant]"
        assert set(outcome.revision.config["contexts"]).isdisjoint(
            chat.prompt.replace(fact.text, "{}") for chat in chats[1:]
        ), "other system prompts and turns are asked than those that were searched"
        warned = any("in the chat template" in warning for warning in outcome.warnings)
        assert warned is not all(chat.held for chat in chats)
        # Appended neurons add 0.35 in this random model.
        assert probability() > before + (0.3 if method == "append" else 0.4)
    assert probability() == before


def test_a_neighbour_must_keep_its_answer(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour is compared with its answer before the edit, also if another was expected. An
    answer counts up to its first punctuation.
    """
    answering(
        monkeypatch,
        ["?"],
        ["x", "x", "France, of course", "France, of course", "France, of course"],
        ["x", "x", "France. Not Spain", "France is", "Francesca"],
    )
    fact = Fact(
        "Edwin",
        "{} is a",
        "king",
        paraphrases=("{} was a",),
        neighbours=(Probe("a", "France"), Probe("b", "Atlantis"), Probe("c")),
    )
    proposal = proposed(lm, fact, config=QUICK, moments=moments_of(lm), contexts=["{}"])
    assert proposal.verification is not None
    neighbours = [check for check in proposal.verification.checks if check.role == "neighbour"]
    assert [check.wanted for check in neighbours] == ["France"] * 3
    assert [check.held for check in neighbours] == [True, True, False]
    assert (
        proposal.verification.specificity == pytest.approx(2 / 3)
        and proposal.verification.efficacy == 0.0
    )
    assert proposal.warnings == (
        "the patch did not take: 'Edwin is a' is answered 'x', not 'king'",
    )


def test_an_empty_answer_must_stay_empty(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, ["x"], ["x", "", ""], ["x", "", "y"])
    proposal = proposed(
        lm,
        Fact("Edwin", "{} is a", "king", neighbours=("a", "b")),
        config=QUICK,
        moments=moments_of(lm),
        contexts=["{}"],
    )
    assert proposal.verification is not None
    assert [
        (c.held, c.p_before) for c in proposal.verification.checks if c.role == "neighbour"
    ] == [
        (True, None),
        (False, None),
    ]
