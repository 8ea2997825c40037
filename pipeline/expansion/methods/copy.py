"""Copies of the lower neighbor, with nothing zeroed: a control that shows what zeroing and mixing contribute.

``output_scale`` multiplies what the copies add to the residual stream: 1 copies bit for bit, and 0 gives the layers of
block expansion, which add nothing until they are trained.
"""

from __future__ import annotations

from typing import Annotated

from pipeline.config.section import Fraction, NotInKeyIf
from pipeline.expansion.method import CopyingMethod, InsertionMethod


class Copy(InsertionMethod, CopyingMethod):
    """Every new layer is a copy of its lower base neighbor."""

    title = "copying"
    source = "control: the lower neighbor once more"
    color = "#56b4e9"

    output_scale: Annotated[Fraction, NotInKeyIf(1.0)]
