"""What a training stage says when memory ran out: the settings that would fit, by the estimate of ``action=plan``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.artifact import read_json
from pipeline.config import Train
from pipeline.errors import OutOfMemory, WorkersFailed
from pipeline.estimate.fitting import setup_of, usable, when_out_of_memory
from pipeline.estimate.trained import trained_part
from pipeline.machine import detect_machine, device_memory, place
from pipeline.shape import shape_of
from pipeline.stage import StageTask


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
    there = usable(device_memory(place(task.launch, machine)))
    launch = task.launch.model_copy(update={"nodes": machine.nodes})  # the setting is for plans
    return when_out_of_memory(task.name, trained, setup_of(train, launch, machine), there)
