"""Prints what a study will cost before anything starts, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.files import free_bytes, gib
from pipeline.planning.checks import find_blockers
from pipeline.planning.table import big
from pipeline.study.progress import StudyProgress
from pipeline.study.trials import Trial


@dataclass(frozen=True)
class Cost:
    """The runs of one contender, as far as they can be foreseen.

    Attributes:
        tuning: runs by rung.
        final: runs by their number of steps.
        flops: of all of them; None if the model's config is not known.
        left: FLOPs of those that are not finished.
        disk: bytes that the artifacts of the contender take, and no other contender's.
    """

    contender: str
    tuning: tuple[int, ...]
    final: dict[int, int]
    flops: float | None
    left: float | None
    disk: int


def print_study_plan(progress: StudyProgress, console: Console) -> None:
    """Prints contenders by rates by seeds with FLOPs, hours and disk, and what would stop a run."""
    study = progress.study
    costs = list(_costs(progress))
    speed, source = _speed(progress)
    seeds = ", ".join(map(str, study.seeds))
    rungs = ", ".join(f"{rung:g}" for rung in study.tune.rungs)
    console.print(
        f"[bold]{escape(study.name)}[/]  {len(study.contenders)} contenders, {progress.trials.final_tokens}, "
        f"seeds {seeds}; rates are tuned on {rungs} times the tokens"
    )
    table = Table("contender", "tuning", "final runs", "FLOPs", "left", "hours left", "disk", box=None, pad_edge=False,
                  header_style="bold")  # fmt: skip
    for cost in costs:
        final = ", ".join(f"{count} of {steps} steps" for steps, count in cost.final.items())
        table.add_row(
            cost.contender, " + ".join(map(str, cost.tuning)), final, _flops(cost.flops), _flops(cost.left),
            _hours(cost.left, speed), gib(cost.disk),
        )  # fmt: skip
    known = [cost for cost in costs if cost.flops is not None and cost.left is not None]
    total, left = sum(cost.flops or 0 for cost in known), sum(cost.left or 0 for cost in known)
    runs = sum(sum(cost.tuning) + sum(cost.final.values()) for cost in costs)
    table.add_section()
    disk = sum(cost.disk for cost in costs)
    table.add_row("together", f"{runs} runs", "", _flops(total), _flops(left), _hours(left, speed), gib(disk))
    console.print(table)
    console.print(f"  hours of training {source}; rates beyond the grid's edges and equal seconds may add runs")
    free = free_bytes(progress.trials.directory.parent)
    if free < disk:
        console.print(f"  {gib(disk)} are needed and {gib(free)} are free", style="red")
    _print_blockers(progress, console)


def _costs(progress: StudyProgress) -> Iterator[Cost]:
    seen: set[str] = set()  # artifacts, which contenders share
    for name in progress.study.contenders:
        step = progress.planned_step_flops(name)
        tuning, final = _tuning_counts(progress, name), _final_counts(progress, name)
        steps = [rung[0].steps for rung in _rung_trials(progress, name)]
        planned = sum(count * each for count, each in zip(tuning, steps, strict=True))
        planned += sum(count * each for each, count in final.items())
        done = sum(trial.steps for trial in progress.known(name))
        disk = _own_disk(progress, progress.rung_trials(name, 0, progress.study.rates_of(name)[0])[0], seen)
        flops, left = (None, None) if step is None else (planned * step, max(0, planned - done) * step)
        yield Cost(name, tuning, final, flops, left, disk)


def _rung_trials(progress: StudyProgress, name: str) -> list[list[Trial]]:
    rate = progress.study.rates_of(name)[0]
    return [progress.rung_trials(name, rung, rate) for rung in range(len(progress.study.tune.rungs))]


def _tuning_counts(progress: StudyProgress, name: str) -> tuple[int, ...]:
    """Returns the runs of every rung: those made, and until the rate is chosen at least those to expect.

    Three rates at least reach each rung: the best one and its neighbors.
    """
    study, pending, counts = progress.study, progress.tuned(name).pending, [len(progress.study.rates_of(name))]
    for _ in study.tune.rungs[1:]:
        counts.append(max(min(3, counts[-1]), math.ceil(study.tune.keep * counts[-1])))
    expected = [count * len(study.tune.seeds) for count in counts]
    made = [len(runs) for runs in progress.runs_by_rung(name)]
    return tuple(map(max, expected, made)) if pending else tuple(made)


def _final_counts(progress: StudyProgress, name: str) -> dict[int, int]:
    study = progress.study
    steps = {progress.trials.token_steps[name], *([] if progress.tuned(name).pending else progress.final_steps(name))}
    reference, step = progress.planned_step_flops(study.reference), progress.planned_step_flops(name)
    if study.equal_flops and progress.steps_at(name, "flops") is None and reference is not None and step is not None:
        steps.add(progress.steps_for(reference, step))
    return {each: len(study.seeds) for each in sorted(steps)}


def _own_disk(progress: StudyProgress, trial: Trial, seen: set[str]) -> int:
    (prepared,) = progress.trials.prepare([trial])
    if prepared.sizes is None:
        return 0
    own = [name for name, node in prepared.missing.items() if node.artifact.key not in seen]
    seen |= {node.artifact.key for node in prepared.missing.values()}
    needed = prepared.disk_needed(own)
    models = len(progress.study.seeds) * prepared.sizes.grown.parameters * 4 if progress.study.save_models else 0
    return sum(needed.artifacts.values()) + models


def _speed(progress: StudyProgress) -> tuple[float | None, str]:
    """Returns FLOP/s and where they are from, in words."""
    study = progress.study
    if study.flops_per_second is not None:
        return study.flops_per_second, f"at study.flops_per_second = {study.flops_per_second:.3g}"
    measured = [progress.trials.measured(trial) for trial in progress.known()]
    speeds = sorted(each.flops / each.seconds for each in measured if each is not None and each.flops)
    if speeds:
        speed = speeds[len(speeds) // 2]
        return speed, f"at {speed:.3g} FLOP/s, the median of {len(speeds)} finished runs"
    plan = progress.trials.plan(progress.rung_trials(study.reference, 0, study.rates_of(study.reference)[0])[0])
    if plan is not None and plan.gpu is not None and plan.utilization:
        speed = plan.setup.ranks * plan.gpu.tflops(plan.setup.precision) * 1e12 * plan.utilization
        return speed, f"at {plan.utilization:.0%} of {plan.launch.device}"
    return None, "are known after the first run; or set study.flops_per_second"


def _flops(count: float | None) -> str:
    return "unknown" if count is None else big(round(count))


def _hours(flops: float | None, speed: float | None) -> str:
    return "unknown" if flops is None or speed is None else f"{flops / speed / 3600:.2f}"


def _print_blockers(progress: StudyProgress, console: Console) -> None:
    found: dict[str, list[str]] = {}  # the contenders by fault
    for name in progress.study.contenders:
        rate = progress.study.rates_of(name)[0]
        for prepared in progress.trials.prepare(progress.rung_trials(name, 0, rate)[:1]):
            for blocker in find_blockers(prepared):
                found.setdefault(str(blocker.fault), []).append(name)
    for fault, names in found.items():
        where = "every contender" if len(names) == len(progress.study.contenders) else ", ".join(names)
        console.print(f"  {where}: {fault}", style="red", markup=False)
    if not found:
        console.print("  no blockers found")


# ------------------------------------------------------------------------------------------- status


def print_study_status(progress: StudyProgress, console: Console) -> None:
    """Prints one line per contender: its rate so far, and how many final runs are finished."""
    study = progress.study
    console.print(
        f"[bold]{escape(study.name)}[/]  {len(progress.known())} runs finished, {len(progress.pending())} can run now"
    )
    table = Table("contender", "learning rate", "tuning", "final runs", "diverged", box=None, pad_edge=False,
                  header_style="bold")  # fmt: skip
    for name in study.contenders:
        tuned, known = progress.tuned(name), progress.known(name)
        final = [trial for trial in known if trial.final]
        diverged = [trial for trial in known if (found := progress.trials.measured(trial)) and found.diverged]
        state = f"{len(tuned.pending)} rates to train on rung {tuned.pending[0][0]}" if tuned.pending else "done"
        rate = "" if tuned.rate is None else f"{tuned.rate:g}"
        wanted = len(study.seeds) * len(progress.final_steps(name)) if not tuned.pending else "?"
        table.add_row(name, rate, state, f"{len(final)} of {wanted}", str(len(diverged)))
    console.print(table)
    place = progress.trials.directory / "report" / "report.md"
    if place.exists():
        console.print(f"report: {place}", markup=False)
