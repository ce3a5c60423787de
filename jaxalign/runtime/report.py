"""One self-contained page of text, tables and figures, and the same tables on a terminal."""

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ESTIMATE = re.compile(r"\S+ \[[^\]]*\]")  # what `estimate` writes: a page keeps it on one line
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fdfdfc; --quiet: #5c6470;
  --line: #d9dce1; --zebra: #f3f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --quiet: #9aa3af; --line: #343a43; --zebra: #1e2126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.5rem; letter-spacing: -0.015em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 0.5rem; }
p, ul { margin: 0 0 1rem; max-width: 42rem; }
code { font: 0.9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--zebra);
  padding: 0.1em 0.3em; border-radius: 3px; }
figure { margin: 2rem 0; overflow-x: auto; }
figcaption { color: var(--quiet); font-size: 0.9rem; max-width: 42rem; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.94rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
th, td { padding: 0.4rem 1.1rem 0.4rem 0.5rem; vertical-align: top; }
tbody tr:nth-child(even) { background: var(--zebra); }
.number { text-align: right; white-space: nowrap; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
@media print { body { padding: 0; max-width: none; } figure { break-inside: avoid; } }
"""


def estimate(value: Any, low: Any = None, high: Any = None, *, digits: int = 3, unit: str = "") -> str:
    """A number with its interval as text: "0.731 [0.702, 0.758] nats".

    The three share as many decimals as give the wider of `low` and `high` (or `value`) `digits` significant figures.
    None or NaN is "not measured". Raises ValueError if only one end is given, or low > high.
    """
    if (low is None) != (high is None):
        raise ValueError("estimate: give both low and high, or neither")
    numbers = [None if x is None else float(x) for x in (value, low, high)]
    if numbers[1] is not None and numbers[2] is not None and numbers[1] > numbers[2]:
        raise ValueError(f"estimate: low {numbers[1]} is above high {numbers[2]}")
    if numbers[0] is None or np.isnan(numbers[0]):
        return "not measured"
    largest = max((abs(x) for x in numbers if x is not None and np.isfinite(x)), default=0.0)
    decimals = digits - 1 - int(np.floor(np.log10(largest))) if largest else digits - 1

    def text(x: float) -> str:
        if not np.isfinite(x):
            return str(x)
        return f"{x:.{digits - 1}e}" if decimals > digits + 3 or largest >= 1e9 else f"{x:,.{max(0, decimals)}f}"

    ends = [text(x) for x in numbers[1:] if x is not None]
    interval = f" [{', '.join(ends)}]" if ends else ""
    return text(numbers[0]) + interval + (f" {unit}" if unit else "")


class _Text(NamedTuple):
    text: str


class _Table(NamedTuple):
    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    caption: str


class _Figure(NamedTuple):
    png: bytes
    caption: str


class Report:
    """A page built from top to bottom; every method but the last two returns the report itself.

    `Report("Sweep").text("Three seeds.").table(("beta", "win rate"), rows, "At step 500").write("sweep.html")`
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[_Text | _Table | _Figure] = []

    def text(self, text: str) -> Self:
        """Paragraphs parted by blank lines; "# " or "## " begins a heading, "- " a list item; `code`, **bold**."""
        self._parts.append(_Text(text))
        return self

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> Self:
        """A table; floats are shown with four significant figures, None and NaN as "not measured".

        Raises ValueError naming the row whose length is not that of `columns`.
        """
        rows = [list(row) for row in rows]
        for i, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(f"Report.table: row {i} has {len(row)} cells for {len(columns)} columns")
        numeric = [bool(rows) and all(_is_number(row[j]) for row in rows) for j in range(len(columns))]
        cells = [[_cell(value) for value in row] for row in rows]
        self._parts.append(_Table([str(c) for c in columns], cells, numeric, caption))
        return self

    def figure(self, figure: "Figure | bytes", caption: str = "") -> Self:
        """A Matplotlib Figure, or the bytes of a PNG file; the caption is also the text for those who cannot see it."""
        if isinstance(figure, bytes):
            png = figure
        else:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", facecolor="white")
            png = buffer.getvalue()
        if not png.startswith(PNG_SIGNATURE):
            raise ValueError("Report.figure: the bytes are not a PNG file")
        self._parts.append(_Figure(png, caption))
        return self

    def html(self) -> str:
        """The whole page; it refers to nothing outside itself."""
        body = "\n".join(_to_html(part) for part in self._parts)
        title = html.escape(self.title)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to `path`, making its directory, and return the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def print(self, console: Console | None = None) -> None:
        """Show the text and tables on a terminal; of a figure its caption."""
        console = console or Console()
        console.rule(escape_markup(self.title))
        for part in self._parts:
            match part:
                case _Text(text):
                    console.print(text, markup=False, highlight=False)
                case _Figure(_, caption):
                    console.print(f"(figure: {caption or 'untitled'})", markup=False, highlight=False)
                case _Table(columns, rows, numeric, caption):
                    table = Table(caption=escape_markup(caption) or None, caption_justify="left")
                    for column, right in zip(columns, numeric, strict=True):
                        table.add_column(escape_markup(column), justify="right" if right else "left")
                    for row in rows:
                        table.add_row(*(escape_markup(cell) for cell in row))
                    console.print(table)


def _is_number(value: Any) -> bool:
    if value is None:
        return True
    return np.ndim(value) == 0 and not isinstance(value, str | bytes | bool) and hasattr(value, "__float__")


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if not _is_number(value) or isinstance(value, int | np.integer):
        return str(value)
    number = float(value)
    return "not measured" if np.isnan(number) else f"{number:.4g}"


def _to_html(part: _Text | _Table | _Figure) -> str:
    if isinstance(part, _Text):
        return "\n".join(_block(block) for block in re.split(r"\n\s*\n", part.text.strip()) if block.strip())
    caption = f"<figcaption>{_inline(part.caption)}</figcaption>" if part.caption else ""
    if isinstance(part, _Figure):
        data = base64.b64encode(part.png).decode("ascii")
        return f'<figure><img alt="{html.escape(part.caption)}" src="data:image/png;base64,{data}">{caption}</figure>'
    classes = [' class="number"' if right else "" for right in part.numeric]

    def row(tag: str, cells: Sequence[str]) -> str:
        texts = (html.escape(cell).replace(" ", "&nbsp;" if ESTIMATE.match(cell) else " ") for cell in cells)
        return "<tr>" + "".join(f"<{tag}{c}>{t}</{tag}>" for c, t in zip(classes, texts, strict=True)) + "</tr>"

    body = "\n".join(row("td", cells) for cells in part.rows)
    head = row("th", part.columns)
    return f"<figure><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>{caption}</figure>"


def _block(block: str) -> str:
    lines = [line.strip() for line in block.strip().splitlines()]
    if heading := re.fullmatch(r"(#{1,2}) (.*)", lines[0]):
        level = len(heading[1]) + 1
        rest = _block("\n".join(lines[1:])) if lines[1:] else ""
        return f"<h{level}>{_inline(heading[2])}</h{level}>\n{rest}"
    if all(line.startswith("- ") for line in lines):
        return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
