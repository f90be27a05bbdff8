"""Arguments as fields of a form."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from factsmith.studio.arguments import Arguments, Source
from factsmith.studio.forms import form_fields


class Every(Source):
    prompt: str = Field(
        title="Prompt", description="What to ask.", json_schema_extra={"widget": "textarea"}
    )
    kind: Literal["state", "mlp"] = Field("state", title="Restore")
    window: int = Field(10, ge=1, le=99, title="Window", json_schema_extra={"advanced": True})
    noise: float | None = Field(None, gt=0, title="Noise")
    fast: bool = Field(False, title="Fast")
    words: list[str] = Field([], title="Words", json_schema_extra={"placeholder": "lev"})
    layers: tuple[int, ...] | None = Field(None, title="Layers")
    sheet: str = Field("", json_schema_extra={"widget": "file"})


def test_the_kind_of_a_field_follows_from_its_type() -> None:
    kinds = {field.name: field.kind for field in form_fields(Every)}
    assert kinds == {
        "prompt": "textarea",
        "kind": "select",
        "noise": "number",
        "fast": "checkbox",
        "words": "list",
        "layers": "list",
        "sheet": "file",
        "model": "text",
        "revision": "text",
        "window": "number",
    }


def test_values_errors_and_limits_reach_their_fields() -> None:
    values = {"prompt": "a", "fast": True, "words": ["x", "y"], "layers": [1, 2], "window": "200"}
    fields = {
        field.name: field
        for field in form_fields(Every, values, {"window": "too many"}, disabled={"noise": "no"})
    }
    assert fields["prompt"].value == "a" and fields["prompt"].required
    assert fields["fast"].is_checked
    assert fields["words"].value == ("x", "y") and not fields["words"].is_number
    assert fields["layers"].value == ("1", "2") and fields["layers"].is_number
    assert (fields["window"].error, fields["window"].value) == ("too many", "200")
    assert (fields["window"].least, fields["window"].most, fields["window"].step) == (
        "1",
        "99",
        "1",
    )
    assert (fields["noise"].disabled, fields["noise"].step) == ("no", "any")
    assert fields["kind"].options == (("state", "state"), ("mlp", "mlp"))
    assert fields["sheet"].title == "Sheet" and not fields["sheet"].required


def test_options_of_the_workspace_make_a_select_and_folded_fields_come_last() -> None:
    fields = form_fields(Every, options={"revision": [["", "checked out"], "base"]})
    revision = next(field for field in fields if field.name == "revision")
    assert revision.kind == "select"
    assert revision.options == (("", "checked out"), ("base", "base"))
    assert [field.name for field in fields if field.advanced] == ["model", "revision", "window"]
    assert fields[-1].advanced and not fields[0].advanced


def test_arguments_fill_their_form_and_come_back() -> None:
    class Few(Arguments):
        n: int = 3
        names: list[str] = Field(default_factory=lambda: ["a", "b"])

    fields = form_fields(Few, Few(n=5, names=["c"]))
    pairs = [
        (field.name, item)
        for field in fields
        for item in ([field.value] if isinstance(field.value, str) else field.value)
    ]
    assert Few.of_query(pairs) == Few(n=5, names=["c"])
    assert [field.value for field in form_fields(Few)] == ["3", ("a", "b")]
