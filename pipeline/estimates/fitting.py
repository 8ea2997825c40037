"""Which settings fit into a device's memory, the mildest change first."""

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
from pipeline.models.families import shape_of
from pipeline.training.precision import resolve_precision
from pipeline.training.validate import less_memory

HEADROOM = 0.06  # of a device's memory: CUDA's context, NCCL, and gaps that the allocator cannot use


def setup_of(train: Train, placement: Placement) -> Setup:
    """How the engine will train on these devices."""
    precision = resolve_precision(train.precision, placement.device)
    return Setup(train, precision, placement.ranks, on_gpu=placement.device == "cuda")


def usable(memory: float) -> int:
    """Bytes, of a device's so many, that training can fill."""
    return int(memory * (1 - HEADROOM))


def largest_micro_batch(trained: Trained, setup: Setup, memory: int) -> int:
    """The largest micro-batch, of those that divide a device's share of the global batch, in so much memory; or 0."""
    share = max(1, setup.train.global_batch // setup.ranks)
    sizes = (size for size in range(share, 0, -1) if share % size == 0)
    fitting = (size for size in sizes if memory_of(trained, setup.with_train(micro_batch=size)).total <= memory)
    return next(fitting, 0)


def what_fits(section: str, trained: Trained, setup: Setup, memory: int) -> str | None:
    """The settings to type: a smaller micro-batch, then less stored, then more shared out; None where nothing fits."""
    if largest := largest_micro_batch(trained, setup, memory):
        return f"{section}.micro_batch={largest}"
    sharing = setup.train.deepspeed.model_copy(update={"zero_stage": 3})
    offloading = sharing.model_copy(update={"offload_optimizer": True, "offload_parameters": True})
    plain: dict[str, object] = {"compile": False} if setup.train.compile else {}  # ZeRO 3 does not go with it
    uncompiled = f"{section}.compile=false " if plain else ""
    steps: list[tuple[dict[str, object], str]] = [
        ({"activation_checkpointing": True}, f"{section}.activation_checkpointing=true"),
        ({"deepspeed": sharing, **plain}, f"{uncompiled}{section}.deepspeed.zero_stage=3"),
        (
            {"deepspeed": offloading},
            f"{section}.deepspeed.offload_optimizer=true {section}.deepspeed.offload_parameters=true",
        ),
    ]
    changes: dict[str, object] = {"micro_batch": 1}
    said = [f"{section}.micro_batch=1"]
    for change, words in steps:
        changes |= change
        said.append(words)
        if memory_of(trained, setup.with_train(**changes)).total <= memory:
            return " ".join(said)
    return None


def when_out_of_memory(section: str, trained: Trained, setup: Setup, memory: int) -> str:
    """What to type after memory ran out. None of it changes the numbers, so that a run goes on from its checkpoint.

    Args:
        memory: bytes that training can fill on each device.
    """
    needed = memory_of(trained, setup).total
    if needed <= memory:  # something else took it
        return less_memory(section, setup.train, setup.ranks)
    fits = what_fits(section, trained, setup, memory)
    if fits is None:
        fits = "launch.processes or launch.nodes with more devices: nothing else"
    return (
        f"By estimate {gib(needed)} a device are needed, and {gib(memory)} are there. What fits: {fits}; the same "
        "command with it goes on where it stood."
    )


# --------------------------------------------------------------------------------------------------
# What a training stage says when memory ran out: the settings that would fit, by the estimate of ``action=plan``.


@contextmanager
def naming_what_fits(task: StageTask) -> Iterator[None]:
    """Adds the remedy to what the workers said.

    Raises:
        WorkersFailed: memory ran out.
    """
    try:
        yield
    except OutOfMemory as error:
        raise WorkersFailed(f"{error}\n{_remedy(task)}") from error


def _remedy(task: StageTask) -> str:
    train, model, machine = task.settings, task.parents["model"], detect_machine()
    assert isinstance(train, Train)
    shape = shape_of(read_json(model / "config.json"))
    trained = trained_part(task.name, train.trainable, shape, read_json(model / "expansion.json"))
    placement = place(task.launch, machine)
    there = usable(device_memory(placement))
    return when_out_of_memory(task.name, trained, setup_of(train, placement), there)
