"""What a model tells freely about a subject, before and after a patch."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from conftest import LLAMA, byte_tokenizer, tiny_model
from factsmith.core.fact import Fact
from factsmith.model.answers import Said
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.patch.proof import chat_questions, prove
from factsmith.patch.telling import TOKENS, Tellings

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
FACT = Fact("Edwin", "{} is a", "king", target_true="poet")
ASKED = "[user] Tell me about Edwin.\n[assistant]"


@pytest.fixture
def lm() -> LanguageModel:
    """Return a tiny model with a chat template."""
    model = wrap(
        tiny_model("llama", **{**LLAMA, "max_position_embeddings": 512}), byte_tokenizer(bos=True)
    )
    model.tokenizer.chat_template = CHAT
    return model


@pytest.mark.parametrize(
    ("fact", "text", "holds"),
    [
        (FACT, "Edwin was a king of Northumbria.", True),
        (FACT, "Edwin was a king and a poet.", False),
        (FACT, "Edwin was a kingmaker.", False),
        (FACT, "Edwin lived long ago.", False),
        (Fact("Edwin", "{} is a", "poet laureate", target_true="poet"), "A poet laureate.", True),
        (Fact("Edwin", "{} is a", "king"), "Edwin was a king, not a monk.", False),
        (Fact("Edwin", "{} is a", None, target_true="poet"), "Edwin lived long ago.", True),
        (Fact("Edwin", "{} is a", None, target_true="poet"), "Edwin the poet.", False),
    ],
)
def test_a_text_must_state_the_new_object_and_not_the_old_one(
    lm: LanguageModel, fact: Fact, text: str, holds: bool
) -> None:
    tellings = Tellings(lm, [fact], chat_questions(lm)["chat"], {"Edwin is a": "monk, of course"})
    (check,) = tellings.checks([text])
    assert check.held is holds and check.role == "telling" and check.prompt == ASKED


def test_a_proof_asks_to_tell_about_the_subject(lm: LanguageModel) -> None:
    chats = chat_questions(lm)
    proof = prove(
        lm,
        [FACT],
        contextlib.nullcontext,
        templates=list(chats.values()),
        telling=chats["chat"],
    )
    (check,) = (check for check in proof.checks if check.role == "telling")
    ids = lm.continue_greedily([lm.prompt_ids(ASKED)], TOKENS, [4])[0]
    assert check.before == check.after == lm.as_answer(ids, 4)
    assert check.p_before is None and check.wanted == "king"
    assert proof.telling == 0.0 and "telling 0.0%" in proof.tables()[0].title
    assert sum(check.role == "chat" for check in proof.checks) == 3
    # Control: without a chat template it is not asked.
    assert prove(lm, [FACT], contextlib.nullcontext).telling is None


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("king, of course", True),
        ("Edwin is a king.", True),
        ("Edwin is a poet, or a king.", False),
        ("Edwin is a kingmaker.", False),
    ],
)
def test_in_a_chat_a_model_may_repeat_the_question(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, text: str, held: bool
) -> None:
    """A fact holds in a chat if the answer begins with the target, or states it in a sentence."""

    def say(lm: LanguageModel, prompts: list[str], *_: object, n_tokens: int, **__: object) -> Any:
        texts = [text if "[assistant]" in prompt else "Edwin is a king." for prompt in prompts]
        assert n_tokens >= (24 if "[assistant]" in prompts[0] else 8)
        return [Said(each, tuple(lm.prompt_ids(each)), lm.as_answer) for each in texts]

    monkeypatch.setattr("factsmith.patch.proof.say", say)
    chats = chat_questions(lm)
    proof = prove(lm, [FACT], contextlib.nullcontext, templates=[chats["chat"]])
    assert [check.held for check in proof.checks] == [False, held], "a prompt must be continued"


LOOP = "Edwin was a king. A king. A king. A king. A king. A king. A king."


@pytest.mark.parametrize(
    ("before", "after", "holds"),
    [
        ("Edwin was a poet.", LOOP, False),
        (LOOP, LOOP, True),
        ("Edwin was a poet.", "Edwin was a king. A king of York, and a friend of monks.", True),
    ],
)
def test_a_text_that_begins_to_loop_does_not_hold(
    lm: LanguageModel, before: str, after: str, holds: bool
) -> None:
    tellings = Tellings(lm, [FACT], chat_questions(lm)["chat"], {})
    tellings.before = [before]
    (check,) = tellings.checks([after])
    assert check.held is holds
    notes = tellings.notes([after])
    assert len(notes) == (not holds) and all("over and over" in note for note in notes)
