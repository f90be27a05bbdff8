"""The templates: what every one of them may call, and how texts become HTML.

    environment().get_template("room.html").render(room=room, ...)

Every text is escaped. Charts and tables are data; the macros in `ui.html` show them.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..core.tables import in_one_line
from ..show.pages.page import printable, script_json
from .forms import form_fields
from .glossary import explain
from .uploads import MOST_UPLOADED

STATIC = Path(__file__).parent / "static"
"""The folder of the files that the studio serves."""


@functools.cache
def static(name: str) -> str:
    """Return the address of a served file; it changes with the content, so browsers may keep it."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()
    return f"/static/{name}?v={digest[:12]}"


def chart_data(chart: Any) -> Markup:
    """Return a chart's specification and rows as JSON without any markup."""
    return script_json(
        {"name": chart.name, "spec": chart.spec, "rows": [_plain(row) for row in chart.rows]}
    )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row that JSON can hold: numbers that are not finite become null."""
    return {
        name: None if isinstance(value, float) and value - value != 0 else value
        for name, value in row.items()
    }


def shown(value: Any) -> str:
    """Return a value of a chart's row as text: numbers with four digits."""
    if value is None or (isinstance(value, float) and value != value):
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    return printable(str(value))


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names in a chart's rows, without the address."""
    return list(dict.fromkeys(name for row in rows for name in row if name != "href"))


def room_keys(rooms: Iterable[Any]) -> list[str]:
    """Return a letter for each room: the first of its name that no room before it has."""
    keys: list[str] = []
    for room in rooms:
        free = [letter for letter in room.name if letter not in (*keys, "q")]
        keys.append(free[0] if free else "")
    return keys


_COUNTS = threading.local()


def counter(step: int = 1) -> int:
    """Return the next number of this thread, for ids in a page. step=0: the same number again."""
    _COUNTS.number = getattr(_COUNTS, "number", 0) + step
    return int(_COUNTS.number)


@functools.cache
def environment() -> Environment:
    """Return the templates' environment: autoescape on, undefined names are errors."""
    made = Environment(
        loader=PackageLoader("factsmith", "studio/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(printable=printable, one_line=in_one_line, shown=shown)
    made.globals.update(
        static=static,
        form_fields=form_fields,
        explain=explain,
        chart_data=chart_data,
        columns_of=columns_of,
        counter=counter,
        room_keys=room_keys,
        most_uploaded=MOST_UPLOADED,
    )
    return made
