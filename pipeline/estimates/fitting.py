"""Finds settings with which training fits into a device's memory, preferring those that cost the least speed.

The same search serves a plan, and the error message of a training stage that ran out of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.artifacts.task import StageTask
from pipeline.config import Train
from pipeline.errors import OutOfMemory, WorkersFailed
from pipeline.estimates.memory import Setup, memory_of
from pipeline.estimates.sizes import Trained, trained_part
from pipeline.files import gib, read_json
from pipeline.launch.machine import Placement, detect_machine, device_memory, place
from pipeline.models.families import inner_config, shape_of
from pipeline.training.precision import resolve_precision
from pipeline.training.validate import less_memory

HEADROOM = 0.06  # share of a device's memory for the CUDA context, NCCL and fragmentation


def setup_of(train: Train, placement: Placement) -> Setup:
    """Describes how the engine would train on some devices."""
    precision = resolve_precision(train.precision, placement.device)
    return Setup(train, precision, placement.ranks, on_gpu=placement.device == "cuda")


def usable(memory: float) -> int:
    """Returns how much of a device's memory, in bytes, training can use."""
    return int(memory * (1 - HEADROOM))


def largest_micro_batch(trained: Trained, setup: Setup, memory: int) -> int:
    """Finds the largest micro-batch that fits and divides a group's share of the global batch; 0 if none fits.

    Args:
        memory: bytes per device that training can use.
    """
    share = max(1, setup.train.global_batch // setup.groups)
    sizes = (size for size in range(share, 0, -1) if share % size == 0)
    fitting = (size for size in sizes if memory_of(trained, setup.with_train(micro_batch=size)).total <= memory)
    return next(fitting, 0)


def what_fits(section: str, trained: Trained, setup: Setup, memory: int) -> str | None:
    """Finds overrides with which training fits: a smaller micro-batch, then recomputation, sharding and offloading.

    Args:
        memory: bytes per device that training can use.

    Returns:
        The overrides as they are typed, or None if nothing fits.
    """
    if largest := largest_micro_batch(trained, setup, memory):
        return f"{section}.micro_batch={largest}"
    sharing = setup.train.deepspeed.model_copy(update={"zero_stage": 3})
    offloading = sharing.model_copy(update={"offload_optimizer": True, "offload_parameters": True})
    plain: dict[str, object] = {"compile": False} if setup.train.compile is True else {}  # not possible with ZeRO 3
    uncompiled = f"{section}.compile=false " if plain else ""
    steps: list[tuple[dict[str, object], str]] = [
        ({"activation_checkpointing": True}, f"{section}.activation_checkpointing=true"),
        ({"deepspeed": sharing, **plain}, f"{uncompiled}{section}.deepspeed.zero_stage=3"),
        (
            {"deepspeed": offloading},
            f"{section}.deepspeed.offload_optimizer=true {section}.deepspeed.offload_parameters=true",
        ),
    ]
    if setup.train.uses_muon:  # neither at ZeRO 3 nor offloaded
        steps = steps[:1]
    changes: dict[str, object] = {"micro_batch": 1}
    overrides = [f"{section}.micro_batch=1"]
    for change, override in steps:
        changes |= change
        overrides.append(override)
        if memory_of(trained, setup.with_train(**changes)).total <= memory:
            return " ".join(overrides)
    return None


def when_out_of_memory(section: str, trained: Trained, setup: Setup, memory: int) -> str:
    """Describes the remedy after memory ran out. It changes no numbers, so the run can resume from its checkpoint.

    Args:
        memory: bytes per device that training can use.
    """
    needed = memory_of(trained, setup).total
    if needed <= memory:  # another program uses the memory, or the estimate is too low
        return less_memory(section, setup.train, setup.ranks)
    fits = what_fits(section, trained, setup, memory)
    if fits is None:
        fits = "only more devices (launch.processes or launch.nodes)"
    return (
        f"Training needs about {gib(needed)} per device, and {gib(memory)} are available. What fits: {fits}. The same "
        "command with this change resumes the run."
    )


@contextmanager
def suggest_settings_that_fit(task: StageTask) -> Iterator[None]:
    """Adds the remedy to the error of workers that ran out of memory.

    Raises:
        WorkersFailed: they ran out of memory.
    """
    try:
        yield
    except OutOfMemory as error:
        raise WorkersFailed(f"{error}\n{_remedy(task)}") from error


def _remedy(task: StageTask) -> str:
    train, model, machine = task.settings, task.parents["model"], detect_machine()
    assert isinstance(train, Train)
    shape = shape_of(inner_config(read_json(model / "config.json")))
    trained = trained_part(task.name, train.trainable, shape, read_json(model / "expansion.json"))
    placement = place(task.launch, machine)
    setup, memory = setup_of(train, placement), device_memory(placement)
    if memory is None:
        return less_memory(task.name, train, setup.ranks)
    return when_out_of_memory(task.name, trained, setup, usable(memory))
