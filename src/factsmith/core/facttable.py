"""Facts in a table (CSV): one fact a row, the fields as columns.

    subject,prompt,target,target_true,paraphrases
    Bulgaria,The currency of {} is the,euro,lev,People in {} pay with the|{}'s money is the

A column that holds several texts separates them by `|` or by line breaks, or holds a JSON list.
Such a column may also be given several times: `paraphrases`, or `paraphrase_1` and `paraphrase_2`.
An empty cell leaves its field out. In the column `forget`, `true` means that the model should
forget the fact.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from .errors import FactError
from .explain import NAMED, short
from .fact import FactFields
from .filetext import Line, table

_LISTS = {"paraphrase": "paraphrases", "neighbour": "neighbours", "neighbor": "neighbours"}
"""Columns that hold several texts, without a plural and a number."""

_COLUMNS = (*(field.name for field in dataclasses.fields(FactFields)), "forget")

_YES, _NO = ("true", "yes", "1", "x"), ("", "false", "no", "0")


def facts_of_table(text: str) -> list[Line]:
    """Return the fields of each fact of a table, or the error of its row.

    Raises:
        FactError: when the columns are not those of facts.
        ValueError: when the text is no table.
    """
    header, rows = table(text)
    fields = [_field_of(name) for name in header]
    unknown = [name for name, field in zip(header, fields, strict=True) if field not in _COLUMNS]
    missing = [name for name in ("subject", "prompt") if name not in fields]
    if not {"target", "forget"} & set(fields):
        missing.append("target")
    single = [field for field in fields if field not in _LISTS.values()]
    twice = [field for field in dict.fromkeys(single) if single.count(field) > 1]
    if unknown or missing or twice:
        problems = [f"unknown column {short(name)}" for name in unknown[:NAMED]]
        problems += [f"no column {name}" for name in missing]
        problems += [f"the column {short(name)} is there twice" for name in twice[:NAMED]]
        raise FactError(
            f"line 1: {', '.join(problems)}; expected the columns subject, prompt and target, and "
            f"some of {', '.join(_COLUMNS[3:])}"
        )
    return [Line(row.number, _fact(fields, row.value)) for row in rows]


def _field_of(column: str) -> str:
    """The field that a column holds."""
    name = re.sub(r"[\s-]+", "_", column.strip().lower())
    stem = re.sub(r"(_?\d+|_)$", "", name)
    return _LISTS.get(stem.removesuffix("s"), name)


def _fact(fields: list[str], cells: list[str]) -> dict[str, Any] | Exception:
    """The fields of one row, or why it cannot be read."""
    if any(cell.strip() for cell in cells[len(fields) :]):
        return FactError(
            f"it has {len(cells)} cells and {len(fields)} columns; put a text with a delimiter in "
            "quotes"
        )
    fact: dict[str, Any] = {}
    for field, cell in zip(fields, cells, strict=False):
        if not cell.strip() and field != "target":
            continue
        if field == "forget":
            if cell.strip().lower() not in (*_YES, *_NO):
                return FactError(f"forget is {short(cell)}; expected true, or an empty cell")
            fact["forget"] = cell.strip().lower() in _YES
        elif field in _LISTS.values():
            try:
                fact.setdefault(field, []).extend(_texts(cell))
            except ValueError as error:
                return FactError(f"{field} is no JSON list: {error}")
        else:
            fact[field] = cell
    if fact.get("forget") and not fact.get("target", "").strip():
        fact.pop("target", None)
    return fact


def _texts(cell: str) -> list[Any]:
    """The texts of a cell."""
    if cell.lstrip().startswith("["):
        texts = json.loads(cell)
        if isinstance(texts, list):
            return texts
    return [text.strip() for text in re.split(r"[|\r\n]+", cell) if text.strip()]
