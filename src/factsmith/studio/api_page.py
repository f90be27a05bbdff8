"""The page of the HTTP API: every verb with its arguments, and how to call it.

GET /api

The usual pages for OpenAPI load scripts from elsewhere, which the content security policy forbids.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .api import PREFIX
from .verb import Verb
from .views import Views

ADDRESS = "/api"


@dataclass(frozen=True)
class Call:
    """One verb, as a program calls it.

    Attributes:
        verb: The verb.
        methods: How it may be called.
        path: Its address.
        curl: A command that calls it.
        parameters: Its arguments, each with a name, a type, a default and a description.
    """

    verb: Verb[Any]
    methods: str
    path: str
    curl: str
    parameters: tuple[tuple[str, str, str, str], ...]


def routes(pages: Views) -> APIRouter:
    """Return the route of the page. It comes before the routes of the rooms."""
    router = APIRouter()

    async def show(request: Request) -> Response:
        base = str(request.base_url).rstrip("/")
        rooms = [(room.title, [call_of(verb, base) for verb in room.verbs]) for room in pages.rooms]
        return await pages.page(request, "api.html", rooms_of_calls=rooms, base=base, prefix=PREFIX)

    router.add_api_route(ADDRESS, show, methods=["GET"])
    return router


def call_of(verb: Verb[Any], base: str) -> Call:
    """Return how a verb is called at a studio's address."""
    schema = verb.arguments.model_json_schema()
    fields: Mapping[str, Any] = schema.get("properties", {})
    needed = schema.get("required", ())
    sent = json.dumps({name: _example(fields[name]) for name in needed}, ensure_ascii=False)
    curl = (
        f'curl -H "Authorization: Bearer $TOKEN" --json {shlex.quote(sent)} '
        f"{shlex.quote(f'{base}{PREFIX}/{verb.name}')}"
    )
    parameters = tuple(
        (
            name,
            _type(field),
            "must be given" if name in needed else json.dumps(field.get("default")),
            str(field.get("description", "")),
        )
        for name, field in fields.items()
    )
    methods = "POST" if verb.kind == "write" else "POST or GET"
    return Call(verb, methods, f"{PREFIX}/{verb.name}", curl, parameters)


def _type(field: Mapping[str, Any]) -> str:
    """Return the type of a field in JSON's words."""
    if "enum" in field:
        return " or ".join(map(json.dumps, field["enum"]))
    if "const" in field:
        return json.dumps(field["const"])
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "value"))


def _example(field: Mapping[str, Any]) -> Any:
    """Return a value of a field's type, for a command that the reader completes."""
    examples = field.get("examples")
    if examples:
        return examples[0]
    kinds = {"integer": 1, "number": 1.0, "boolean": True, "array": []}
    return kinds.get(str(field.get("type")), "...")
