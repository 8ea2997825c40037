"""The real small model, created once per session by the load stage from the installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.benchmarks.tasks import load_smollm2


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as the quickstart's load artifact: float32 safetensors with tokenizer and template."""
    return load_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session", autouse=True)
def warm_processes() -> None:
    """These tests start new interpreters, as users do."""
