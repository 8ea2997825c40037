"""``action=plan``, and the checks that it shares with ``run`` and ``submit``. No weights are read."""

from pipeline.planning.checks import INPUT_CHECKS, refuse_blocked
from pipeline.planning.plan import Plan, make_plans
from pipeline.planning.prepared import FoundInputs, PreparedRun, prepare, with_inputs, without_force
from pipeline.planning.table import print_plan

__all__ = [
    "INPUT_CHECKS", "FoundInputs", "Plan", "PreparedRun", "make_plans", "prepare", "print_plan", "refuse_blocked",
    "with_inputs", "without_force",
]  # fmt: skip
