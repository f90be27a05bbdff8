"""What servers answer to a request for completions, as values.

    completion_of({"text": " Paris.\\nIt is", "finish_reason": "length"}, lines=1).text   # "Paris."

Servers write probabilities in two forms: that of OpenAI, with parallel lists, and that of
llama.cpp, with one object for each token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..core.lines import first_lines

Kind: TypeAlias = Literal["vllm", "llama.cpp", "openai"]
"""What a server is. "openai": any other that answers OpenAI's completions."""

Prompt: TypeAlias = str | tuple[int, ...]
"""A prompt as text, or as token ids."""


@dataclass(frozen=True)
class Completion:
    """What a server says after a prompt.

    Attributes:
        text: The answer, without white space around it, cut to the lines that were asked for.
        tokens: The new tokens as texts. Empty: they were not asked for, or the server gives none.
        log_probs: Log p of each of these tokens, in nats.
        top: For each of these tokens, the likeliest tokens in its place with their log p.
        whole: All that the server said, before it was cut.
        ended: Whether the model ended its text, rather than reach the number of tokens.
    """

    text: str
    tokens: tuple[str, ...] = ()
    log_probs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[str, float], ...], ...] = ()
    whole: str = ""
    ended: bool = False


@dataclass(frozen=True)
class Echo:
    """The tokens of a text that a server repeated.

    Attributes:
        tokens: The tokens.
        log_probs: Log p of each. None: the first of a text has none.
        highest: Log p of the likeliest token in the place of each. None: not given.
    """

    tokens: tuple[str, ...] = ()
    log_probs: tuple[float | None, ...] = ()
    highest: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class TargetScore:
    """What a server says of a target after a prompt.

    Attributes:
        log_prob: Log p of the target's tokens, summed, in nats.
        n_tokens: How many tokens the target has.
        right: The share of its tokens that are the likeliest in their place. None: not given.
        first: Log p of its first token.
    """

    log_prob: float
    n_tokens: int
    right: float | None
    first: float


Places: TypeAlias = tuple[
    tuple[str, ...], tuple[float, ...], tuple[tuple[tuple[str, float], ...], ...]
]
"""Tokens, the log p of each, and the likeliest tokens in the place of each."""


def completion_of(choice: Mapping[str, Any], lines: int) -> Completion:
    """Return a server's choice as a completion."""
    whole, ended = str(choice["text"]), choice.get("finish_reason") == "stop"
    text = whole if ended else whole.rstrip("\ufffd")  # a character of several tokens, cut
    tokens, log_probs, top = _probabilities(choice.get("logprobs"))
    return Completion(first_lines(text, lines), tokens, log_probs, top, whole, ended)


def _probabilities(value: Any) -> Places:
    """Return the tokens of an answer, in either form. Three times nothing: there are none."""
    fields = as_mapping(value)
    if isinstance(fields.get("content"), list):  # llama.cpp
        places = [
            place for place in as_entries(fields["content"]) if is_number(place.get("logprob"))
        ]
        tops = [
            {str(t.get("token")): t.get("logprob") for t in as_entries(place.get("top_logprobs"))}
            for place in places
        ]
        tokens = [place.get("token") for place in places]
        log_probs = [place["logprob"] for place in places]
    else:
        tokens, log_probs = _lists(fields)
        listed = fields.get("top_logprobs")
        tops = [as_mapping(top) for top in listed] if isinstance(listed, list) else []
    if not all(map(is_number, log_probs)):
        return (), (), ()
    return tuple(map(str, tokens)), tuple(map(float, log_probs)), tuple(map(_likeliest, tops))


def _likeliest(top: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Return tokens with their log p, the likeliest first."""
    pairs = [(token, float(log_p)) for token, log_p in top.items() if is_number(log_p)]
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def _lists(fields: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return the tokens and their log p, in OpenAI's form; nothing where they do not fit."""
    tokens, log_probs = fields.get("tokens"), fields.get("token_logprobs")
    if isinstance(tokens, list) and isinstance(log_probs, list) and len(tokens) == len(log_probs):
        return tokens, log_probs
    return [], []


def echo_of(choice: Mapping[str, Any], text: str) -> Echo | None:
    """Return the tokens of a repeated text. None: the server did not repeat it, or said more."""
    fields = as_mapping(choice.get("logprobs"))
    tokens, log_probs = _lists(fields)
    if not tokens or not str(choice["text"]).endswith(text):
        return None
    if not all(value is None or is_number(value) for value in log_probs):
        return None
    tops = fields.get("top_logprobs")
    listed = tops if isinstance(tops, list) and len(tops) == len(tokens) else [None] * len(tokens)
    highest = (max((p for _, p in _likeliest(as_mapping(top))), default=None) for top in listed)
    return Echo(tuple(map(str, tokens)), tuple(log_probs), tuple(highest))


def target_score(head: Echo, whole: Echo) -> TargetScore | None:
    """Return what a server says of the tokens that a text has after those of its prompt.

    Where prompt and target share a token, it counts as one of the target. None: the text has no
    tokens of its own, or the server gives no number for one.
    """
    start = n_shared(head.tokens, whole.tokens)
    values = [value for value in whole.log_probs[start:] if value is not None]
    if not values or len(values) < len(whole.log_probs) - start:
        return None
    highest = [value for value in whole.highest[start:] if value is not None]
    right: float | None = None
    if len(highest) == len(values):
        right = sum(v >= h for v, h in zip(values, highest, strict=True)) / len(values)
    return TargetScore(float(sum(values)), len(values), right, float(values[0]))


def n_shared(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many tokens two lists share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def next_token(choice: Mapping[str, Any]) -> dict[int, float]:
    """Return {token id: log p} of the next token, as vLLM gives it: the likeliest one included."""
    fields = as_mapping(choice.get("logprobs"))
    tokens, log_probs = _lists(fields)
    tops = fields.get("top_logprobs")
    listed = dict(_likeliest(as_mapping(tops[0]))) if isinstance(tops, list) and tops else {}
    if tokens and is_number(log_probs[0]):
        listed[str(tokens[0])] = float(log_probs[0])
    numbers = {name.removeprefix("token_id:"): value for name, value in listed.items()}
    return {int(name): value for name, value in numbers.items() if name.isdecimal()}


def is_said(choice: Mapping[str, Any]) -> bool:
    """Return whether a choice has a text."""
    return isinstance(choice.get("text"), str)


def as_mapping(value: Any) -> dict[str, Any]:
    """Return a mapping; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def as_entries(value: Any) -> list[dict[str, Any]]:
    """Return the mappings of a list; nothing for anything else."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def as_name(value: Any) -> str | None:
    """Return a text with characters; None for anything else."""
    return value if isinstance(value, str) and value else None


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False
