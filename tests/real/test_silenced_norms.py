"""Families whose blocks end in a norm learn from silence about as fast as a Llama of equal size."""

from __future__ import annotations

from pathlib import Path

from scripts.benchmarks.output_norms import FAMILIES, measure

BASE_STEPS = 600  # less trained bases gain less


def test_silenced_norms_learn_as_fast_as_silenced_projections(tmp_path: Path) -> None:
    """Small models are trained from scratch and expanded, and their new layers are trained for 50 steps."""
    llama, *others = measure(tmp_path, FAMILIES, BASE_STEPS)
    assert llama.fell > 0.1 and {result.family for result in others} == set(FAMILIES)
    for result in others:
        assert result.fell >= 0.8 * llama.fell, result
        assert result.highest <= 0.0, result
