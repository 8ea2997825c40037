"""Prints a plan on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.errors import first_few
from pipeline.estimates import Memory, Sizes, usable
from pipeline.files import gib
from pipeline.models.families import Shape
from pipeline.planning.plan import Plan
from pipeline.planning.training import TrainingPlan

UNITS = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
NOT_YET = "known once tokenized"
MOST_NAMES = 4
COMPONENTS = {
    "weights": "weights", "gradients": "gradients, float32", "optimizer": "optimizer state, float32",
    "activations": "activations", "logits": "logits and loss", "buckets": "reduction buckets",
    "staging": "copy for checkpoints",
}  # fmt: skip


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the plan of one run, with the blockers last, where they are most visible."""
    console.print(f"[bold]{escape(plan.run.name)}[/]  {escape(plan.run.summary)}")
    _print_model(plan, console)
    _print_stages(plan, console)
    if plan.training:
        _print_training(plan, console)
    _print_expansion(plan, console)
    _print_disk(plan, console)
    _print_blockers(plan, console)


def _print_model(plan: Plan, console: Console) -> None:
    console.print(f"  model {plan.run.model.path}; sizes from {plan.config_from}", markup=False)
    if plan.sizes is None:
        return
    base, grown = plan.sizes.base, plan.sizes.grown
    if plan.outer_parameters:
        others = billions(plan.outer_parameters)
        console.print(f"  part of a multimodal model, whose {others} other parameters never change")
    if base.inferred:
        console.print("  family inferred from the modules that transformers builds, which takes some seconds")
    if base.depth_warning and len(grown.layers) > len(base.layers):
        console.print(f"  {base.depth_warning}")
    console.print(
        f"  layers {len(base.layers)} -> {len(grown.layers)}{_new_layers(plan.sizes)}\n"
        f"  parameters {_parameters(base)} -> {_parameters(grown)}"
    )


def _new_layers(sizes: Sizes) -> str:
    new = [layer.layer for layer in sizes.layers.layers if layer.new]
    if (position := sizes.method.ranked_position) is not None:
        which = f"{len(new)} new" if new else "matched"
        return f", {which} by {position}, known once the layers are ranked; estimates are for even spacing"
    return f", new: {ranges(new)}" if new else ""


def _parameters(shape: Shape) -> str:
    total, active = shape.parameters, shape.active_parameters
    return billions(total) if total == active else f"{billions(total)} ({billions(active)} active)"


def _print_stages(plan: Plan, console: Console) -> None:
    table = _table("", "stage", "state", "blocked by")
    for node in plan.nodes:
        table.add_row("", node.name, node.state, first_few(node.blocked_by, MOST_NAMES))
    console.print(table)


# --------------------------------------------------------------------------------------------- training

ROWS: tuple[tuple[str, Callable[[TrainingPlan], str]], ...] = (
    ("trains", lambda plan: _share(plan)),
    ("in layers", lambda plan: ranges(plan.trained.layers) or "none"),
    ("tokens per step", lambda plan: f"{plan.setup.train.global_batch * plan.setup.train.sequence_length:,}"),
    ("steps", lambda plan: NOT_YET if plan.amount.steps is None else f"{plan.amount.steps:,}"),
    ("tokens", lambda plan: _or_not_yet(plan.amount.tokens(plan.setup.train))),
    ("FLOPs per step", lambda plan: big(plan.step_flops)),
    ("FLOPs", lambda plan: _or_not_yet(plan.flops)),
    ("devices", lambda plan: f"{plan.setup.ranks} × {_device(plan)}"),
    ("hours", lambda plan: _hours(plan)),
    ("checkpoint", lambda plan: f"{gib(plan.checkpoint_bytes)}, written in {plan.write_seconds:.3g} s"),
)


def _print_training(plan: Plan, console: Console) -> None:
    plans, signal_seconds = plan.training, plan.run.slurm.signal_seconds
    table = _table("", "training", *(plan.section for plan in plans))
    for name, value in ROWS:
        table.add_row("", name, *map(value, plans))
    table.add_row("", "seconds to stop", *(_stopping(each, signal_seconds) for each in plans))
    table.add_section()
    table.add_row("", "memory per device", *map(_engine, plans))
    for field in fields(Memory):
        table.add_row("", f"  {COMPONENTS[field.name]}", *(gib(getattr(plan.memory, field.name)) for plan in plans))
    table.add_row("", "  total", *map(_total, plans))
    table.add_row("", "largest micro-batch", *map(_largest, plans))
    console.print(table)


def _share(plan: TrainingPlan) -> str:
    trained, total = plan.trained.parameters, plan.trained.shape.parameters
    return f"{billions(trained)} of {billions(total)}, {100 * trained / total:.1f} %"


def _or_not_yet(count: int | None) -> str:
    return NOT_YET if count is None else big(count)


def _hours(plan: TrainingPlan) -> str:
    if plan.gpu is None:
        return "set launch.device, for example to h100_80gb"
    if plan.hours is None:
        return NOT_YET
    return f"{plan.hours:.3g} at {plan.utilization:.0%} of {plan.gpu.tflops(plan.setup.precision):.0f} TFLOP/s each"


def _stopping(plan: TrainingPlan, signal_seconds: int) -> str:
    shown = f"{plan.stop_seconds:.3g}"
    return shown if plan.stop_seconds <= signal_seconds else f"{shown}, more than slurm.signal_seconds={signal_seconds}"


def _device(plan: TrainingPlan) -> str:
    return plan.launch.device if plan.gpu is not None else "GPU" if plan.setup.on_gpu else "CPU"


def _engine(plan: TrainingPlan) -> str:
    train = plan.setup.train
    recomputed = ", activation checkpointing" if train.activation_checkpointing else ""
    optimizer = {"adamw": "", "muon": ", Muon", "muon_new_layers": ", Muon for new layers"}[train.optimizer]
    averages = ", averages" if train.ema_decay is not None else ""
    shared = f", {train.sequence_parallel} ranks per sequence" if train.sequence_parallel > 1 else ""
    shown = f"ZeRO {plan.setup.zero['stage']}, {plan.setup.precision}, micro-batch {train.micro_batch}"
    return f"{shown}{shared}{recomputed}{optimizer}{averages}"


def _total(plan: TrainingPlan) -> str:
    of = "" if plan.gpu is None else f" of {gib(usable(plan.gpu.memory_gib * 2**30))}"
    return gib(plan.memory.total) + of


def _largest(plan: TrainingPlan) -> str:
    if plan.largest_micro_batch is None:
        return "set launch.device"
    return str(plan.largest_micro_batch or "none fits")


# -------------------------------------------------------------------------------------- disk and blockers


def _print_expansion(plan: Plan, console: Console) -> None:
    if plan.expansion is None:
        return
    needed, available = plan.expansion
    console.print(f"  expanding takes {gib(needed)} of {gib(available)} of GPU memory")


def _print_disk(plan: Plan, console: Console) -> None:
    if plan.disk is None:
        return
    largest = sorted(plan.disk.artifacts.items(), key=lambda item: -item[1])[:4]
    shown = ", ".join(f"{name} {gib(size)}" for name, size in largest)
    console.print(
        f"  disk {gib(plan.disk.total)}: {shown}, ...; checkpoints while training {gib(plan.disk.checkpoints)}"
        + (f", scratch space while expanding {gib(plan.disk.scratch)}" if plan.disk.scratch else "")
    )


def _print_blockers(plan: Plan, console: Console) -> None:
    if not plan.blockers:
        console.print("  no blockers found")
    for number, blocker in enumerate(plan.blockers, 1):
        fault = blocker.fault
        console.print(f"  {number}. {fault.setting} = {fault.value}: {fault.rule}.", style="red", markup=False)
        console.print(f"     {fault.remedy}", markup=False)


# --------------------------------------------------------------------------------------------- numbers


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, header_style="bold")


def billions(count: int) -> str:
    """Formats a number of parameters, such as 8.03B or 135.0M."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def big(count: int) -> str:
    """Formats a large number with an SI prefix, such as 1.23 P."""
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"


def ranges(numbers: Iterable[int]) -> str:
    """Formats ascending integers, such as 0-3, 7, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
