"""``action=plan``: what a run would do and cost, and what would stop it. Reads no weights and changes no file."""

from pipeline.planning.plan import Plan, Planner
from pipeline.planning.table import print_plan

__all__ = ["Plan", "Planner", "print_plan"]
