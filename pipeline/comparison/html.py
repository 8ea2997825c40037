"""``report.html``: the Markdown report as one file that needs nothing else, its images and its style inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

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
    return PAGE.format(title=escape(title), style=STYLE.read_text(), body=body)


def _parser(directory: Path) -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(_: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        png = (directory / str(tokens[index].attrs["src"])).read_bytes()
        data = base64.b64encode(png).decode()
        return f'<img alt="{escape(tokens[index].content)}" src="data:image/png;base64,{data}">'

    def table_open(_: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        return '<div class="wide"><table>\n'

    def table_close(_: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        return "</table></div>\n"

    for name, rule in (("image", image), ("table_open", table_open), ("table_close", table_close)):
        parser.add_render_rule(name, rule)
    return parser
