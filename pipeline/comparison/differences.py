"""When a difference between two scores counts.

The standard error of a difference of two scores is taken as sqrt(se1² + se2²), and a difference counts when it is
larger than two of them. Both scores come from the same documents, so a paired error (from the samples in ``tasks/``)
would usually be smaller; this one errs on the side of "within noise".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pipeline.comparison.measures import direction
from pipeline.comparison.rows import Row


class Verdict(StrEnum):
    """What may be said of a difference."""

    BETTER = "better"
    WORSE = "worse"
    CHANGED = "changed"  # by more than two standard errors, of a metric whose better side is not known
    NOISE = "within noise"
    SAME = "the same"
    UNKNOWN = "no standard error"


@dataclass(frozen=True)
class Difference:
    """``after`` minus ``before`` of one task and metric, in the metric's unit."""

    before: Row
    after: Row

    @property
    def value(self) -> float:
        """After minus before."""
        return self.after["value"] - self.before["value"]

    @property
    def stderr(self) -> float | None:
        """sqrt(se1² + se2²), or None where either is unknown."""
        before, after = self.before["stderr"], self.after["stderr"]
        return None if before is None or after is None else math.hypot(before, after)

    @property
    def verdict(self) -> Verdict:
        """What two standard errors allow to be said."""
        if self.value == 0:
            return Verdict.SAME
        if self.stderr is None:
            return Verdict.UNKNOWN
        if not abs(self.value) > 2 * self.stderr:
            return Verdict.NOISE
        side = self.value * direction(self.after["metric"])
        return Verdict.CHANGED if side == 0 else Verdict.BETTER if side > 0 else Verdict.WORSE


MARKS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.NOISE: "≈", Verdict.SAME: "="}


def mark(base: Row | None, row: Row) -> str:
    """▲ better than the base, ▼ worse, ≈ within noise, = the same number; nothing where nothing can be said."""
    if base is None or base is row:
        return ""
    return MARKS.get(Difference(base, row).verdict, "")


def best(rows: Sequence[Row | None]) -> Row | None:
    """The row that is better than every other by more than two standard errors, if there is one."""
    present = [row for row in rows if row is not None]
    for row in present:
        others = [other for other in present if other is not row]
        if others and all(Difference(other, row).verdict is Verdict.BETTER for other in others):
            return row
    return None


def leader(rows: Sequence[Row | None]) -> Row | None:
    """The row with the best value, by however little; None where the better side is not known or nobody is beaten."""
    present = [row for row in rows if row is not None]
    side = direction(present[0]["metric"]) if present else 0
    return max(present, key=lambda row: side * row["value"]) if side and len(present) > 1 else None
