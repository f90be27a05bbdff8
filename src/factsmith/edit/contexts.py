"""Contexts: words in front of a prompt, so that a fact's key and target do not hang on one sentence alone.

    generate_contexts(lm, seed=0)      # ROME: "{}" and 20 texts the model writes
    generate_openings(lm, seed=0)      # MEMIT: "{}" and 5 texts that begin with The, Therefore, Because, I, You

A context is a template with one `{}` where the prompt goes. A model with a chat template is also asked as it is asked in use.
"""

from __future__ import annotations

import unicodedata

from ..core.errors import InputError
from ..model.language_model import LanguageModel
from ..model.sample import sample

CONTEXTS = ((5, 10), (10, 10))
"""(length in tokens, how many) of ROME's contexts: the authors' code (the paper says 50 of 2 to 10 tokens)."""

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""How MEMIT's contexts begin, each continued to `_OPENING_TOKENS`: the authors' code."""

SUBJECT = ("{}", "In {}", "About {}", "The story of {}", "It was {}", "by {}")
"""Contexts of the bare subject: other words in front of it than the fact's own prompt has."""

_OPENING_TOKENS = 10

_TOP_K = 5

_SLOT = "factsmith-slot"


def generate_contexts(lm: LanguageModel, seed: int = 0) -> list[str]:
    """The bare "{}" and 20 templates "Some words. {}", the words sampled (top 5) from the model itself, all in one batch.

    The same model and seed give the same list. Ten have 4 sampled tokens and ten have 9: the lengths of the authors' code, which counts
    the start token. A model with a chat template gets one more: the prompt as a user's message. Raises InputError for a tokenizer with
    neither BOS nor EOS to start from.
    """
    lengths = [length - 1 for length, count in CONTEXTS for _ in range(count)]
    sequences = sample(lm, len(lengths), max(lengths), top_k=_TOP_K, seed=seed)
    texts = (
        lm.tokenizer.decode(ids[:length]) for ids, length in zip(sequences, lengths, strict=True)
    )
    return ["{}", *(f"{_plain(text)}. {{}}" for text in texts), *chat_contexts(lm)]


def generate_openings(lm: LanguageModel, seed: int = 0) -> list[str]:
    """The bare "{}" and 5 templates that begin with MEMIT's words and are continued by the model (top 5); else as `generate_contexts`."""
    texts = sample(
        lm, len(OPENINGS), _OPENING_TOKENS - 1, top_k=_TOP_K, seed=seed, openings=OPENINGS
    )
    return [
        "{}",
        *(f"{_plain(lm.tokenizer.decode(ids))}. {{}}" for ids in texts),
        *chat_contexts(lm),
    ]


def chat_contexts(lm: LanguageModel) -> list[str]:
    """The tokenizer's chat template with the prompt as the user's message, up to where the assistant answers; [] when it has none.

    A template that adds nothing, or leaves no one place for the prompt, counts as none. Raises InputError when it cannot be filled.
    """
    if not getattr(lm.tokenizer, "chat_template", None):
        return []
    try:
        text = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": _SLOT}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise InputError(
            f"the chat template of {lm.name} cannot be filled with a user's message ({error}); give contexts, the bare prompt among them, "
            "or take the template out of the tokenizer's files"
        ) from error
    bos = lm.tokenizer.bos_token
    if bos and lm.tokenizer("a")["input_ids"][:1] == [lm.tokenizer.bos_token_id]:
        text = text.removeprefix(bos)  # the tokenizer puts its own in front
    if text.count(_SLOT) != 1 or "{}" in text or text == _SLOT:
        return []
    return [text.replace(_SLOT, "{}")]


def weights(contexts: list[str] | tuple[str, ...]) -> list[float]:
    """What each context weighs in a key of the MEMIT family: the bare prompt one half, the others the other half; either alone, all of it.

    A template that is given several times has its weight in parts.
    """
    bare = sum(context == "{}" for context in contexts)
    others = len(contexts) - bare
    if not bare or not others:
        return [1 / len(contexts)] * len(contexts)
    return [0.5 / (bare if context == "{}" else others) for context in contexts]


def _plain(text: str) -> str:
    """One line without braces, which would be taken for slots."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("{", " ").replace("}", " ").split())
