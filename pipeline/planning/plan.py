"""One run's plan: the stages, the model before and after, training's needs, disk, and everything that would stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import STAGE_NAMES, Settings
from pipeline.data import sources
from pipeline.driver.graph import Node, build_graph, select
from pipeline.driver.run import missing
from pipeline.errors import UserError
from pipeline.estimates import Disk, Sizes, ranks, setup_of, sizes_of
from pipeline.launch.machine import Machine, detect_machine, place
from pipeline.models.families import shape_of
from pipeline.planning.checks import check_writable, checks, disk_needed
from pipeline.planning.inputs import Outside, look_up
from pipeline.planning.training import TrainingPlan, amount_of, expected_tokens, plan_training
from pipeline.training.validate import faults as training_faults

TRAINING: dict[str, sources.Purpose] = {"pretrain": "corpus", "sft": "instructions"}  # section -> what it learns from
STOPS = {  # what a fault of an input or check stops; a stage stands for all its nodes
    "model": ("load",), "expand": ("expand",), "experts": ("pretrain", "sft"), "corpus": ("tokenize/corpus",),
    "instructions": ("tokenize/instructions",), "chat_template": ("tokenize/instructions",),
    "corpus_length": ("tokenize/corpus",), "instructions_length": ("tokenize/instructions",),
    "pretrain": ("pretrain",), "sft": ("sft",), "evaluate": ("evaluate",), "snapshots": ("evaluate",),
    "devices": ("pretrain", "sft"), "output": STAGE_NAMES, "disk": STAGE_NAMES, "login": STAGE_NAMES,
}  # fmt: skip
BY_SIZE = ("model", "expand", "experts", "disk")  # checks that need the model's config


Fault = tuple[str, UserError]  # what it is about, a key of STOPS


@dataclass(frozen=True)
class Blocker:
    """Something that would stop the run, and where."""

    fault: UserError
    stops: tuple[str, ...]  # nodes, or stages for all their nodes


@dataclass(frozen=True)
class Line:
    """One stage in the table."""

    name: str
    state: str  # "cached" | "to do" | "blocked" | "with NAME", where an earlier job of the sweep makes it
    blocked_by: tuple[str, ...]  # numbers of blockers, from 1; or names of blocked stages that it hangs on


@dataclass(frozen=True)
class Plan:
    """All of it; sizes and what follows from them are None where no config is to be had."""

    run: Settings
    config_from: str
    sizes: Sizes | None
    training: Sequence[TrainingPlan]
    disk: Disk | None
    blockers: Sequence[Blocker]
    lines: Sequence[Line]


class Planner:
    """Makes the plans of a command's jobs; what jobs of a sweep have in common is looked up and marked once."""

    def __init__(self) -> None:
        self._outside: dict[str, Outside] = {}
        self._planned: dict[str, str] = {}  # artifact key -> the job that has it first

    def plan(self, run: Settings) -> Plan:
        """One job's plan.

        Raises:
            UserError: the settings contradict the model, so that there is nothing to plan.
        """
        outside = self._look_up(run)
        run = run.model_copy(update={"model": outside.model, "data": outside.data})
        nodes = build_graph(run, outside.inputs)
        todo, machine = missing(run, nodes), detect_machine()
        faults = list(_outside_faults(outside, todo))
        sizes = None if outside.config is None else _sizes(run, outside.config, faults)
        training = [] if sizes is None else list(_training(run, nodes, todo, sizes, outside, machine))
        config = {} if sizes is None or outside.config is None else outside.config
        blockers = list(_merged([*faults, *_faults(run, outside, config, todo, training, machine)]))
        own = {name: node for name, node in todo.items() if self._planned.get(node.artifact.key) is None}
        disk = disk_needed(run, config, own) if config else None
        return Plan(run, outside.config_from, sizes, training, disk, blockers, self._lines(run, nodes, blockers))

    def _look_up(self, run: Settings) -> Outside:
        same = "".join(part.model_dump_json() for part in (run.model, run.data, run.evaluate)) + run.output_dir
        if same not in self._outside:
            self._outside[same] = look_up(run)
        return self._outside[same]

    def _lines(self, run: Settings, nodes: Mapping[str, Node], blockers: Sequence[Blocker]) -> list[Line]:
        todo, blocked, lines = missing(run, nodes), set[str](), []
        for name, node in select(nodes, run.stages).items():
            own = [f"{i}" for i, each in enumerate(blockers, 1) if name in todo and {name, node.stage} & {*each.stops}]
            above = [parent.name for parent in node.parents.values() if parent.name in blocked and name in todo]
            if own or above:
                blocked.add(name)
            lines.append(Line(name, self._state(run, node, name in todo, bool(own or above)), tuple(own or above)))
        return lines

    def _state(self, run: Settings, node: Node, todo: bool, blocked: bool) -> str:
        first = self._planned.setdefault(node.artifact.key, run.name)
        if not todo:
            return "cached"
        if first != run.name:
            return f"with {first}"
        return "blocked" if blocked else "to do"


def _sizes(run: Settings, config: Mapping[str, Any], faults: list[Fault]) -> Sizes | None:
    """The model before and after; None, and one more fault, where its family's sizes are not known."""
    try:
        base = shape_of(config)
    except UserError as fault:
        faults.append(("model", fault))
        return None
    return sizes_of(run.expand, base)


def _training(
    run: Settings, nodes: Mapping[str, Node], todo: Mapping[str, Node], sizes: Sizes, outside: Outside, machine: Machine
) -> Iterator[TrainingPlan]:
    for section, purpose in TRAINING.items():
        if section in todo:
            train = getattr(run, section)
            trained = sizes.trained(section, train)
            expected = None if purpose in outside.faults else expected_tokens(run.data, purpose)
            amount = amount_of(train, nodes[f"tokenize/{purpose}"], expected)
            setup = setup_of(train, run.launch, machine)
            yield plan_training(section, trained, setup, run.launch, amount)


# ------------------------------------------------------------------------------------ what would stop it


def _outside_faults(outside: Outside, todo: Mapping[str, Node]) -> Iterator[Fault]:
    """Those of what the missing stages read."""
    stages = {node.stage for node in todo.values()}
    needed = {"model", *stages, *(name.removeprefix("tokenize/") for name in todo)}
    for name, fault in outside.faults.items():
        if name in needed:
            yield name, fault


def _faults(
    run: Settings, outside: Outside, config: Mapping[str, Any], todo: Mapping[str, Node],
    training: Sequence[TrainingPlan], machine: Machine,
) -> Iterator[Fault]:  # fmt: skip
    """Everything else; what was looked up before is not asked again, and what needs a config not without one."""
    yield from _of("output", lambda: check_writable(run))
    if {"pretrain", "sft"} & set(todo):
        yield from _of("devices", lambda: place(run.launch, machine))
    for each in training:
        context = config.get("max_position_embeddings")
        found = training_faults(each.section, each.setup.train, ranks(run.launch, machine), context)
        yield from ((each.section, fault) for fault in found)
        if (fault := each.fault()) is not None:
            yield each.section, fault
    asked = {"pretrain", "sft", "evaluate", *outside.faults}
    done = asked - {"model"} if config else asked | {*BY_SIZE}
    for name, check in checks(run, config, todo).items() if todo else ():
        if name not in done:
            yield from _of(name, check)


def _of(name: str, check: Callable[[], object]) -> Iterator[Fault]:
    try:
        check()
    except UserError as fault:
        yield name, fault


def _merged(faults: Sequence[Fault] | Iterator[Fault]) -> Iterator[Blocker]:
    """One blocker a fault, also where two checks came upon it."""
    found: dict[str, Blocker] = {}
    for name, fault in faults:
        before = found[str(fault)].stops if str(fault) in found else ()
        found[str(fault)] = Blocker(fault, (*before, *STOPS[name]))
    return iter(found.values())
