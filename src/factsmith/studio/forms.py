"""The fields of a verb's arguments as fields of a form.

    fields = form_fields(verb.arguments, values, errors)     # for the macro `form` in ui.html

A field's kind follows from its type. `json_schema_extra` may say more:

    widget       "textarea", "select", "file", "hidden", "model", "revision", ...: another kind
    advanced     True: the field is in the folded part of the form
    options      [value, ...] or [[value, label], ...]: what a select offers
    placeholder  an example in grey
    suggestions  texts that the browser offers while one types
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_SEQUENCES = (list, tuple, set, frozenset, Sequence)

_WIDGETS = ("text", "textarea", "number", "checkbox", "list", "file", "hidden")
"""Kinds that a class may name. A select is one by its options."""


@dataclass(frozen=True, kw_only=True)
class FormField:
    """One field of a form.

    Attributes:
        name: The argument, and the name in the address.
        title: Its label.
        description: One line of help below it.
        kind: "text", "textarea", "number", "checkbox", "select", "list", "file" or "hidden".
        value: What it holds: a text, or texts for "list".
        options: (value, label) of a select.
        suggestions: Texts that the browser offers for a text.
        placeholder: An example in grey.
        error: What is wrong with the value. "": nothing.
        disabled: Why the field cannot be used now. "": it can.
        required: Whether it must be filled.
        advanced: Whether it is in the folded part.
        least: The smallest number, as text. "": no limit.
        most: The largest number, as text. "": no limit.
        step: "1" for whole numbers, "any" for others.
        is_number: Whether the value, or each item of a list, is a number.
    """

    name: str
    title: str
    description: str = ""
    kind: str = "text"
    value: str | tuple[str, ...] = ""
    options: tuple[tuple[str, str], ...] = ()
    suggestions: tuple[str, ...] = ()
    placeholder: str = ""
    error: str = ""
    disabled: str = ""
    required: bool = False
    advanced: bool = False
    least: str = ""
    most: str = ""
    step: str = "any"
    is_number: bool = False

    @property
    def is_checked(self) -> bool:
        """Whether a checkbox is ticked."""
        return self.value == "true"


def form_fields(
    arguments: type[BaseModel],
    values: Mapping[str, Any] | BaseModel | None = None,
    errors: Mapping[str, str] | None = None,
    *,
    options: Mapping[str, Sequence[Any]] | None = None,
    disabled: Mapping[str, str] | None = None,
) -> list[FormField]:
    """Return the fields of a form, in the order of the class; the folded ones last.

    Args:
        arguments: The class of the arguments.
        values: What is filled in: arguments, or {name: value}. Others show their defaults.
        errors: {name: what is wrong with it}.
        options: {name: what it offers}, where that depends on the workspace: a select for the name.
        disabled: {name: why it cannot be used now}.
    """
    if isinstance(values, BaseModel):
        values = values.model_dump()
    values, errors, options, disabled = values or {}, errors or {}, options or {}, disabled or {}
    fields = [
        _field(name, info, values.get(name), options.get(name))
        for name, info in arguments.model_fields.items()
    ]
    fields = [
        replace(each, error=errors.get(each.name, ""), disabled=disabled.get(each.name, ""))
        for each in fields
    ]
    return sorted(fields, key=lambda each: each.advanced)


# ── types ─────────────────────────────────────────────────────────────────────────────────────────


def _field(name: str, info: FieldInfo, value: Any, options: Sequence[Any] | None) -> FormField:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, Mapping) else {}
    kind_of_value = _plain(info.annotation)
    if value is None:
        default = info.get_default(call_default_factory=True, validated_data={})
        value = None if info.is_required() else default
    choices = _options(options if options is not None else extra.get("options"), kind_of_value)
    widget = extra.get("widget")
    kind = _kind(info, kind_of_value, bool(choices))
    if isinstance(widget, str) and widget in _WIDGETS:
        kind = widget
    least, most = _limits(info)
    return FormField(
        name=name,
        title=info.title or name.replace("_", " ").capitalize(),
        description=info.description or "",
        kind=kind,
        value=_text(value, kind),
        options=choices,
        suggestions=tuple(map(str, _listed(extra.get("suggestions"))))
        or tuple(value for value, _ in choices if kind == "list"),
        placeholder=str(extra.get("placeholder", "")),
        required=info.is_required(),
        advanced=bool(extra.get("advanced", False)),
        least=least,
        most=most,
        step="1" if int in (kind_of_value, _item(info)) else "any",
        is_number=_is_number(_item(info)) if _is_list(info) else _is_number(kind_of_value),
    )


def _kind(info: FieldInfo, kind: Any, has_choices: bool) -> str:
    if _is_list(info):
        return "list"
    if has_choices:
        return "select"
    if kind is bool:
        return "checkbox"
    return "number" if _is_number(kind) else "text"


def _text(value: Any, kind: str) -> str | tuple[str, ...]:
    """Return a value as the text of a field."""
    if isinstance(value, (list, tuple, set, frozenset)):
        items = tuple(_one(item) for item in value)
        return items if kind == "list" else ", ".join(items)
    text = _one(value)
    return ((text,) if text else ()) if kind == "list" else text


def _one(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value.value if isinstance(value, Enum) else value)


def _options(given: Any, kind: Any) -> tuple[tuple[str, str], ...]:
    """Return (value, label) of what was given, or of a type with few values."""
    if given is None:
        if get_origin(kind) is Literal:
            given = get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, Enum):
            given = [member.value for member in kind]
    pairs = []
    for each in _listed(given):
        value, label = each if isinstance(each, (list, tuple)) else (each, each)
        pairs.append((_one(value), str(label)))
    return tuple(pairs)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _plain(annotation: Any) -> Any:
    """Return a type without what annotates it, and without None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [_plain(part) for part in get_args(annotation) if part is not type(None)]
        lists = [part for part in parts if get_origin(part) in _SEQUENCES]
        return (lists or parts)[0]
    return annotation


def _is_list(info: FieldInfo) -> bool:
    kind = _plain(info.annotation)
    return kind in _SEQUENCES or _sequence_of(kind)


def _sequence_of(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Sequence | set | frozenset)


def _item(info: FieldInfo) -> Any:
    items = get_args(_plain(info.annotation))
    return _plain(items[0]) if items else str


def _is_number(kind: Any) -> bool:
    return kind is int or kind is float


def _limits(info: FieldInfo) -> tuple[str, str]:
    least = most = ""
    for limit in info.metadata:
        match limit:
            case Ge(ge=number) | Gt(gt=number):
                least = str(number)
            case Le(le=number) | Lt(lt=number):
                most = str(number)
    return least, most
