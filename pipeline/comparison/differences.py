"""When a difference between two scores counts.

It counts when it is larger than two of its standard errors. Two models are scored on the same documents, so the error
is taken over the documents' differences (``pairs``; Miller 2024, Adding Error Bars to Evals, section 4.2), and at least
six documents must have changed. Where there are no pairs the scores are taken for independent: sqrt(se1² + se2²).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pipeline.comparison.measures import direction
from pipeline.comparison.rows import Row

ROUNDING = 1e-6  # relative; a sum in another order is no difference, however surely it is one
FEWEST_CHANGED = 6  # documents: six that all changed for the better are the fewest with 2 · 0.5ⁿ < 0.05 (sign test)


class Verdict(StrEnum):
    """What may be said of a difference."""

    BETTER = "better"
    WORSE = "worse"
    CHANGED = "changed"  # by more than two standard errors, of a metric whose better side is not known
    NOISE = "within noise"
    SAME = "the same"  # to rounding
    UNKNOWN = "no standard error"


MARKS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.NOISE: "≈", Verdict.SAME: "="}


@dataclass(frozen=True)
class Difference:
    """``after`` minus ``before`` of one task and metric, in the metric's unit.

    Attributes:
        paired_stderr: one standard error of the difference over pairs of documents; None where there is none.
        changed: the documents on which the two models' numbers are not the same, where that is known.
    """

    before: Row
    after: Row
    paired_stderr: float | None = None
    changed: int | None = None

    @property
    def value(self) -> float:
        """After minus before."""
        return self.after["value"] - self.before["value"]

    @property
    def stderr(self) -> float | None:
        """One standard error of the value: over pairs, else sqrt(se1² + se2²), or None where either is unknown."""
        if self.paired_stderr is not None:
            return self.paired_stderr
        before, after = self.before["stderr"], self.after["stderr"]
        return None if before is None or after is None else math.hypot(before, after)

    @property
    def verdict(self) -> Verdict:
        """What may be said of the value; see above."""
        if math.isclose(self.before["value"], self.after["value"], rel_tol=ROUNDING):
            return Verdict.SAME
        if self.stderr is None:
            return Verdict.UNKNOWN
        too_few = self.changed is not None and self.changed < FEWEST_CHANGED
        if too_few or not abs(self.value) > 2 * self.stderr:
            return Verdict.NOISE
        side = self.value * direction(self.after["metric"])
        return Verdict.CHANGED if side == 0 else Verdict.BETTER if side > 0 else Verdict.WORSE

    @property
    def mark(self) -> str:
        """▲ better, ▼ worse, ≈ within noise, = the same number; nothing where nothing can be said."""
        return MARKS.get(self.verdict, "")


def leader(rows: Sequence[Row | None]) -> Row | None:
    """The row with the best value, by however little; None where the better side is not known or nobody is beaten."""
    present = [row for row in rows if row is not None]
    side = direction(present[0]["metric"]) if present else 0
    return max(present, key=lambda row: side * row["value"]) if side and len(present) > 1 else None
