"""Fixtures of the report's tests."""

from __future__ import annotations

import pytest

from pipeline.report import plot_style


@pytest.fixture(autouse=True)
def coarse_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots have few pixels, because drawing them takes most of a report's time."""
    monkeypatch.setattr(plot_style, "DPI", 20)
