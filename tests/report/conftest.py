"""Fixtures of the report's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tiny_inputs import coarse_plots


@pytest.fixture(autouse=True)
def _coarse_plots() -> Iterator[None]:
    with coarse_plots():
        yield
