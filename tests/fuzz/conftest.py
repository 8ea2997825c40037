"""Keeps the files of hypothesis out of the repository."""

from __future__ import annotations

import pytest
from hypothesis.configuration import set_hypothesis_home_dir


def pytest_configure(config: pytest.Config) -> None:
    """Puts the tables of Unicode that hypothesis computes into pytest's cache."""
    if (cache := getattr(config, "cache", None)) is not None:  # unless pytest runs without it
        set_hypothesis_home_dir(cache.mkdir("hypothesis"))
