"""Results that show themselves: as aligned text where they are printed, as HTML in a notebook.

class Census(Shown):
    def tables(self):
        return [Table("parameters by part", {"part": "<", "n": ">"}, [("memory", "3,153,408"), ...])]

census                      # in a terminal: the tables as text; in a notebook: as HTML
"""

from __future__ import annotations

import html
import io
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import table as rich_table
from rich.console import Console, Group, RenderableType
from rich.text import Text

_ROWS = 20
"""Shown of a long table; a result holds the rest."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a line of text.

    title    what it shows, as a sentence without its stop
    columns  {name: "<" or ">"}, how the column is aligned; {} for a title alone
    rows     as many cells each as there are columns
    note     a line below, if any
    """

    title: str
    columns: Mapping[str, str]
    rows: Sequence[tuple[str, ...]] = ()
    note: str = ""

    def as_rich(self, n: int | None = None) -> RenderableType:
        """For a rich console, at most n rows."""
        parts: list[RenderableType] = (
            [Text(visible(self.title), style="bold")] if self.title else []
        )
        if self.columns:
            found = rich_table.Table(
                box=None, pad_edge=False, header_style="bold", show_header=self._has_names
            )
            for name, side in self.columns.items():
                found.add_column(
                    Text(name), justify="right" if side == ">" else "left", no_wrap=side == ">"
                )
            for row in self.rows[:n]:
                found.add_row(*(Text(visible(cell)) for cell in row))
            parts.append(found)
        parts += [
            Text(line, style="dim") for line in (_rest(self.rows, n), visible(self.note)) if line
        ]
        return Group(*parts)

    def as_html(self, n: int | None = None) -> str:
        """A table for a page, at most n rows, whatever is in them escaped."""
        if not self.columns:
            return f"<p><b>{_escaped(self.title)}</b></p>"
        sides = ["right" if side == ">" else "left" for side in self.columns.values()]
        head = "".join(
            f'<th scope="col" style="text-align:{side}">{_escaped(name)}</th>'
            for name, side in zip(self.columns, sides, strict=True)
        )
        names = f"<thead><tr>{head}</tr></thead>" if self._has_names else ""
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align:{side}">{_escaped(cell)}</td>'
                for cell, side in zip(row, sides, strict=True)
            )
            + "</tr>"
            for row in self.rows[:n]
        )
        below = "".join(
            f"<p>{_escaped(line)}</p>" for line in (_rest(self.rows, n), self.note) if line
        )
        caption = (
            f'<caption style="text-align:left"><b>{_escaped(self.title)}</b></caption>'
            if self.title
            else ""
        )
        return f"<table>{caption}{names}<tbody>{body}</tbody></table>{below}"

    def as_markdown(self, level: int = 2) -> list[str]:
        """Lines of Markdown, the title as a heading; nothing of what is in the cells is read as Markdown."""
        lines = [f"{'#' * level} {as_text(self.title)}", ""] if self.title else []
        if self.columns:
            sides = ("---:" if side == ">" else "---" for side in self.columns.values())
            head, *body = [
                "| " + " | ".join(map(as_text, row)) + " |"
                for row in (tuple(self.columns), *self.rows)
            ]
            lines += [head, "|" + "|".join(sides) + "|", *body, ""]
        return [*lines, *([as_text(self.note), ""] if self.note else [])]

    @property
    def _has_names(self) -> bool:
        return any(name.strip() for name in self.columns)


class Shown(ABC):
    """A result that says what it holds as tables."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """What there is to see, most important first."""

    def __repr__(self) -> str:
        # As wide as the terminal, but wide enough for a table where there is none; in a notebook rich would print by itself.
        width = max(80, min(140, shutil.get_terminal_size((120, 24)).columns))
        written = io.StringIO()
        console = Console(
            file=written, width=width, color_system=None, highlight=False, force_jupyter=False
        )
        console.print(Group(*(table.as_rich(_ROWS) for table in self.tables())))
        return "\n".join(line.rstrip() for line in written.getvalue().splitlines())

    def to_markdown(self) -> str:
        """The tables as Markdown, every row of them."""
        return "\n".join(line for table in self.tables() for line in table.as_markdown()) + "\n"

    def _repr_html_(self) -> str:
        return "".join(table.as_html(_ROWS) for table in self.tables())


def as_text(text: str) -> str:
    """Text in which nothing is Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&!])", r"\\\1", visible(text))


def visible(text: str) -> str:
    """Text from models and files without what would steer the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def counted(n: int, noun: str, plural: str = "s") -> str:
    """So many of something: "1 fact", "2 facts"."""
    return f"{n:,} {noun}{'' if n == 1 else plural}"


def quoted(tokens: Sequence[str]) -> str:
    """Tokens side by side, each in quotes."""
    return " ".join(repr(visible(token)) for token in tokens)


def ending(text: str, width: int = 60) -> str:
    """The last so many characters of a text, whole words."""
    text = visible(text)
    return text if len(text) <= width else "… " + text[-width:].partition(" ")[2]


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _rest(rows: Sequence[object], n: int | None) -> str:
    return f"… and {len(rows) - n:,} more" if n is not None and len(rows) > n else ""
