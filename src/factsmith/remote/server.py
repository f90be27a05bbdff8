"""A server that holds a language model, and what it says.

    server = Server.open("http://127.0.0.1:8000")
    server.kind                                                    # "vllm"
    server.models()                                                # base model and adapters
    server.complete(server.base, ["The capital of France is"], n_tokens=8)
    server.log_prob(server.base, ["The capital of France is"], ["Paris"])

Answers come from OpenAI's completions, /v1/completions, by greedy decoding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from ..core.errors import InputError, ServerError
from ..core.gap import Settled, before_gap, plain_gap
from ..core.progress import Progress, tell
from ..core.tables import counted, visible
from .client import Client
from .parallel import in_order
from .replies import (
    Completion,
    Echo,
    Kind,
    Prompt,
    TargetScore,
    as_entries,
    as_mapping,
    as_name,
    completion_of,
    is_number,
    is_said,
    target_score,
)
from .scoring import echoed, forced, token_ids

_TOGETHER = 16
"""Prompts in one request."""

_PLAIN = {"temperature": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Greedy decoding, for every server."""

_KIND_PLAIN: dict[Kind, dict[str, Any]] = {
    "vllm": {"repetition_penalty": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0},
    "llama.cpp": {"repeat_penalty": 1.0, "dry_multiplier": 0.0, "cache_prompt": False},
    "openai": {},
}
"""The same for servers with settings of their own."""

_TELLING = math.log(0.1)
"""Log p of a target's first token from which on it decides about the gap before it."""

_ASKING = "asking the server"


@dataclass(frozen=True)
class ServedModel:
    """A model that a server offers.

    Attributes:
        name: The name by which it is asked.
        parent: The base model of an adapter. None: it is a base model.
        path: The folder or file from which the server says it was loaded. None: it does not say.
        number: The adapter's number in llama.cpp. None: another server, or a base model.
        scale: The adapter's scale in llama.cpp for requests that name none.
        task: The name of its task that llama.cpp reads from an adapter's file. None: it has none.
    """

    name: str
    parent: str | None = None
    path: str | None = None
    number: int | None = None
    scale: float | None = None
    task: str | None = None


class Server:
    """A server that holds a language model. `Server.open` makes one.

    Attributes:
        client: The connection.
        kind: What the server is.
        base: The name of its base model.
    """

    def __init__(self, client: Client, kind: Kind, base: str) -> None:
        """Take what `open` learned."""
        self.client, self.kind, self.base = client, kind, base
        self._together = _TOGETHER
        self._gives: bool | None = None if kind != "llama.cpp" else False
        self._adapters: dict[str, int] | None = None

    @classmethod
    def open(
        cls,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        progress: Progress | None = None,
    ) -> Server:
        """Ask a server what it is.

        Args:
            url: The server's address, with or without /v1 at its end.
            api_key: As for `Client`.
            timeout: Seconds within which a request must be answered.
            retries: How often a request is sent again.
            progress: Called with how far the work is; gets a note for every retry.

        Raises:
            InputError: The address cannot be used, or httpx is not installed.
            ServerError: The server cannot be reached, refuses, or holds no model.
        """
        tell(progress, _ASKING, 0, None)
        client = Client(url, api_key=api_key, timeout=timeout, retries=retries, progress=progress)
        try:
            entries = _entries(client)
            base = next((e for e in entries if not e.get("parent")), entries[0])
            return cls(client, _kind(client, entries), str(base["id"]))
        except BaseException:
            client.close()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def models(self) -> tuple[ServedModel, ...]:
        """Return the models that the server offers now: base models first, then adapters.

        Raises:
            ServerError: The server does not say.
        """
        entries = _entries(self.client)
        if self.kind == "llama.cpp":
            path = as_name(as_mapping(self.client.get("/props")).get("model_path"))
            return (ServedModel(self.base, None, path), *self._llama_adapters())
        models = [
            ServedModel(str(e["id"]), as_name(e.get("parent")), as_name(e.get("root")))
            for e in entries
        ]
        return tuple(sorted(models, key=lambda model: model.parent is not None))

    def _llama_adapters(self) -> list[ServedModel]:
        """Return the adapters of llama.cpp, each by the name of its file."""
        listed = as_entries(self.client.get("/lora-adapters"))
        paths = [str(entry.get("path", "")) for entry in listed]
        stems = [PurePath(path).stem for path in paths]
        names = stems if len({*stems, self.base}) == len(stems) + 1 else paths
        adapters = []
        for at, (entry, name) in enumerate(zip(listed, names, strict=True)):
            number = entry.get("id", at)
            unique = name if names.count(name) == 1 and name != self.base else f"{name}#{number}"
            scale, task = entry.get("scale", 0.0), as_name(entry.get("task_name"))
            if not isinstance(number, int) or not is_number(scale):
                raise ServerError(
                    f"{self.client.url}/lora-adapters gives an adapter the number {number!r:.40} "
                    f"and the scale {scale!r:.40}. Check that the address is that of llama-server."
                )
            adapters.append(ServedModel(unique, self.base, paths[at], number, float(scale), task))
        self._adapters = {str(model.name): int(model.number or 0) for model in adapters}
        return adapters

    def complete(
        self,
        model: str,
        prompts: Sequence[str],
        *,
        n_tokens: int = 8,
        lines: int | Sequence[int] | None = None,
        top: int = 0,
        scales: Mapping[str, float] | None = None,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Return the greedy continuation of each prompt.

        Args:
            model: The name of a served model.
            prompts: The prompts. Spaces at their ends belong to the answer and are not sent.
            n_tokens: The most tokens of an answer.
            lines: How many lines with text an answer has at most: one number, or one for each
                prompt. None: one.
            top: Ask for this many likeliest tokens in each place. 0: ask for no probabilities.
            scales: The scale of each adapter in llama.cpp, by its name. None: 1 for the adapter
                that `model` names, 0 for the others.
            progress: Called with the number of prompts that are answered.

        Raises:
            InputError: There is no such adapter.
            ServerError: The server cannot be reached, refuses, or gives no answer.
        """
        each = [lines or 1] * len(prompts) if not isinstance(lines, Sequence) else list(lines)
        body = {"max_tokens": n_tokens, **({"logprobs": top} if top else {})}
        texts = [before_gap(prompt) for prompt in prompts]
        choices = self.choices(model, texts, body, scales, progress)
        return [completion_of(choice, n) for choice, n in zip(choices, each, strict=True)]

    def log_prob(
        self,
        model: str,
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        gaps: Sequence[Settled] | None = None,
        scales: Mapping[str, float] | None = None,
        progress: Progress | None = None,
    ) -> list[float | None]:
        """Return log p(target | prompt) of each pair in nats; arguments as for `scores`."""
        scores = self.scores(model, prompts, targets, gaps=gaps, scales=scales, progress=progress)
        return [None if score is None else score.log_prob for score in scores]

    def scores(
        self,
        model: str,
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        gaps: Sequence[Settled] | None = None,
        scales: Mapping[str, float] | None = None,
        progress: Progress | None = None,
    ) -> list[TargetScore | None]:
        """Return what the model says of each target after its prompt.

        The server repeats prompt and target with the log-probability of every token. The tokens
        that the prompt alone does not have are those of the target.

        Args:
            model: The name of a served model.
            prompts: The prompts.
            targets: As many targets.
            gaps: What stands between each prompt and its target. None: what the texts show.
            scales: As for `complete`.
            progress: Called with the number of texts that are done.

        Returns:
            As many scores; None for each if the server gives no log-probabilities of a prompt.

        Raises:
            InputError, ServerError: As for `complete`.
        """
        heads = [before_gap(prompt) for prompt in prompts]
        tails = [target.strip() for target in targets]
        pairs = list(zip(heads, tails, strict=True))
        between = gaps or [plain_gap(head, tail).gap for head, tail in pairs]
        wholes = [
            head + (" " if gap == "space" else "") + tail
            for (head, tail), gap in zip(pairs, between, strict=True)
        ]
        texts = list(dict.fromkeys(text for text in [*heads, *wholes] if text))
        if self._gives is False or not texts:
            return [None] * len(pairs)
        if self.kind == "vllm":
            listed = forced(self, model, list(zip(heads, wholes, strict=True)), progress)
        else:
            listed = echoed(self, model, texts, scales, progress)
        if listed is None:
            self._gives = False
            return [None] * len(pairs)
        self._gives = True
        by_text = {"": Echo(), **listed}
        return [
            target_score(by_text.get(head, Echo()), by_text[whole]) if whole in by_text else None
            for head, whole in zip(heads, wholes, strict=True)
        ]

    def gaps(
        self,
        model: str,
        prompts: Sequence[str],
        targets: Sequence[str],
        progress: Progress | None = None,
    ) -> list[Settled]:
        """Return what stands between each prompt and its target.

        Where the texts leave it open, the model's likelier first token decides, if it is likely.

        Args:
            model: The name of a served model.
            prompts: The prompts.
            targets: As many targets.
            progress: As for `scores`.
        """
        pairs = [(before_gap(p), t.strip()) for p, t in zip(prompts, targets, strict=True)]
        rules = {pair: plain_gap(*pair) for pair in pairs}
        settled: dict[tuple[str, str], Settled] = {pair: rule.gap for pair, rule in rules.items()}
        if not (open_pairs := [pair for pair, rule in rules.items() if not rule.sure]):
            return [settled[pair] for pair in pairs]
        forms: tuple[Settled, Settled] = ("space", "none")
        asked = [(*pair, form) for pair in open_pairs for form in forms]
        heads, tails, gaps = (list(column) for column in zip(*asked, strict=True))
        firsts = [
            -math.inf if score is None else score.first
            for score in self.scores(model, heads, tails, gaps=gaps, progress=progress)
        ]
        for pair, space, none in zip(open_pairs, firsts[::2], firsts[1::2], strict=True):
            if space != none and max(space, none) >= _TELLING:
                settled[pair] = "space" if space > none else "none"
        return [settled[pair] for pair in pairs]

    def n_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """Return how many tokens the server's tokenizer writes for each text.

        None: it does not say.
        """
        listed = token_ids(self, texts, special=False)
        return None if listed is None else [len(ids) for ids in listed]

    @property
    def gives_log_probs(self) -> bool | None:
        """Whether the server says how likely a target is. None: it was not asked yet."""
        return self._gives

    def as_users(
        self, prompts: Sequence[str], *, n_tokens: int, lines: Sequence[int]
    ) -> list[Completion]:
        """Return what users get who ask the base model greedily, with no setting of their own.

        In llama.cpp it has the adapters that are switched on, and what the server has kept.

        Args:
            prompts: The prompts.
            n_tokens: The most tokens of an answer.
            lines: For each prompt, how many lines with text its answer has at most.

        Raises:
            ServerError: As for `complete`.
        """
        body = {"model": self.base, "max_tokens": n_tokens, "temperature": 0.0}
        choices = [self._request(body, before_gap(prompt), 1)[0] for prompt in prompts]
        return [completion_of(choice, n) for choice, n in zip(choices, lines, strict=True)]

    def choices(
        self,
        model: str,
        prompts: Sequence[Prompt],
        body: Mapping[str, Any],
        scales: Mapping[str, float] | None,
        progress: Progress | None,
        wanted: Mapping[Prompt, set[int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the server's choice for each prompt; equal prompts are sent once.

        Args:
            model: The name of a served model.
            prompts: Texts, or token ids.
            body: What is asked.
            scales: As for `complete`.
            progress: As for `complete`.
            wanted: For each prompt, the tokens whose log p vLLM gives.
        """
        if isinstance(prompts, str):
            raise InputError(f"prompts is {prompts!r:.60}; give a list of prompts")
        full = {"model": model, **_PLAIN, **_KIND_PLAIN[self.kind], **body}
        full |= self._lora(model, scales)
        texts = list(dict.fromkeys(prompts))
        parts = [texts[at : at + self._together] for at in range(0, len(texts), self._together)]
        tell(progress, _ASKING, 0, len(texts))
        done = 0

        def finished(number: int) -> None:
            nonlocal done
            done += len(parts[number])
            tell(progress, _ASKING, done, len(texts))

        def asking(part: Sequence[Prompt]) -> list[dict[str, Any]]:
            if wanted is None:
                return self._ask(full, part)
            tokens = sorted({token for prompt in part for token in wanted[prompt]})
            return self._ask({**full, "logprob_token_ids": tokens}, part)

        jobs = [partial(asking, part) for part in parts]
        answers = in_order(jobs, finished=finished)
        by_prompt = dict(zip(texts, (c for answer in answers for c in answer), strict=True))
        return [by_prompt[prompt] for prompt in prompts]

    def _ask(self, body: Mapping[str, Any], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Return the choices for a few prompts.

        They go in one request. A server that refuses several prompts gets each alone, and one that
        does not answer in time gets fewer at once, from now on.
        """
        choices: list[dict[str, Any]] = []
        while len(choices) < len(prompts):
            part = list(prompts[len(choices) :][: self._together])
            try:
                choices += self._request(body, part if len(part) > 1 else part[0], len(part))
            except ServerError as error:
                if len(part) == 1:
                    raise
                if error.argument == "timeout":
                    self._ask_fewer(len(part) // 4)
                elif error.status in (200, 400, 422, 500, 501):
                    choices += [self._request(body, prompt, 1)[0] for prompt in part]
                    self._together = 1
                else:
                    raise
        return choices

    def _ask_fewer(self, n: int) -> None:
        """Send at most so many prompts in a request from now on, and say so."""
        if n < self._together:
            self._together = max(1, n)
            few = counted(self._together, "prompt")
            self.client.note(f"{self.client.url} is slow, so it gets {few} at once.")

    def _request(self, body: Mapping[str, Any], prompt: Any, n: int) -> list[dict[str, Any]]:
        answer = self.client.post("/v1/completions", {**body, "prompt": prompt})
        choices = answer.get("choices") if isinstance(answer, dict) else None
        fits = isinstance(choices, list) and len(choices) == n
        said = [choice for choice in as_entries(choices) if fits and is_said(choice)]
        if len(said) != n:
            raise ServerError(
                f"{self.client.url}/v1/completions gave no answer to each of {n} prompts. "
                "Check that the server offers OpenAI's completions, not only chats.",
                status=200,
            )
        places = [choice.get("index") for choice in said]
        if sorted(place for place in places if isinstance(place, int)) == list(range(n)):
            said.sort(key=lambda choice: int(choice["index"]))
        return said

    def _lora(self, model: str, scales: Mapping[str, float] | None) -> dict[str, Any]:
        """Return what a request to llama.cpp says about adapters.

        Raises:
            InputError: There is no such adapter.
        """
        if self.kind != "llama.cpp":
            return {}
        if self._adapters is None:
            self._llama_adapters()
        adapters = self._adapters or {}
        chosen = dict(scales) if scales is not None else {model: 1.0}
        if scales is None and model == self.base:
            chosen = {}
        if missing := [name for name in chosen if name not in adapters]:
            known = ", ".join(map(visible, [self.base, *adapters]))
            raise InputError(
                f"{self.client.url} holds no adapter {visible(missing[0])!r}. It holds: {known}.",
                argument="model",
            )
        return {
            "model": self.base,
            "lora": [{"id": n, "scale": chosen.get(name, 0.0)} for name, n in adapters.items()],
        }


def _entries(client: Client) -> list[dict[str, Any]]:
    """Return the entries of /v1/models: at least one, each with an id."""
    entries = as_entries(as_mapping(client.get("/v1/models")).get("data"))
    named = [entry for entry in entries if isinstance(entry.get("id"), str) and entry["id"]]
    if not named:
        raise ServerError(
            f"{client.url}/v1/models names no model. Check that the address is that of a server "
            "that holds a model."
        )
    return named


def _kind(client: Client, entries: Sequence[Mapping[str, Any]]) -> Kind:
    """Return what a server is, from the services that it has."""
    if isinstance(_try(client, "/lora-adapters"), list):
        return "llama.cpp"
    offers = all({"root", "parent"} <= set(entry) for entry in entries)
    if offers and "version" in as_mapping(_try(client, "/version")):
        return "vllm"
    return "openai"


def _try(client: Client, path: str) -> Any:
    """Return what a server answers. None: it has no such service."""
    try:
        return client.get(path)
    except ServerError as error:
        if error.status is None:
            raise
        return None
