"""The arguments of verbs: one class makes a form, a query, the body of an API call and OpenAPI.

class AskArguments(Source):
    prompt: str = Field(title="Prompt", description="The text that the model continues.")

AskArguments.of_query([("prompt", "The currency of Bulgaria is the"), ("revision", "base")])
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any, Self
from urllib.parse import urlencode

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ..core.checks import check_text
from ..core.errors import InputError
from ..core.explain import NAMED, short


class Arguments(BaseModel):
    """The arguments of a verb. A subclass adds fields with a title and a description."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the arguments with these values.

        Raises:
            InputError: for a value that is not accepted. It carries the name of the first one.
        """
        for name, value in values.items():
            _check_texts(name, value)
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            faults = error.errors(include_url=False)
            place = faults[0]["loc"]
            argument = str(place[0]) if place else None
            words = "; ".join(_fault(fault, cls.model_fields) for fault in faults[:NAMED])
            more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
            raise InputError(words + more, argument=argument) from None

    @classmethod
    def of_query(cls, pairs: Iterable[tuple[str, str]]) -> Self:
        """Return the arguments of a query or a form.

        A list has a pair for each item. Of other fields the last pair counts, so that a form can
        say "false" before a box that says "true". An empty value is as if it was not given.

        Raises:
            InputError: for a value that is not accepted.
        """
        values: dict[str, Any] = {}
        for name, value in pairs:
            if cls.is_list(name):
                items = values.setdefault(name, [])
                if value.strip():
                    items.append(value)
            elif value or cls._is_text(name):
                values[name] = value
        return cls.of(values)

    def query(self) -> list[tuple[str, str]]:
        """Return the pairs from which `of_query` makes these arguments, without defaults."""
        pairs: list[tuple[str, str]] = []
        for name, value in self.model_dump(mode="json", exclude_defaults=True).items():
            if isinstance(value, list):
                pairs += [(name, str(item)) for item in value]
            elif isinstance(value, bool):
                pairs.append((name, "true" if value else "false"))
            elif value is not None:
                pairs.append((name, str(value)))
        return pairs

    def address(self, path: str) -> str:
        """Return a path with these arguments as its query."""
        pairs = self.query()
        return f"{path}?{urlencode(pairs)}" if pairs else path

    @classmethod
    def is_list(cls, name: str) -> bool:
        """Whether a field is a list."""
        field = cls.model_fields.get(name)
        kinds = () if field is None else (field.annotation, *typing.get_args(field.annotation))
        return any(typing.get_origin(kind) in (list, tuple) for kind in kinds)

    @classmethod
    def _is_text(cls, name: str) -> bool:
        field = cls.model_fields.get(name)
        return field is not None and field.annotation is str and field.default == ""


def _check_texts(name: str, value: Any) -> None:
    """Raise InputError for a text that is not UTF-8. JSON can hold one."""
    check_text(name, "the name of an argument")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            check_text(item, name)


class Source(Arguments):
    """Arguments of a verb that reads a model with certain weights."""

    model: str = Field(
        default="",
        title="Model",
        description="The model to read. Empty: the workspace's.",
        json_schema_extra={"widget": "model", "advanced": True},
    )
    revision: str = Field(
        default="",
        title="Revision",
        description="The patches that the model carries: base for no patch, latest, or a "
        "revision's id. Empty: those that are checked out.",
        json_schema_extra={"widget": "revision", "advanced": True},
    )


def _fault(fault: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """Return one fault that pydantic found, in words for JSON and for forms."""
    name = ".".join(short(part).strip("'") for part in fault["loc"]) or "the arguments"
    if fault["type"] == "missing":
        return f"{name} is missing; it is needed"
    if fault["type"] == "extra_forbidden":
        return f"{name} is not an argument; accepted are {', '.join(fields) or 'none'}"
    expected = {"string_type": "a text", "tuple_type": "a list", "bool_parsing": "true or false"}
    words = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if fault["type"] == "value_error":  # a sentence of ours
        return f"{name}: {words}" if fault["loc"] else words
    if words.startswith(("greater", "less")):
        words = f"a number {words}"
    return f"{name} is {short(fault['input'])}; expected {expected.get(fault['type'], words)}"
