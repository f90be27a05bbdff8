"""Chat templates as templates for prompts."""

from __future__ import annotations

import pytest

from conftest import LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.model.chat import chat_prompt, chat_template, chat_templates
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

MESSAGES = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
LAST_ONLY = "[user] {{ messages[-1].content }}\n[assistant]"
TURN = ("Hello!", "Hi.")


@pytest.fixture
def lm() -> LanguageModel:
    """Return a tiny model with a chat template."""
    model = wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    model.tokenizer.chat_template = "{{ bos_token }}" + MESSAGES
    return model


def test_the_message_stands_alone_after_a_system_prompt_or_in_a_second_turn(
    lm: LanguageModel,
) -> None:
    assert chat_templates(lm, "Be brief.", TURN) == {
        "chat": "[user] {}\n[assistant]",
        "system": "[system] Be brief.\n[user] {}\n[assistant]",
        "turn": "[user] Hello!\n[assistant] Hi.\n[user] {}\n[assistant]",
    }


def test_forms_that_a_template_does_not_have_are_left_out(lm: LanguageModel) -> None:
    lm.tokenizer.chat_template = NO_SYSTEM + MESSAGES
    assert list(chat_templates(lm, "Be brief.", TURN)) == ["chat", "turn"]
    with pytest.raises(InputError, match="no system role"):
        chat_template(lm, system="Be brief.")
    lm.tokenizer.chat_template = LAST_ONLY  # it loses what came before
    assert list(chat_templates(lm, "Be brief.", TURN)) == ["chat"]
    lm.tokenizer.chat_template = None
    assert chat_templates(lm, "Be brief.", TURN) == {}


def test_a_template_that_cannot_be_filled_at_all_is_refused(lm: LanguageModel) -> None:
    lm.tokenizer.chat_template = "{{ raise_exception('broken') }}"
    with pytest.raises(InputError, match="broken"):
        chat_templates(lm, "Be brief.", TURN)


def test_a_message_is_framed_whatever_it_holds(lm: LanguageModel) -> None:
    assert chat_prompt(lm, "Who is {}? {{x}}") == "[user] Who is {}? {{x}}\n[assistant]"
    lm.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template") as refused:
        chat_prompt(lm, "Who?")
    assert refused.value.argument == "chat"
