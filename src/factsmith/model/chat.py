"""A model's chat template as a template for prompts.

    chat_template(lm)                                     # "<|user|>{}<|assistant|>"; None without
    chat_template(lm, system="Answer briefly.")           # after a system prompt
    chat_template(lm, turn=("Hello!", "Hello! How can I help you?"))      # as the second turn
    chat_prompt(lm, "Where is the Louvre?")               # the template with this message

The `{}` is where the user's message goes, and the text ends where the assistant answers.
"""

from __future__ import annotations

from functools import partial

from ..core.errors import InputError
from .language_model import LanguageModel

_SLOT = "factsmith-slot"
"""Marks the message's place while the template is filled, which may treat `{}` in its own way."""


def chat_template(
    lm: LanguageModel, *, system: str | None = None, turn: tuple[str, str] | None = None
) -> str | None:
    """Return the model's chat template with `{}` in place of the user's message.

    Args:
        lm: The model.
        system: A system prompt. None: the template's own, if it has one.
        turn: What the user and the assistant said before. None: nothing.

    Returns:
        The template. None if the tokenizer has no chat template, if the template adds nothing, or
        if it does not contain the message exactly once.

    Raises:
        InputError: The template cannot be filled. Some templates have no place for a system prompt.
    """
    if not getattr(lm.tokenizer, "chat_template", None):
        return None
    messages = [] if system is None else [{"role": "system", "content": system}]
    if turn is not None:
        asked, answered = turn
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    try:
        text = lm.tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": _SLOT}],
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # a template is a program and may raise anything
        raise InputError(
            f"the chat template of {lm.name} cannot be filled with a user's message ({error}). "
            "Either give contexts, with the bare prompt among them, or remove the template from "
            "the tokenizer's files.",
            argument="contexts",
        ) from error
    bos = lm.tokenizer.bos_token
    if bos and lm.tokenizer("a")["input_ids"][:1] == [lm.tokenizer.bos_token_id]:
        text = text.removeprefix(bos)  # the tokenizer adds its own
    if text.count(_SLOT) != 1 or "{}" in text or text == _SLOT:
        return None
    return str(text.replace(_SLOT, "{}"))


def chat_prompt(lm: LanguageModel, message: str) -> str:
    """Return the text that a model reads when a user sends it a message.

    Args:
        lm: The model.
        message: The user's message.

    Raises:
        InputError: The model has no chat template, or the template cannot be filled.
    """
    template = chat_template(lm)
    if template is None:
        raise InputError(f"{lm.name} has no chat template; ask it without one", argument="chat")
    return template.replace("{}", message, 1)


def chat_templates(lm: LanguageModel, system: str, turn: tuple[str, str]) -> dict[str, str]:
    """Return the ways of asking in a chat, by name: "chat" for the message alone, "system", "turn".

    Ways that the template cannot fill, or in which a message of its own is missing, are left out.

    Args:
        lm: The model.
        system: A system prompt.
        turn: What the user and the assistant said before.

    Raises:
        InputError: The template cannot be filled with a user's message alone.
    """
    plain = chat_template(lm)
    if plain is None:
        return {}
    ways = {"chat": plain}
    for name, words, fill in (
        ("system", (system,), partial(chat_template, lm, system=system)),
        ("turn", turn, partial(chat_template, lm, turn=turn)),
    ):
        try:
            text = fill()
        except InputError:
            continue
        if text is not None and all(word in text for word in words):
            ways[name] = text
    return ways
