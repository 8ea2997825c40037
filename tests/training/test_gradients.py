"""Gradient norms are exact however large a tensor is."""

from __future__ import annotations

import pytest
import torch

from pipeline.training.gradients import SUMMED, _sum_of_squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (SUMMED * 8 + 1,), (5, SUMMED)])
def test_sums_of_squares_are_those_of_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = gradient.double().square().sum()
    torch.testing.assert_close(_sum_of_squares(gradient), expected, rtol=2e-5, atol=0.0)
