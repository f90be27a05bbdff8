"""Contexts: words before a prompt, so that a fact's key and target do not depend on one sentence.

    generate_contexts(lm, seed=0)      # for ROME: "{}" and 20 texts of the model
    generate_openings(lm, seed=0)      # for MEMIT: "{}" and 5 texts that begin with The, Because
    ...

A context is a template with one `{}`, where the prompt goes. If the tokenizer has a chat template,
the prompt as a user's message is one more context.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal, TypeAlias

from ..core.checks import check_items, check_text
from ..core.errors import InputError
from ..model.chat import chat_template, chat_templates
from ..model.language_model import LanguageModel
from ..model.sample import sample
from ..model.turns import asking

CONTEXTS = ((5, 10), (10, 10))
"""(length in tokens, number) of ROME's contexts, as in the authors' code. The paper says 50 of 2 to
10 tokens."""

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""The first words of MEMIT's contexts, as in the authors' code."""

SUBJECT = ("{}", "In {}", "About {}", "The story of {}", "It was {}", "by {}")
"""Contexts of the subject alone, with other words than those of a fact's prompt."""

_OPENING_TOKENS = 10
"""Length of MEMIT's contexts in tokens."""

Chat: TypeAlias = bool | Literal["forms"]

_SYSTEM = "You are a helpful assistant."
_TURN = ("Hello!", "Hello! How can I help you?")
"""The system prompt and the first turn of contexts in a chat."""

_TOP_K = 5
"""Each token is sampled from this number of the most probable ones."""


@asking()
def generate_contexts(lm: LanguageModel, seed: int = 0, *, chat: Chat = True) -> list[str]:
    """Return ROME's contexts: the bare "{}" and 20 templates "Some words. {}".

    The model samples the words, all in one batch. The same model and seed give the same list. Ten
    templates have 4 sampled tokens and ten have 9. These are the lengths of the authors' code,
    which counts the start token. With `chat`, the prompt in the chat template follows; with
    chat="forms", also after a system prompt and in a second turn.

    Raises:
        InputError: The tokenizer has neither BOS nor EOS to start from, or its chat template cannot
            be filled.
    """
    lengths = [length - 1 for length, count in CONTEXTS for _ in range(count)]
    sequences = sample(lm, len(lengths), max(lengths), top_k=_TOP_K, seed=seed)
    texts = (
        lm.tokenizer.decode(ids[:length]) for ids, length in zip(sequences, lengths, strict=True)
    )
    chats = chat_contexts(lm, forms=chat == "forms") if chat else []
    return ["{}", *(f"{_plain(text)}. {{}}" for text in texts), *chats]


@asking()
def generate_openings(lm: LanguageModel, seed: int = 0, *, chat: Chat = True) -> list[str]:
    """Return MEMIT's contexts: the bare "{}" and 5 templates that begin with `OPENINGS`.

    The model continues each opening. Otherwise as `generate_contexts`.
    """
    n_tokens = _OPENING_TOKENS - 1
    sequences = sample(lm, len(OPENINGS), n_tokens, top_k=_TOP_K, seed=seed, openings=OPENINGS)
    texts = (lm.tokenizer.decode(ids) for ids in sequences)
    chats = chat_contexts(lm, forms=chat == "forms") if chat else []
    return ["{}", *(f"{_plain(text)}. {{}}" for text in texts), *chats]


def chat_contexts(lm: LanguageModel, *, forms: bool = False) -> list[str]:
    """Return the chat template with the prompt as the user's message, in a list.

    The template ends where the assistant answers. The list is empty if the tokenizer has no chat
    template, if the template adds nothing, or if it does not contain the message exactly once.

    Args:
        lm: The model.
        forms: Whether to add the prompt after a system prompt, and in a second turn.

    Raises:
        InputError: The template cannot be filled.
    """
    if forms:
        return list(dict.fromkeys(chat_templates(lm, _SYSTEM, _TURN).values()))
    template = chat_template(lm)
    return [] if template is None else [template]


def context_weights(contexts: Sequence[str]) -> list[float]:
    """Return the weight of each context in a key of the MEMIT family.

    The bare prompt has one half, and all other contexts together have the other half. If only one
    of the two kinds is given, it has the whole weight. Equal templates share their weight.
    """
    bare = sum(context == "{}" for context in contexts)
    others = len(contexts) - bare
    if not bare or not others:
        return [1 / len(contexts)] * len(contexts)
    return [0.5 / (bare if context == "{}" else others) for context in contexts]


def check_contexts(contexts: Sequence[str]) -> list[str]:
    """Return the templates as a list.

    Raises:
        InputError: One is not a text with exactly one `{}`, or the bare "{}" is not among them.
    """
    templates = check_items(
        contexts, "contexts", 'templates with {}, with the bare "{}" among them'
    )
    for template in templates:
        if check_text(template, "a context").count("{}") != 1:
            raise InputError(
                f"a context is {template!r}: it must have exactly one {{}}, where the prompt goes",
                argument="contexts",
            )
    if "{}" not in templates:
        raise InputError('contexts lacks the bare prompt, "{}". Add it.', argument="contexts")
    return templates


def _plain(text: str) -> str:
    """Return a text as one line without braces, which would be taken for slots."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("{", " ").replace("}", " ").split())
