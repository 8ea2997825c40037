"""LLaMA Pro's block expansion (arXiv 2401.02415, section 3): copies whose blocks add zero.

A new layer is a copy of its lower neighbor with o_proj and down_proj (weights and biases) set to zero, so the model
computes exactly what the base does. Zeroing the scale of a pre-norm instead would do that too, but would block every
gradient. ``output_scale`` keeps a part of these projections instead, from 0 (as published) to 1 (exact copies).
"""

from __future__ import annotations

from typing import Annotated

from pipeline.config.section import Fraction, NotInKeyIf
from pipeline.expansion.method import CopyingMethod, InsertionMethod


class LlamaPro(InsertionMethod, CopyingMethod):
    """Every new layer is a copy of its lower base neighbor with zeroed outputs."""

    title = "LLaMA Pro"
    source = "LLaMA Pro: Progressive LLaMA with Block Expansion, arXiv 2401.02415"
    color = "#d55e00"

    output_scale: Annotated[Fraction, NotInKeyIf(0.0)]
