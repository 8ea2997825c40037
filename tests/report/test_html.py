"""The HTML page: the Markdown report as one file."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from pipeline.report.markup import Table, code_span, escape, render, table

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
    assert page.count("<script") == 1 and "<script>" not in page.partition("</main>")[0]
    assert "href" not in page and "<em>" not in page
    assert "<title>&lt;t&gt;</title>" in page
    assert page.count("<td") == 1


@pytest.mark.parametrize(
    "path", ["../secret.png", "sub/plot.png", "/etc/hostname", "file:plot.png", "link.png", "gone.png"]
)
def test_only_images_beside_the_report_are_embedded(path: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    for file in (tmp_path / "secret.png", out / "sub" / "plot.png", out / "plot.png"):
        file.write_bytes(PNG)
    (out / "link.png").symlink_to(tmp_path / "secret.png")
    page = render(f'![a "plot"]({path})', "Title", out)
    assert "base64" not in page and "plot" in page and "<img" not in page


def test_identifiers_of_manifests_are_code_or_escaped(tmp_path: Path) -> None:
    assert code_span("0123abc") == "`0123abc`"
    page = render(code_span("a` <b> *c* _d_ &lt; e_f\n\n# g"), "t", tmp_path)
    assert "<p>a` &lt;b&gt; *c* _d_ &amp;lt; e_f  # g</p>" in page


def test_number_columns_are_aligned_to_the_right(tmp_path: Path) -> None:
    page = render(table(Table(["task", "value"], [["a", "1"]])), "t", tmp_path)
    assert '<th style="text-align:right">value</th>' in page
    assert "<th>task</th>" in page
