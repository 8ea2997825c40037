"""The HTML page: the Markdown report as one file."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from pipeline.report.markup import Table, escape, render, table

PNG = b"\x89PNG\r\n\x1a\n not really"


def test_images_are_embedded(tmp_path: Path) -> None:
    (tmp_path / "plot.png").write_bytes(PNG)
    page = render("# Title\n\n![a *plot*](plot.png)", "Title", tmp_path)
    (source,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(source) == PNG
    assert 'alt="a *plot*"' in page


def test_outside_text_is_escaped(tmp_path: Path) -> None:
    name = "<script>alert(1)</script> | `x` *y* [z](http://example.org)"
    page = render(table(Table(["task"], [[escape(name)]])), "<t>", tmp_path)
    assert "<script>" not in page and "href" not in page and "<em>" not in page
    assert "<title>&lt;t&gt;</title>" in page
    assert page.count("<td") == 1


def test_number_columns_are_aligned_to_the_right(tmp_path: Path) -> None:
    page = render(table(Table(["task", "value"], [["a", "1"]])), "t", tmp_path)
    assert '<th style="text-align:right">value</th>' in page
    assert "<th>task</th>" in page
