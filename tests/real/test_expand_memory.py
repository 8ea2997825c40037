"""Expansion holds a few tensors, never a model: two layers of the width of Llama-3.2-1B stand in for all 16.

``scripts/benchmarks/expand_memory.py`` measures complete models, up to Llama-3-8B.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.artifacts.task import task_to_json
from pipeline.files import read_json, write_json
from scripts.benchmarks.expand_memory import write_random_checkpoint
from scripts.benchmarks.processes import run_module
from scripts.benchmarks.tasks import expand_settings, expand_task

GIGABYTE = 1e9
LLAMA_3_8B_INTERMEDIATE = 14336  # rows of gate and up, the largest matrices that LESA decomposes


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bfloat16 checkpoint of 0.8 GB, written one tensor at a time."""
    directory: Path = tmp_path_factory.mktemp("full_width") / "base"
    write_random_checkpoint("llama-3.2-1b", directory, layers=2)
    return directory


@pytest.mark.parametrize(("method", "gigabytes"), [("llama_pro", 0.7), ("solar", 0.7), ("opt_deus", 1.7)])
def test_peak_memory_of_a_method(two_layers: Path, tmp_path: Path, method: str, gigabytes: float) -> None:
    """Anonymous and shared pages, measured from outside, including the layer-by-layer self-check."""
    out, task, outcome = tmp_path / "out", tmp_path / "task.json", tmp_path / "outcome.json"
    out.mkdir()
    settings = expand_settings(method, new_layers=1, position="top")
    write_json(task, task_to_json(expand_task(settings, two_layers, out)))
    peak = run_module("pipeline.stages", str(task), str(outcome), log=tmp_path / "log")
    check = read_json(outcome)["metrics"]["check"]
    assert check["logits_of"].startswith("layer by layer")
    assert check["logit_difference"] == (None if method == "solar" else 0.0)
    assert 0.2 * GIGABYTE < peak.host < gigabytes * GIGABYTE


def test_peak_memory_of_the_decomposition_for_lesa(tmp_path: Path) -> None:
    """At most four float64 matrices ``[d_out, d_out]`` whatever the depth: less than 8 GB for all of Llama-3-8B.

    LESA needs three layers and takes an hour at full width and depth. Here one square matrix of the hidden size stands
    in for gate and up, whose Gram matrices are twelve times as large. V, which is on disk, would be another four.
    """
    width, layers, matrices = 4096, 8, 4.5
    peak = run_module("tests.real.decompose_alone", str(width), str(layers), str(tmp_path), log=tmp_path / "log")
    before = int((tmp_path / "before").read_text())
    assert 3 < (peak.host - before) / (8 * width**2) < matrices
    assert before < 0.5 * GIGABYTE
    assert 0.5 * GIGABYTE + matrices * 8 * LLAMA_3_8B_INTERMEDIATE**2 < 8 * GIGABYTE
