"""The Markdown elements of a report, and the conversion of the complete text to one self-contained HTML page."""

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

STYLE_FILE, SCRIPT_FILE = (Path(__file__).with_name(name) for name in ("style.css", "sort.js"))
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
<script>
{script}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Table:
    """A table whose cells are Markdown.

    Attributes:
        text_columns: the number of leading columns with text, aligned to the left. The others are numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


def escape(text: object) -> str:
    """Escapes external text, such as the names of runs, tasks and metrics, so that it is not parsed as Markdown.

    The result is one line. Underscores inside words, which have no meaning, stay readable.
    """
    line = " ".join(str(text).splitlines())
    return re.sub(r"[\\`*|<>\[\]&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", line)


def bold(text: str) -> str:
    """Formats strong emphasis."""
    return f"**{text}**"


def emphasis(text: str) -> str:
    """Formats emphasis, which the HTML page shows in gray inside tables."""
    return f"*{text}*"


def bullets(items: Iterable[str]) -> str:
    """Formats a bulleted list."""
    return "\n".join(f"- {item}" for item in items)


def code(text: str, language: str = "") -> str:
    """Formats a fenced code block."""
    return f"```{language}\n{text}\n```"


def code_span(text: object) -> str:
    """Formats an identifier from outside, such as a key or a commit. Backslashes escape nothing in a code span."""
    return f"`{text}`" if re.fullmatch(r"[\w.-]+", str(text)) else escape(text)


def image(file: str, caption: str) -> str:
    """Formats an image file beside the report, given by its name, with its caption below."""
    return f"![{caption}]({file})\n\n{emphasis(caption)}"


def table(content: Table) -> str:
    """Formats a pipe table, padded so that the Markdown source is readable as well."""
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


# --------------------------------------------------------------------------------------------- HTML


def render(markdown: str, title: str, directory: Path) -> str:
    """Returns the report as one HTML page that contains its images and its style sheet.

    Args:
        markdown: the report's text. Raw HTML in it is shown as text.
        title: the title of the browser window.
        directory: the directory of the images.
    """
    body = _keep_together(_parser(directory).render(markdown))
    style, script = STYLE_FILE.read_text(), SCRIPT_FILE.read_text()
    return PAGE.format(title=escape_html(title), style=style, body=body, script=script)


def _keep_together(body: str) -> str:
    """Replaces spaces inside numbers by ones at which no line breaks, such as those around ±."""
    spaced = re.sub(r" (?=[±%▲▼≈→])|(?<=[±→]) ", "\N{NO-BREAK SPACE}", body)
    return re.sub(r"(?<=\d) (?=(?:s|min|h|GiB|points)\b)", "\N{NO-BREAK SPACE}", spaced)


def _parser(directory: Path) -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def embedded_image(_: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        file, alt = directory / str(tokens[index].attrs["src"]), escape_html(tokens[index].content)
        if file.name != tokens[index].attrs["src"] or file.is_symlink() or not file.is_file():
            return alt  # only what is beside the report belongs to it
        data = base64.b64encode(file.read_bytes()).decode()
        return f'<span class="wide" style="display:block"><img alt="{alt}" src="data:image/png;base64,{data}"></span>'

    # Wide tables and images scroll inside a container instead of stretching the page.
    def table_open(_: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        return '<div class="wide"><table>\n'

    def table_close(_: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        return "</table></div>\n"

    for name, rule in (("image", embedded_image), ("table_open", table_open), ("table_close", table_close)):
        parser.add_render_rule(name, rule)
    return parser
