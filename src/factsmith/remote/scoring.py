"""How likely a server finds a target: the log p of each of its tokens.

forced(server, "m", [("Paris is in", "Paris is in France")])       # vLLM: token by token
echoed(server, "m", ["Paris is in", "Paris is in France"])         # others repeat the text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from ..core.errors import ServerError
from ..core.progress import Progress, tell
from .client import Client
from .parallel import in_order
from .replies import Echo, Kind, Prompt, as_mapping, echo_of, n_shared, next_token

_READING = "reading tokens"


class Asked(Protocol):
    """A server that completes prompts."""

    client: Client
    kind: Kind
    base: str

    @property
    def gives_log_probs(self) -> bool | None:
        """Whether the server says how likely a target is. None: it was not asked yet."""

    @property
    def choices(self) -> Callable[..., list[dict[str, Any]]]:
        """Returns the server's choice for each prompt; see `Server.choices`."""


def forced(
    server: Asked, model: str, pairs: Sequence[tuple[str, str]], progress: Progress | None
) -> dict[str, Echo] | None:
    """Return the tokens of prompts, and of prompts with a target, with the log p of a target's.

    Each token of a target is asked for as the next one after those before it. A request for the
    log-probabilities of a prompt would end vLLM's engine where adapters are enabled (vLLM's
    issues 16668 and 29955).

    Args:
        model: The name of a served model.
        pairs: For each target, the prompt, and the prompt with the target.
        progress: As for `scores`.

    Returns:
        {text: its tokens}. None: the server does not give these numbers.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in pair if text))
    listed = token_ids(server, texts, special=True, progress=progress)
    if listed is None:
        return None
    ids = {"": (), **dict(zip(texts, listed, strict=True))}
    places = {
        (whole, at)
        for head, whole in pairs
        for at in range(max(1, n_shared(ids[head], ids[whole])), len(ids[whole]))
    }
    wanted: dict[Prompt, set[int]] = {}
    for whole, at in sorted(places):
        wanted.setdefault(ids[whole][:at], set()).add(ids[whole][at])
    body = {"max_tokens": 1, "logprobs": 1, "return_tokens_as_token_ids": True}
    choices = server.choices(model, list(wanted), body, None, progress, wanted)
    values = {prompt: next_token(choice) for prompt, choice in zip(wanted, choices, strict=True)}
    if any(not tokens <= values[prompt].keys() for prompt, tokens in wanted.items()):
        return None
    echoes = {}
    for text in texts:
        at_each = [
            values.get(ids[text][:at], {}) if (text, at) in places else {}
            for at in range(len(ids[text]))
        ]
        echoes[text] = Echo(
            tuple(map(str, ids[text])),
            tuple(v.get(i) for v, i in zip(at_each, ids[text], strict=True)),
            tuple(max(v.values(), default=None) for v in at_each),
        )
    return echoes


def echoed(
    server: Asked,
    model: str,
    texts: Sequence[str],
    scales: Mapping[str, float] | None,
    progress: Progress | None,
) -> dict[str, Echo] | None:
    """Return the tokens of each text with their log p. None: the server does not give them."""
    body = {"echo": True, "logprobs": 1, "max_tokens": 0}
    if server.gives_log_probs is None:
        try:
            probe = server.choices(model, texts[:1], body, scales, None)
        except ServerError as error:
            if error.status not in (400, 404, 422, 500, 501):
                raise
            return None
        if echo_of(probe[0], texts[0]) is None:
            return None
    choices = server.choices(model, texts, body, scales, progress)
    echoes = {t: echo_of(choice, t) for choice, t in zip(choices, texts, strict=True)}
    return {text: echo for text, echo in echoes.items() if echo is not None}


def token_ids(
    server: Asked, texts: Sequence[str], *, special: bool, progress: Progress | None = None
) -> list[tuple[int, ...]] | None:
    """Return the token ids of texts. None: the server does not give them.

    Args:
        texts: The texts.
        special: Whether a token that begins each text is among them, where there is one.
        progress: Called with the number of texts that are done.
    """
    if server.kind == "openai":
        return None
    done = 0
    tell(progress, _READING, 0, len(texts))

    def ask(text: str) -> tuple[int, ...] | None:
        body: dict[str, Any] = {"content": text, "add_special": special}
        if server.kind == "vllm":
            body = {"model": server.base, "prompt": text, "add_special_tokens": special}
        tokens = as_mapping(server.client.post("/tokenize", body)).get("tokens")
        fits = isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)
        return tuple(tokens) if isinstance(tokens, list) and fits else None

    def finished(_: int) -> None:
        nonlocal done
        done += 1
        tell(progress, _READING, done, len(texts))

    try:
        listed = in_order([partial(ask, text) for text in texts], finished=finished)
    except ServerError as error:
        if error.status is None or error.status in (401, 403):
            raise
        return None
    complete = [ids for ids in listed if ids is not None]
    return complete if len(complete) == len(listed) else None
