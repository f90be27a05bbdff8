"""Results that show themselves: as text where they are printed, as HTML in a notebook.

    class Census(Shown):
        def tables(self):
            return [Table("parameters by part", {"part": "<", "n": ">"}, [("memory", "3,153,408")])]

    census                      # in a terminal: the tables as text; in a notebook: as HTML

`Table` is the one table of the project: the command line, notebooks, pages and Markdown print the
same rows.
"""

from __future__ import annotations

import html
import io
import re
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.text import Text

from .grid import NUMBER, Grid

_ROWS = 20
"""Rows that a long table shows; the result itself has all of them."""

_UNLIMITED = 100_000
"""Columns of a text that no terminal shows."""

_LEAST_WIDTH, _MOST_WIDTH = 40, 140
"""Columns of a terminal between which the text of a result is as wide as the terminal."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a line of text.

    Attributes:
        title: What the table shows: a sentence without its full stop. "": no title.
        columns: {name: kind}. The kind "<" is text, ">" is a number, and "ok" is a verdict: green
            where it is "ok" or "passed", red where it is "no" or "failed". A name of spaces is not
            printed. {}: a title alone.
        rows: One cell for each column.
        note: A line below. "": none.
        bold: Indices of the rows to emphasise.
    """

    title: str
    columns: Mapping[str, str]
    rows: Sequence[tuple[str, ...]] = ()
    note: str = ""
    bold: Collection[int] = ()

    def as_rich(self, n: int | None = None) -> RenderableType:
        """Return the table for a rich console, with at most n rows.

        It fits itself to the console: aligned columns where they fit, and otherwise one block for
        each row. Nothing is cut.
        """
        parts: list[RenderableType] = (
            [Text(visible(self.title), style="bold")] if self.title else []
        )
        if self.columns:
            columns = {visible(name): kind for name, kind in self.columns.items()}
            rows = [tuple(map(in_one_line, row)) for row in self.rows[:n]]
            parts.append(Grid(columns, rows, self.bold))
        parts += [
            Text(line, style="dim") for line in (_rest(self.rows, n), visible(self.note)) if line
        ]
        return Group(*parts)

    def as_html(self, n: int | None = None) -> str:
        """Return the table for a page, with at most n rows and every text escaped."""
        if not self.columns:
            note = f"<p>{_escaped(self.note)}</p>" if self.note else ""
            return f"<p><b>{_escaped(self.title)}</b></p>{note}"
        sides = ["right" if kind == NUMBER else "left" for kind in self.columns.values()]
        head = "".join(
            f'<th scope="col" style="text-align:{side}">{_escaped(name)}</th>'
            for name, side in zip(self.columns, sides, strict=True)
        )
        names = f"<thead><tr>{head}</tr></thead>" if self._has_names else ""
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align:{side}">{_escaped(in_one_line(cell))}</td>'
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
        """Return lines of Markdown with the title as a heading; no cell is read as Markdown."""
        lines = [f"{'#' * level} {as_text(self.title)}", ""] if self.title else []
        if self.columns:
            sides = ("---:" if kind == NUMBER else "---" for kind in self.columns.values())
            head, *body = [
                "| " + " | ".join(map(as_text, row)) + " |"
                for row in (tuple(self.columns), *(map(in_one_line, row) for row in self.rows))
            ]
            lines += [head, "|" + "|".join(sides) + "|", *body, ""]
        return [*lines, *([as_text(self.note), ""] if self.note else [])]

    @property
    def _has_names(self) -> bool:
        return any(name.strip() for name in self.columns)


class Shown(ABC):
    """A result that shows itself as tables."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """Return the tables, the most important first."""

    def __repr__(self) -> str:
        """Return the tables as text.

        On a terminal they are as wide as the terminal. In a pipe, a log or a test no line wraps, so
        that the text is the same everywhere.
        """
        width = _UNLIMITED
        if sys.stdout is not None and sys.stdout.isatty():
            terminal = shutil.get_terminal_size((120, 24)).columns
            width = max(_LEAST_WIDTH, min(_MOST_WIDTH, terminal))
        written = io.StringIO()
        # In a notebook rich would print by itself.
        console = Console(
            file=written, width=width, color_system=None, highlight=False, force_jupyter=False
        )
        console.print(Group(*(table.as_rich(_ROWS) for table in self.tables())))
        return "\n".join(line.rstrip() for line in written.getvalue().splitlines())

    def to_markdown(self) -> str:
        """Return the tables as Markdown, with every row."""
        return "\n".join(line for table in self.tables() for line in table.as_markdown()) + "\n"

    def _repr_html_(self) -> str:
        return "".join(table.as_html(_ROWS) for table in self.tables())


def as_text(text: str) -> str:
    """Escape a text so that nothing in it is read as Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&!])", r"\\\1", visible(text))


def visible(text: str) -> str:
    """Replace every character that would steer the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def in_one_line(text: str) -> str:
    """Return a text of several lines in one, with a mark for each line break."""
    return visible(" ↵ ".join(line.strip() for line in text.split("\n")))


def counted(n: int, noun: str, plural: str = "s") -> str:
    """Return a count with its noun: "1 fact", "2 facts"."""
    return f"{n:,} {noun}{'' if n == 1 else plural}"


def quoted(tokens: Sequence[str]) -> str:
    """Return tokens in a row, each in quotes."""
    return " ".join(repr(visible(token)) for token in tokens)


def ending(text: str, width: int = 60) -> str:
    """Return the last `width` characters of a text, in whole words."""
    text = visible(text)
    return text if len(text) <= width else "… " + text[-width:].partition(" ")[2]


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _rest(rows: Sequence[object], n: int | None) -> str:
    return f"… and {len(rows) - n:,} more" if n is not None and len(rows) > n else ""
