"""The plan of a run: its stages, the model before and after, what training needs, disk space, and all blockers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.config import Settings
from pipeline.config.data import PURPOSE_OF
from pipeline.estimates import Disk, Sizes, sizes_of, usable
from pipeline.planning.checks import Blocker, find_blockers
from pipeline.planning.prepared import PreparedRun
from pipeline.planning.training import TrainingPlan, plan_training


@dataclass(frozen=True)
class PlannedNode:
    """One line of the table of stages.

    Attributes:
        state: ``cached``, ``to do``, ``blocked``, or ``with NAME`` if an earlier job of the sweep builds it.
        blocked_by: numbers of blockers, counted from 1, or names of blocked nodes that it depends on.
    """

    name: str
    state: str
    blocked_by: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that ``action=plan`` prints about a run.

    Attributes:
        config_from: the origin of the model's config, in words.
        sizes: None, like ``disk``, if the base model is not known.
        expansion: memory in bytes that expanding takes on the GPU, and can take; None if that is not known.
        disk: of the nodes that no earlier job of the sweep builds.
        outer_parameters: the number of a multimodal model's parameters outside its language model; 0 for other models.
    """

    run: Settings
    config_from: str
    sizes: Sizes | None
    expansion: tuple[int, int] | None
    training: Sequence[TrainingPlan]
    disk: Disk | None
    blockers: Sequence[Blocker]
    nodes: Sequence[PlannedNode]
    outer_parameters: int = 0


def make_plans(jobs: Sequence[PreparedRun]) -> list[Plan]:
    """Plans the jobs of a command. An artifact that several jobs need is counted for the first of them.

    Raises:
        UserError: the settings of ``expand`` contradict the model, so that there is nothing to plan.
    """
    builder_of: dict[str, str] = {}  # artifact key -> the name of the first job that needs it
    plans = []
    for job in jobs:
        if job.shape is not None:
            sizes_of(job.expansion, job.shape)
        for node in job.selected.values():
            builder_of.setdefault(node.artifact.key, job.run.name)
        plans.append(_plan(job, builder_of))
    return plans


def _plan(job: PreparedRun, builder_of: dict[str, str]) -> Plan:
    blockers = list(_merged(find_blockers(job)))
    own = [name for name, node in job.missing.items() if builder_of[node.artifact.key] == job.run.name]
    training = [plan_training(job, section) for section in PURPOSE_OF if section in job.missing]
    return Plan(
        run=job.run,
        config_from=job.inputs.config_from,
        sizes=job.sizes,
        expansion=_expansion(job),
        training=[plan for plan in training if plan is not None],
        disk=None if job.sizes is None else job.disk_needed(own),
        blockers=blockers,
        nodes=_planned_nodes(job, blockers, builder_of),
        outer_parameters=job.outer_parameters,
    )


def _expansion(job: PreparedRun) -> tuple[int, int] | None:
    memory, gpu = job.expansion_memory, job.expansion_gpu
    return (memory, usable(gpu)) if memory is not None and gpu is not None and "expand" in job.missing else None


def _merged(blockers: Iterable[Blocker]) -> Iterable[Blocker]:
    """One blocker per fault, also if several checks found it."""
    merged: dict[str, Blocker] = {}
    for blocker in blockers:
        text = str(blocker.fault)
        earlier = merged[text].stops if text in merged else ()
        merged[text] = Blocker(blocker.fault, (*earlier, *blocker.stops))
    return merged.values()


def _planned_nodes(job: PreparedRun, blockers: Sequence[Blocker], builder_of: dict[str, str]) -> list[PlannedNode]:
    nodes: list[PlannedNode] = []
    blocked: set[str] = set()
    for name, node in job.selected.items():
        reasons: list[str] = []
        if name in job.missing:
            stopped_by = (number for number, each in enumerate(blockers, 1) if {name, node.stage} & {*each.stops})
            reasons = [f"{number}" for number in stopped_by]
            reasons = reasons or [parent.name for parent in node.parents.values() if parent.name in blocked]
        if reasons:
            blocked.add(name)
        builder = builder_of[node.artifact.key]
        if name not in job.missing:
            state = "cached"
        elif builder != job.run.name:
            state = f"with {builder}"
        else:
            state = "blocked" if reasons else "to do"
        nodes.append(PlannedNode(name, state, tuple(reasons)))
    return nodes
