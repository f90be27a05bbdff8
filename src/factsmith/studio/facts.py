"""The arguments of the room Patch: one fact in a form, or a file of facts.

    arguments = FactArguments(subject="Bulgaria", prompt="The currency of {} is the", target="lev")
    wanted = wanted_of(arguments, desk.folder)
    bench.plan(wanted.sheet.facts, wanted.recipe)

`wanted_of` reads a form and a file in the same way: both become a sheet and a recipe. The sheet is
kept in the workspace, so the command and the program that a page shows can name it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..core.errors import FactError, InputError, LayerError, SubjectError
from ..core.fact import Fact
from ..core.factfile import FactSheet
from ..core.gates import Gates
from ..core.pairs import named_values
from ..patch.recipe import Recipe
from .arguments import Arguments
from .desk import Place
from .sheets import LARGEST, Sheets

MethodName = Literal["", "rome", "r-rome", "memit", "emmet", "alphaedit", "append"]

_ADVANCED: dict[str, Any] = {"advanced": True}

_METHODS: Any = [
    ["", "The file's, or the usual one"],
    ["rome", "rome: one fact"],
    ["r-rome", "r-rome: one fact, for many edits"],
    ["memit", "memit: many facts"],
    ["emmet", "emmet: many facts, exactly"],
    ["alphaedit", "alphaedit: many facts, little drift"],
    ["append", "append: new neurons"],
]
"""(value, label) of the methods that a form offers."""


class FactArguments(Arguments):
    """One fact, or a file of facts, and how to write it."""

    subject: str = Field(
        default="",
        title="Subject",
        description="What the fact is about, as the prompt writes it: Bulgaria.",
        json_schema_extra={"placeholder": "Bulgaria"},
    )
    prompt: str = Field(
        default="",
        title="Prompt",
        description="A text that ends where the answer follows, with {} where the subject goes, or "
        "with the subject itself: The currency of {} is the.",
        json_schema_extra={"placeholder": "The currency of {} is the"},
    )
    target: str = Field(
        default="",
        title="Target",
        description="What the model should say after the prompt.",
        json_schema_extra={"placeholder": "euro"},
    )
    forget: bool = Field(
        default=False,
        title="Forget instead",
        description="Instead of a target: the model should stop saying what it says now.",
    )
    paraphrases: tuple[str, ...] = Field(
        default=(),
        title="Paraphrases",
        description="Other ways to ask, with {} for the subject. They are asked, not written. "
        "Empty: factsmith puts text that the model makes before the prompt.",
        json_schema_extra={**_ADVANCED, "placeholder": "People in {} pay with the"},
    )
    neighbours: tuple[str, ...] = Field(
        default=(),
        title="Neighbours",
        description="Texts whose answers must not change. Empty: factsmith makes some.",
        json_schema_extra={**_ADVANCED, "placeholder": "The currency of Japan is the"},
    )
    sheet: str = Field(
        default="",
        title="File of facts",
        description="The sha256 of a file that was dropped into the form; it replaces the fields "
        "of the fact.",
        json_schema_extra={**_ADVANCED, "widget": "sheet"},
    )
    document: str = Field(
        default="",
        max_length=LARGEST,
        title="Facts as text",
        description="A whole file of facts as text, in YAML, JSON, JSON lines or CSV; it replaces "
        "the fields of the fact.",
        json_schema_extra={**_ADVANCED, "widget": "textarea"},
    )
    method: MethodName = Field(
        default="",
        title="Method",
        description="How the weights are changed. Empty: what the file says; otherwise rome for "
        "one fact, and memit for several.",
        json_schema_extra={**_ADVANCED, "options": _METHODS},
    )
    layers: tuple[int, ...] = Field(
        default=(),
        title="Layers",
        description="The layers to edit, counted from 0. Empty: the recommended ones.",
        json_schema_extra=_ADVANCED,
    )
    settings: tuple[str, ...] = Field(
        default=(),
        title="Settings",
        description="Settings of the method as NAME=VALUE, such as steps=40.",
        json_schema_extra={**_ADVANCED, "placeholder": "steps=40"},
    )
    gates: tuple[str, ...] = Field(
        default=(),
        title="Gates",
        description="What the patch must pass, as NAME=VALUE; none switches a gate off. Shares: "
        "efficacy=1, paraphrases=0.5, neighbours=0.8, earlier=1. Drift at most: kl_text=0.1, "
        "kl_text_worst, kl_facts, changed_share, perplexity.",
        json_schema_extra={**_ADVANCED, "placeholder": "neighbours=0.9"},
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**32 - 1,
        title="Seed",
        description="Seed of everything that is drawn.",
        json_schema_extra=_ADVANCED,
    )
    message: str = Field(
        default="",
        title="Message",
        description="One line for the log, if the patch is kept. Empty: the facts.",
        json_schema_extra=_ADVANCED,
    )

    @model_validator(mode="before")
    @classmethod
    def _with_slot(cls, values: Any) -> Any:
        """Put {} in the place of the subject, where a prompt has the subject once and no slot."""
        prompt, subject = (values.get(name) for name in ("prompt", "subject"))
        if not (isinstance(prompt, str) and isinstance(subject, str) and subject.strip()):
            return values
        pattern = rf"(?<!\w){re.escape(subject.strip())}(?!\w)"
        if re.search("[{}]", prompt) or len(re.findall(pattern, prompt)) != 1:
            return values
        return {**values, "prompt": re.sub(pattern, "{}", prompt)}


@dataclass(frozen=True)
class Wanted:
    """What a form asks for.

    Attributes:
        sheet: The facts and gates.
        recipe: The method, its settings and the layers.
        file: The file that says the same.
    """

    sheet: FactSheet
    recipe: Recipe
    file: Path


@contextlib.contextmanager
def naming_fields() -> Iterator[None]:
    """A block whose errors about a fact or its settings name the field of the form."""
    try:
        yield
    except InputError as error:
        if isinstance(error, LayerError):
            error.argument = "layers"
        elif isinstance(error, SubjectError):
            error.argument = "subject"
        elif error.argument is not None and error.argument not in FactArguments.model_fields:
            error.argument = "settings"  # it names one of the method's settings
        raise


def wanted_of(arguments: FactArguments, workspace: Path) -> Wanted:
    """Return what a form asks for, and keep it as a file of the workspace.

    Raises:
        InputError: when something is missing, given twice, or not valid. Its argument is the field.
        WorkspaceError: when the file cannot be written.
    """
    wanted = _wanted_of(arguments, workspace)
    if not wanted.file.is_file():  # newer sheets have pushed it out
        _wanted_of.cache_clear()
        wanted = _wanted_of(arguments, workspace)
    return wanted


@functools.lru_cache(maxsize=8)
def _wanted_of(arguments: FactArguments, workspace: Path) -> Wanted:
    """Return what a form asks for. A page asks several times, and many facts take seconds."""
    sheets = Sheets(workspace)
    sheet = _sheet_of(arguments, sheets)
    recipe = Recipe.for_sheet(
        sheet,
        arguments.method or None,
        named_values(arguments.settings),
        layers=list(arguments.layers) or None,
    )
    try:
        with naming_fields():
            recipe.check(sheet.facts)
    except InputError as error:
        error.argument = error.argument or "settings"
        raise
    changes = {} if recipe.layers is None else {"layers": recipe.layers}
    whole = dataclasses.replace(
        sheet,
        names_gates=True,  # so that `factsmith patch` checks them as `factsmith apply` does
        method=recipe.method,
        settings={**recipe.changes, **changes},
    )
    return Wanted(sheet=sheet, recipe=recipe, file=sheets.keep(whole))


def _sheet_of(arguments: FactArguments, sheets: Sheets) -> FactSheet:
    """Return the sheet of a form, with the gates that the form changes."""
    described = [
        name
        for name in ("subject", "prompt", "target", "forget", "paraphrases", "neighbours")
        if getattr(arguments, name)
    ]
    files = [name for name in ("sheet", "document") if getattr(arguments, name)]
    if files and len(files) + len(described) > 1:
        raise InputError(
            f"{' and '.join([*files, *described])} were given; put every fact into one file, or "
            "leave the file out",
            argument=files[0],
        )
    if arguments.document:
        try:
            sheet = sheets.read(sheets.add("", arguments.document.encode()))
        except InputError as error:
            error.argument = "document"
            raise
    else:
        sheet = sheets.read(arguments.sheet) if arguments.sheet else _one_fact(arguments)
    changed = named_values(arguments.gates, "gates", example="neighbours=0.9")
    if not changed:
        return sheet
    try:
        gates = Gates.from_dict({**dataclasses.asdict(sheet.gates), **changed})
    except FactError as error:
        raise FactError(str(error), argument="gates") from None
    return dataclasses.replace(sheet, gates=gates)


def _one_fact(arguments: FactArguments) -> FactSheet:
    """Return a sheet of the one fact that the fields of a form describe."""
    if arguments.forget and arguments.target.strip():
        raise InputError(
            f"target is {arguments.target!r}, and the model should forget; give one of the two",
            argument="target",
        )
    needed = ["subject", "prompt", *([] if arguments.forget else ["target"])]
    for name in needed:
        if not getattr(arguments, name).strip():
            rest = " Or tick that the model should forget." if name == "target" else ""
            raise InputError(
                f"{name} is empty. A patch needs a subject, a prompt with {{}} and a target, or a "
                f"file of facts.{rest}",
                argument=name,
            )
    try:
        fact = Fact(
            arguments.subject,
            arguments.prompt,
            None if arguments.forget else arguments.target,
            forget=arguments.forget,
            paraphrases=arguments.paraphrases,
            neighbours=arguments.neighbours,
        )
    except FactError as error:
        raise FactError(str(error), argument=_named_field(str(error))) from None
    return FactSheet(facts=(fact,))


def _named_field(message: str) -> str | None:
    """Return the field that a message about a fact names first."""
    names = ("subject", "prompt", "target", "paraphrases", "neighbours")
    words = re.findall(r"\w+", message)
    return next((word for word in words if word in names), None)


# ── the same as code and as a command ─────────────────────────────────────────────────────────────


def file_of(arguments: FactArguments, place: Place) -> str:
    """Return the file of a form, as a command names it."""
    return str(wanted_of(arguments, Path(place.workspace)).file)


def shell(*words: str) -> str:
    """Return the words of a command as one line of a shell; empty words are left out."""
    return shlex.join(["factsmith", *filter(None, words)])


def option_words(pairs: Sequence[tuple[str, object]]) -> list[str]:
    """Return options with their values, those that are empty left out."""
    words: list[str] = []
    for name, value in pairs:
        if value is True:
            words.append(name)
        elif value not in ("", None, False):
            words += [name, str(value)]
    return words


def program(place: Place, *lines: str, uses: str = "") -> str:
    """Return a Python program that opens the workspace and prints JSON.

    Args:
        place: The workspace.
        lines: What runs while the workspace is open as `bench`.
        uses: Lines before that.
    """
    body = "\n".join(f"    {line}" for line in lines)
    before = f"{uses}\n" if uses else ""
    return (
        "import json\n\nimport factsmith as fs\n\n"
        f"{before}lm = fs.load({quoted(place.model)})\n"
        f"with fs.Workbench(lm, {quoted(place.workspace)}) as bench:\n{body}\n"
    )


def quoted(value: Any) -> str:
    """Return a value as Python code."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
