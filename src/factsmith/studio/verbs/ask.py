"""The room Ask: what models say to a prompt, and why.

ASK         continue a text, with several models or revisions side by side
EXPLAIN     what each part of the model adds to the logit of the answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from ...core.errors import FactsmithError
from ...core.gap import gap_notes
from ...core.progress import Progress
from ...core.tables import Table, in_one_line
from ...keep.ledger import BASE, LATEST
from ...model.chat import chat_prompt
from ...model.language_model import LanguageModel
from ...read.differences import difference
from ...show.charts.chart import Chart
from ...show.charts.predictions import next_tokens
from ..arguments import Source
from ..desk import Desk, Place
from ..verb import Answer, Verb
from .calls import block, call, command, indented, literal, program
from .explain import ExplainArguments
from .fields import PROMPT, Continued, Text, naming, prompts_for, unless
from .lens import LensArguments

_SEEN = 256
"""Next tokens that are read of each source, to compare those that others list."""


class AskArguments(Continued):
    """What to ask, and whom."""

    prompt: Text = Field(
        title="Prompt",
        description="The text that the model continues.",
        json_schema_extra=PROMPT,
    )
    sources: list[str] = Field(
        default=[],
        title="Side by side",
        description="What to compare: base (no patch), latest (all patches), another revision, a "
        "model, or MODEL@REVISION. Empty: the revision that is checked out.",
        json_schema_extra={"widget": "sources"},
    )
    chat: bool = Field(
        default=False,
        title="Ask in the model's chat template",
        description="The prompt becomes a user's message, and the model answers as the assistant.",
    )
    lines: int = Field(
        default=1,
        ge=1,
        le=100,
        title="Lines",
        description="How many lines an answer has at most.",
        json_schema_extra={"advanced": True},
    )


@dataclass(frozen=True)
class Asked:
    """What one source said.

    Attributes:
        label: The name of the source on pages: "base", "latest", or a model.
        model: The name of the model.
        revision: The id of the revision, or "base". None: a model without a workspace.
        answer: What it said.
        prompt: The text that it read.
        likely: Its likeliest next tokens with their probabilities, more than the page lists.
    """

    label: str
    model: str
    revision: str | None
    answer: str
    prompt: str
    likely: tuple[tuple[str, float], ...]

    def to_dict(self, top: int) -> dict[str, Any]:
        """Return the document of the command `ask`."""
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "next_tokens": [{"token": token, "probability": p} for token, p in self.likely[:top]],
            "model": self.model,
            "revision": self.revision,
        }


def sources_of(desk: Desk, arguments: AskArguments) -> list[tuple[str, str]]:
    """Return (model, revision) of each source that is asked; equal weights once.

    Raises:
        InputError: for a model that this studio does not read.
        RevisionError: for a revision that is not there.
    """
    sources = [_source(desk, text.strip()) for text in arguments.sources]
    if arguments.model or arguments.revision or not sources:
        sources.insert(0, (arguments.model, arguments.revision))
    weights: dict[tuple[str, str], tuple[str, str]] = {}
    for model, revision in sources:
        try:
            identity = desk.resolve(revision, model)
        except FactsmithError as error:
            error.argument = "sources" if arguments.sources else error.argument
            raise
        own = "" if desk.is_own(model) else model  # house: the workspace's own model
        weights.setdefault((own, identity), (own, revision))
    return list(weights.values())


def _source(desk: Desk, text: str) -> tuple[str, str]:
    """Return the model and the revision that a text names."""
    if text in desk.models:
        return text, BASE if not desk.is_own(text) else ""
    model, at, revision = text.rpartition("@")
    if at and model in desk.models:
        return model, revision
    return "", text


def _ask(lm: LanguageModel, arguments: AskArguments, label: str, revision: str | None) -> Asked:
    """Ask one model."""
    prompt = chat_prompt(lm, arguments.prompt) if arguments.chat else arguments.prompt
    answer = lm.answer([prompt], arguments.max_new_tokens, lines=arguments.lines)[0]
    likely = lm.next_tokens(prompt, max(arguments.top, _SEEN))
    return Asked(label, lm.name, revision, answer, prompt, tuple(likely))


def _run_ask(desk: Desk, arguments: AskArguments, tell: Progress) -> Answer:
    """Ask every source in turn."""
    asked = []
    sources = sources_of(desk, arguments)
    for n, (model, revision) in enumerate(sources):
        tell("asking", n, len(sources))
        identity = desk.resolve(revision, model)
        with desk.carrying(model, revision, tell) as lm, naming("prompt"):
            known = identity if desk.is_own(model) else None
            asked.append(_ask(lm, arguments, _label(model, revision, identity), known))
    top = arguments.top
    document = asked[0].to_dict(top)
    sentence = difference((each.label, each.answer) for each in asked)
    if len(asked) > 1:
        document = {
            "prompt": arguments.prompt,
            "answers": [{"source": each.label, **each.to_dict(top)} for each in asked],
            "difference": sentence,
        }
    model, revision = sources[0]
    first = {"prompt": asked[0].prompt, "model": model, "revision": revision}
    return Answer(
        document,
        _tables(asked, top),
        [_chart(asked, arguments)],
        warnings=gap_notes([arguments.prompt]),
        view={
            "asked": asked,
            "difference": sentence,
            "with_base": _with_base(desk, arguments, asked),
            "explain": ExplainArguments(**first).address("/ask/explain"),
            "lens": LensArguments(**first).address("/lens/lens"),
        },
    )


def _chart(asked: Sequence[Asked], arguments: AskArguments) -> Chart:
    """Return the chart of the likeliest next tokens."""
    likely = {
        label: sorted(each.items(), key=lambda pair: -pair[1])[: arguments.top]
        for label, each in listed(asked).items()
    }
    return next_tokens(likely, arguments.prompt)


def _label(model: str, revision: str, identity: str) -> str:
    """Return the name of a source on pages."""
    if model:
        return model
    if identity == BASE:
        return BASE
    return f"latest ({identity[:10]})" if revision == LATEST else identity[:10]


def _with_base(desk: Desk, arguments: AskArguments, asked: Sequence[Asked]) -> str:
    """Return the address that also asks the base, or "" where the base is asked already."""
    if any(each.revision == BASE for each in asked) or not desk.is_own(arguments.model):
        return ""
    named = arguments.sources or [LATEST if not arguments.revision else arguments.revision]
    both = arguments.model_copy(update={"sources": [BASE, *named], "model": "", "revision": ""})
    return both.address("/ask/ask")


def listed(asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """Return {label: {token: probability}} of every source, as pages compare them.

    Tokenizers write spaces in their own ways. So tokens of several models are compared without
    them, and of tokens that are equal then the likeliest counts.
    """
    is_one = len({each.model for each in asked}) == 1
    return {
        each.label: {
            (token if is_one else token.strip(" ")): p for token, p in reversed(each.likely)
        }
        for each in asked
    }


def _tables(asked: Sequence[Asked], top: int) -> list[Table]:
    """Return the answers, and the next tokens with the probability that each source gives them."""
    said = [(each.label, in_one_line(each.answer)) for each in asked]
    answers = Table("", {"source": "<", "answer": "<"}, said)
    chances = listed(asked)
    likely = {label: sorted(each, key=lambda t: -each[t])[:top] for label, each in chances.items()}
    tokens = dict.fromkeys(token for each in likely.values() for token in each)
    rows = [(repr(token), *(_p(each, token) for each in chances.values())) for token in tokens]
    return [answers, Table("", {"next token": "<", **dict.fromkeys(chances, ">")}, rows)]


def _p(chances: Mapping[str, float], token: str) -> str:
    """Return the probability of a token as text; of one that was not read, the upper bound."""
    if token in chances:
        shown = f"{chances[token]:.2%}"
        return "< 0.01%" if shown == "0.00%" else shown
    return f"< {max(min(chances.values()), 0.0001):.2%}"


def _ask_python(arguments: AskArguments, place: Place) -> str:
    """Return the program that asks the same."""
    sources = _named(arguments, place)
    prompt = literal(arguments.prompt)
    lines = {} if arguments.lines == 1 else {"lines": arguments.lines}
    asking = [
        f"prompt = chat_prompt(lm, {prompt})" if arguments.chat else f"prompt = {prompt}",
        call("answer = lm.answer", "[prompt]", max_new_tokens=arguments.max_new_tokens, **lines)
        + "[0]",
        f"likely = lm.next_tokens(prompt, {arguments.top})",
        'tokens = [{"token": token, "probability": p} for token, p in likely]',
        'result = {"prompt": prompt, "answer": answer, "next_tokens": tokens}',
    ]
    imports = ["from factsmith.model.chat import chat_prompt"] if arguments.chat else []
    if len(sources) == 1:
        (source,) = sources
        revision = f"revision = {_revision_code(source, place)}"
        whole = 'print(json.dumps({**result, "model": lm.name, "revision": revision}))'
        return program(source, place, [revision, *asking, whole], imports)
    imports.append("from factsmith.read.differences import difference")
    whole = 'return {"source": source, **result, "model": lm.name, "revision": revision}'
    return "\n".join(
        [
            "import json",
            "",
            "import factsmith as fs",
            *imports,
            "",
            "answers = []",
            "",
            "def ask(lm, source, revision):",
            indented("\n".join([*asking, whole])),
            "",
            *(block(source, place, _asking_code(source, place)) for source in sources),
            'said = [(each["source"], each["answer"]) for each in answers]',
            f'result = {{"prompt": {prompt}, "answers": answers, "difference": difference(said)}}',
            "print(json.dumps(result))",
            "",
        ]
    )


def _asking_code(source: Source, place: Place) -> list[str]:
    """Return the code that asks one of several sources, and names it as the page does."""
    label = {BASE: literal(BASE), LATEST: 'f"latest ({revision[:10]})"'}.get(
        source.revision, "revision[:10]"
    )
    if source.model not in ("", place.model):
        label = literal(source.model)
    return [
        f"revision = {_revision_code(source, place)}",
        f"answers.append(ask(lm, {label}, revision))",
    ]


def _revision_code(source: Source, place: Place) -> str:
    """Return the code of the revision's id; None for a model without a workspace."""
    if source.model not in ("", place.model):
        return "None"
    if source.revision == BASE:
        return literal(BASE)
    if not source.revision:
        return "bench.ledger.current"
    return f"bench.ledger.resolve({literal(source.revision)})"


def _ask_command(arguments: AskArguments, place: Place) -> list[str]:
    """Return the commands that ask the same."""
    options = {
        "--chat": arguments.chat,
        "--top": unless(arguments.top, 10),
        "--max-new-tokens": unless(arguments.max_new_tokens, 8),
        "--lines": unless(arguments.lines, 1),
    }
    return [
        line
        for source in _named(arguments, place)
        for line in command(source, place, "ask", [arguments.prompt], options)
    ]


def _named(arguments: AskArguments, place: Place) -> list[Source]:
    """Return the sources as code and commands name them, without a look at the workspace."""
    named = []
    for text in arguments.sources:
        model, at, revision = text.strip().rpartition("@")
        if not at:
            is_revision = _looks_like_revision(revision)
            model, revision = ("", revision) if is_revision else (revision, "")
        named.append(Source(model="" if model == place.model else model, revision=revision))
    if arguments.model or arguments.revision or not named:
        named.insert(0, Source(model=arguments.model, revision=arguments.revision))
    return named


def _looks_like_revision(text: str) -> bool:
    """Return whether a text is "base", "latest" or a prefix of an id."""
    return text in (BASE, LATEST) or (len(text) >= 4 and set(text) <= set("0123456789abcdef"))


def ask_limits(desk: Desk, values: Mapping[str, Any]) -> dict[str, str]:
    """Return {field: why it cannot be used}, for the form of Ask."""
    if not desk.is_own(str(values.get("model") or "")):
        return {}
    if getattr(desk.lm.tokenizer, "chat_template", None):
        return {}
    return {"chat": f"{desk.place.model} has no chat template."}


def ask_options(desk: Desk) -> dict[str, list[str]]:
    """Return the sources that the form offers: revisions, and other models."""
    return {"sources": [BASE, LATEST, *desk.models[1:]]}


def ask_examples(desk: Desk) -> list[tuple[str, AskArguments]]:
    """Return examples for the empty form: (label, arguments)."""
    return [(prompt, AskArguments(prompt=prompt)) for prompt in prompts_for(desk)]


ASK = Verb(
    "ask",
    "Ask",
    "Let the model continue a text. Compare several models or revisions side by side.",
    AskArguments,
    _run_ask,
    _ask_python,
    _ask_command,
    template="answers/ask.html",
    button="Ask",
    disabled=ask_limits,
    examples=ask_examples,
    options=ask_options,
)
