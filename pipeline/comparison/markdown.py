"""The few Markdown forms a report is made of. ``html.py`` renders the same text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A head and rows of cells that are Markdown already; the first column is text, the others are numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1  # how many leading columns are left-aligned


def escape(text: object) -> str:
    """Text from outside (names of runs, tasks, metrics) that must not act as Markdown."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", str(text))


def bold(text: str) -> str:
    """Strong emphasis."""
    return f"**{text}**"


def quiet(text: str) -> str:
    """Emphasis; the HTML shows it in grey inside tables."""
    return f"*{text}*"


def bullets(items: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {item}" for item in items)


def code(text: str, language: str = "") -> str:
    """A fenced block."""
    return f"```{language}\n{text}\n```"


def figure(file: str, caption: str) -> str:
    """An image that lies beside the report, its caption below."""
    return f"![{caption}]({file})\n\n{quiet(caption)}"


def table(content: Table) -> str:
    """A pipe table, padded so that the source is readable too."""
    lines = [content.columns, *content.rows]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(content.columns))]
    rule = [
        "-" * width if column < content.text_columns else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]  # fmt: skip
    return "\n".join(_line(cells, widths, content.text_columns) for cells in (content.columns, rule, *content.rows))


def _line(cells: Sequence[str], widths: Sequence[int], text_columns: int) -> str:
    padded = [
        cell.ljust(width) if column < text_columns else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]  # fmt: skip
    return f"| {' | '.join(padded)} |"
