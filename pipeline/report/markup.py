"""The few Markdown forms a report is made of. ``html.py`` renders the same text."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token


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


# --------------------------------------------------------------------------------------------------
# ``report.html``: the Markdown report as one file that needs nothing else, its images and its style inside.

STYLE = Path(__file__).with_name("style.css")
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def render(markdown: str, title: str, directory: Path) -> str:
    """The whole page.

    Args:
        markdown: the report's text; raw HTML in it is shown, not obeyed.
        title: of the browser's window.
        directory: where the images that the text names lie.
    """
    body = _parser(directory).render(markdown)
    return PAGE.format(title=escape_html(title), style=STYLE.read_text(), body=body)


def _parser(directory: Path) -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(_: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        png = (directory / str(tokens[index].attrs["src"])).read_bytes()
        data = base64.b64encode(png).decode()
        return f'<img alt="{escape_html(tokens[index].content)}" src="data:image/png;base64,{data}">'

    def table_open(_: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        return '<div class="wide"><table>\n'

    def table_close(_: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        return "</table></div>\n"

    for name, rule in (("image", image), ("table_open", table_open), ("table_close", table_close)):
        parser.add_render_rule(name, rule)
    return parser
