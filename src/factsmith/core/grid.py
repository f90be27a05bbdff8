"""The layout of a table in a terminal of any width.

    console.print(Grid({"prompt": "<", "p": ">", "": "ok"}, [("Paris is in", "0.913", "ok")]))

Where all columns fit, the rows are printed in aligned columns. Cells of text may wrap between
words; numbers and verdicts never wrap. Where the columns do not fit, each row becomes a block: its
text first, then its verdict, then its other cells by name.

    Paris is in
      held: ok  p: 0.913

No column and no character is left out at any width. Widths are counted in terminal cells, of which
a CJK character takes two.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

TEXT, NUMBER, VERDICT = "<", ">", "ok"
"""Kinds of columns: text on the left, numbers on the right, verdicts ("ok", "no") in colour."""

_STYLES = {"ok": "green", "passed": "green", "no": "bold red", "failed": "bold red"}
"""Styles of the verdicts; any other verdict is printed plainly."""

_GAP = 2
"""Spaces between columns, between named cells, and before the later lines of a block."""

_NARROWEST, _WIDEST_WORD = 12, 20
"""A column of text may shrink to its longest word, counted as at least 12 and at most 20 wide."""

_UNIT = re.compile(r"""(?<!\S)(?:'[^']{0,30}'|"[^"]{0,30}")(?!\S)|\S+""")
"""A word, or a token in quotes with the spaces inside the quotes."""


@dataclass(frozen=True)
class Grid:
    """Rows of cells, for a rich console.

    Attributes:
        columns: {name: kind of column}. A name of spaces is not printed.
        rows: One cell for each column, without control characters.
        bold: Indices of the rows to emphasise.
    """

    columns: Mapping[str, str]
    rows: Sequence[tuple[str, ...]]
    bold: Collection[int] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one rich table, or the lines of the blocks."""
        widths = self._fitting(options.max_width)
        if widths is not None:
            yield self._aligned(widths)
            return
        for index, row in enumerate(self.rows):
            for line in self._block(row, console, options.max_width):
                line.style = self._style(index)
                yield line

    def _fitting(self, width: int) -> list[int] | None:
        """Return the widths of the columns, or None where they do not fit the terminal."""
        widths, least = [], []
        for at, (name, kind) in enumerate(self.columns.items()):
            texts = [name.strip(), *(row[at] for row in self.rows)]
            natural = max(1, *map(cell_len, texts))
            widths.append(min(natural, max(width, 1)) if kind == TEXT else natural)
            longest_word = max(
                (cell_len(word) for text in texts for word in text.split()), default=1
            )
            narrowest = max(_NARROWEST, min(longest_word, _WIDEST_WORD))
            least.append(min(widths[-1], narrowest) if kind == TEXT else widths[-1])
        room = width - _GAP * (len(widths) - 1)
        if sum(least) > room:
            return None
        while sum(widths) > room:
            shrinkable = [at for at, low in enumerate(least) if widths[at] > low]
            widths[max(shrinkable, key=widths.__getitem__)] -= 1
        return widths

    def _aligned(self, widths: Sequence[int]) -> Table:
        """Return the rows in aligned columns."""
        named = any(name.strip() for name in self.columns)
        table = Table(box=None, pad_edge=False, header_style="bold", show_header=named)
        for (name, kind), width in zip(self.columns.items(), widths, strict=True):
            table.add_column(
                Text(name.strip()),
                justify="right" if kind == NUMBER else "left",
                no_wrap=kind != TEXT,
                overflow="fold",
                width=width,
            )
        for index, row in enumerate(self.rows):
            cells = (
                Text(cell, _STYLES.get(cell, ""))
                if kind == VERDICT
                else _whole_quotes(Text(cell), width)
                if kind == TEXT
                else Text(cell)
                for cell, kind, width in zip(row, self.columns.values(), widths, strict=True)
            )
            table.add_row(*cells, style=self._style(index))
        return table

    def _block(self, row: tuple[str, ...], console: Console, width: int) -> Iterator[Text]:
        """Yield the lines of one row: the cells that head it, then the others by name.

        Verdicts come first.
        """
        heading = self._heading()
        head = [self._cell(row, at, named=not self._is_text(at)) for at in heading if row[at]]
        yield from _hanging(Text(" " * _GAP).join(head), console, width, indent=0)
        line = Text()
        kinds = list(self.columns.values())
        rest = [at for at in range(len(row)) if at not in heading and row[at]]
        for at in sorted(rest, key=lambda at: kinds[at] != VERDICT):
            cell = self._cell(row, at, named=True)
            if line and _GAP + line.cell_len + _GAP + cell.cell_len > width:
                yield from _hanging(line, console, width, indent=_GAP)
                line = Text()
            line = Text(" " * _GAP).join([line, cell]) if line else cell
        yield from _hanging(line, console, width, indent=_GAP)

    def _heading(self) -> list[int]:
        """Return the columns that head a block: the first text, and the next if it has no name."""
        names = list(self.columns)
        first = next((at for at in range(len(names)) if self._is_text(at)), 0)
        follows = not names[first].strip() and first + 1 < len(names) and self._is_text(first + 1)
        return [first, first + 1] if follows else [first]

    def _is_text(self, at: int) -> bool:
        return list(self.columns.values())[at] == TEXT

    def _cell(self, row: tuple[str, ...], at: int, *, named: bool) -> Text:
        """Return a cell, after its name where it has one and is to be named."""
        name, kind = list(self.columns.items())[at]
        cell = Text(row[at], _STYLES.get(row[at], "") if kind == VERDICT else "")
        return Text.assemble((f"{name.strip()}: ", "dim"), cell) if named and name.strip() else cell

    def _style(self, index: int) -> str:
        return "bold" if index in self.bold else ""


def _whole_quotes(text: Text, width: int) -> Text:
    """Return a text with line breaks so that no line breaks within a quoted token that fits."""
    plain = text.plain
    if not any(" " in unit for unit in _UNIT.findall(plain)):
        return text
    characters, start = list(plain), 0
    for unit in _UNIT.finditer(plain):
        if unit.start() > start and cell_len(plain[start : unit.end()]) > width:
            start = unit.start()
            characters[start - 1] = "\n"
    broken = text.copy()
    broken.plain = "".join(characters)  # as long, so styles stay
    return broken


def _hanging(text: Text, console: Console, width: int, *, indent: int) -> Iterator[Text]:
    """Yield a text in lines no wider than a width, the later ones indented further."""
    if text:
        room = max(1, width - indent - _GAP)
        fits = text.cell_len <= width - indent
        lines = [text] if fits else _whole_quotes(text, room).wrap(console, room, overflow="fold")
        for index, line in enumerate(lines):
            line.rstrip()
            yield Text(" " * (indent + _GAP * bool(index))) + line
