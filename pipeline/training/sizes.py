"""Sizes of the engine's that memory and disk follow from. No torch."""

from __future__ import annotations

from typing import Literal

Precision = Literal["bfloat16", "float32"]

BYTES: dict[Precision, int] = {"bfloat16": 2, "float32": 4}
CHUNK_LOGITS = 2**24  # elements of logits alive at once: 64 MiB in float32
CHECKPOINT_BYTES = 12  # a trained parameter: float32 master weight and two moments
