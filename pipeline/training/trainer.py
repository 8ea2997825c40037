"""One training stage on one rank, from its task to its artifact: read, freeze, start or resume, train, finish."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import distributed

from pipeline.artifacts.task import StageTask
from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.files import disk_full_as_user_error, write_json
from pipeline.models.flops import TrainingFlops
from pipeline.models.reading import ModelDirectory
from pipeline.tracking import Tracker
from pipeline.training import checkpoint, freeze, resume
from pipeline.training.batches import Blocks
from pipeline.training.deepspeed_config import deepspeed_config
from pipeline.training.engine import load_model, start_distributed, start_engine
from pipeline.training.export import finish
from pipeline.training.gradients import GradientNorms, parts_of_parameters
from pipeline.training.job import START_FILE, snapshot_dir
from pipeline.training.loop import Loop, Progress, Status
from pipeline.training.memory import named_when_out_of_memory
from pipeline.training.mfu import peak_of, slow_bfloat16_note, training_flops
from pipeline.training.optimizer_state import Masters
from pipeline.training.precision import resolve_precision
from pipeline.training.rank_context import RankContext
from pipeline.training.schedule import total_steps
from pipeline.training.selection import stored_apart
from pipeline.training.snapshots import partial_snapshot, save_snapshot


def train(task: StageTask, log_dir: Path, wants_stop: Callable[[], bool]) -> dict[str, Any]:
    """Trains, resuming what is there, and writes the stage's artifact into ``task.out``. Collective.

    Returns:
        The outcome: ``{"status": "done" | "stopped"}``.

    Raises:
        UserError: nothing would train, a checkpoint belongs to another run, or a disk is full while the log
            or the finished model is written.
        TrainingFailure: a number is not finite, a disk is full while a checkpoint is saved, or memory ran out.
    """
    settings = task.settings
    assert isinstance(settings, Train)
    device = start_distributed()
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = resolve_precision(settings.precision, device.type, native)
    session = RankContext(task, settings, log_dir, device, precision, rank, ranks)
    with named_when_out_of_memory(), disk_full_as_user_error(task.out):
        status = _train(session, wants_stop)
    distributed.barrier()
    return {"status": status}


@dataclass(frozen=True)
class Prepared:
    """A model ready to train, in DeepSpeed's hands."""

    rows: list[freeze.Row]
    flops: TrainingFlops
    engine: DeepSpeedEngine
    masters: Masters
    gradients: GradientNorms
    steps: int


def _prepare(session: RankContext) -> Prepared:
    """Loads the model, freezes what is to stay as it is, and starts the engine."""
    settings, section = session.settings, session.task.name
    config = deepspeed_config(settings, session.precision, session.ranks)
    model = load_model(section, session.model_dir, settings, session.precision, session.device, config)
    freeze.freeze_others(model, freeze.select_trainable(section, settings.trainable, model, session.model_dir))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _refuse_stored_apart(section, trained, session.model_dir)
    parts = parts_of_parameters(model, session.model_dir)
    rows, flops = freeze.describe(model), training_flops(model, settings.sequence_length)
    engine = start_engine(section, model, settings, session.precision, config)
    return Prepared(
        rows=rows,
        flops=flops,
        engine=engine,
        masters=Masters(engine, trained),
        gradients=GradientNorms(engine, parts),
        steps=total_steps(settings, len(Blocks(session.data_dir, "train"))),
    )


def _refuse_stored_apart(section: str, trained: Collection[str], model_dir: Path) -> None:
    """Master weights are read by name, so what trains must be stored as it is held.

    Raises:
        UserError: a parameter is put together on loading, as the experts of most mixtures are.
    """
    apart = sorted(set(trained) - ModelDirectory(model_dir).specs.keys())
    if apart:
        raise stored_apart(section, apart[0])


def _train(session: RankContext, wants_stop: Callable[[], bool]) -> Status:
    prepared = _prepare(session)
    progress, belongs_to, notes = _begin(session, prepared)
    peak = peak_of(session.device, session.precision)
    with _tracker(session, progress) as tracker:
        if session.rank == 0:  # once the log holds no more steps than are done: the driver reads both
            _announce(session, prepared.rows, progress.step, notes)
        status = Loop(
            section=session.task.name,
            train=session.settings,
            seed=session.task.seed,
            steps=prepared.steps,
            blocks=Blocks(session.data_dir, "train"),
            held_out=Blocks(session.data_dir, "held_out"),
            engine=prepared.engine,
            gradients=prepared.gradients,
            flops=prepared.flops,
            peak=peak,
            device=session.device,
            progress=progress,
            wants_stop=wants_stop,
            save=lambda state: _save(session, prepared.masters, belongs_to, state),
            save_snapshot=lambda fraction: _save_snapshot(session, prepared.masters, fraction),
            tracker=tracker,
        ).run()
    if status == "done":
        finish(session, prepared.rows, progress, peak)
    return status


# ------------------------------------------------------------------------------- starting and resuming


def _begin(session: RankContext, prepared: Prepared) -> tuple[Progress, dict[str, Any], list[str]]:
    """Puts the start or the newest good checkpoint into the engine.

    Returns:
        Where training stands, what its checkpoints belong to, and what to tell about it.
    """
    found, notes = resume.newest_checkpoint(session.checkpoints, session.device)
    task = session.task
    belongs_to = resume.identity(
        session.model_dir, session.data_dir, session.settings, task.seed, session.device, read_weights=found is not None
    )
    if found is None:
        _write_base_weights(session, prepared.masters)
        return Progress(), belongs_to, notes
    resume.check_belongs(found, belongs_to, task.name)
    content = found.content()
    progress = Progress(**content["progress"])
    _check_snapshots(session, progress, prepared.steps)
    checkpoint.restore(found, prepared.masters)
    note = resume.rounding_note(content["spread"], _spread(session))
    return progress, belongs_to, notes if note is None else [*notes, note]


def _write_base_weights(session: RankContext, masters: Masters) -> None:
    """Master weights come from the model's own files: the compute weights may have been rounded to bfloat16."""
    base = ModelDirectory(session.model_dir)
    for name in masters.names():
        masters.write(name, "weight", base.read(name))


def _check_snapshots(session: RankContext, progress: Progress, steps: int) -> None:
    """Refuses snapshots at steps that the checkpoint has already passed without saving them."""
    for fraction in session.settings.snapshot_at:
        if round(fraction * steps) <= progress.step and not snapshot_dir(session.task.out, fraction).is_dir():
            raise UserError(
                setting=f"{session.task.name}.snapshot_at",
                value=fraction,
                rule=f"training has passed that point (step {progress.step} of {steps}) and saved no snapshot there",
                remedy=f"Remove that fraction, or restart the stage with force=[{session.task.name}].",
            )


def _spread(session: RankContext) -> dict[str, Any]:
    """What orders and rounds the sums: with the same, a resumed run is the same to the bit."""
    settings = session.settings
    return {
        "device": session.device.type,
        "precision": session.precision,
        "ranks": session.ranks,
        "threads": torch.get_num_threads(),
        "zero_stage": settings.deepspeed.zero_stage,
        "reduce_bucket_size": settings.deepspeed.reduce_bucket_size,
        "offload_optimizer": settings.deepspeed.offload_optimizer,
        "micro_batch": settings.micro_batch,
        "attention": settings.attention,
        "compile": settings.compile,
        "float32_products": settings.float32_products,
    }


def _save(session: RankContext, masters: Masters, belongs_to: dict[str, Any], progress: Progress) -> None:
    progress.saves += 1
    state = {"identity": belongs_to, "progress": progress.to_json(), "spread": _spread(session)}
    kept, writes = session.settings.keep_checkpoints, session.rank == 0
    started = time.perf_counter()
    checkpoint.save(session.checkpoints, progress.step, masters, state, writes, kept)
    distributed.barrier()
    progress.save_seconds += time.perf_counter() - started


def _save_snapshot(session: RankContext, masters: Masters, fraction: float) -> None:
    """Saves the current trained weights as a snapshot for evaluation. Collective."""
    names = list(masters.names())
    weights = ((name, masters.read(name, "weight")) for name in names)
    if session.rank == 0:
        place = snapshot_dir(session.task.out, fraction)
        with checkpoint.named_when_disk_is_full(partial_snapshot(place), f"the snapshot at {fraction:g} of the steps"):
            save_snapshot(place, ModelDirectory(session.model_dir), names, weights)
    else:
        deque(weights, maxlen=0)  # reading is collective
    distributed.barrier()


# ------------------------------------------------------------------------------------------- telling


def _announce(session: RankContext, rows: list[freeze.Row], resumed_after: int, notes: list[str]) -> None:
    """Writes what is about to be trained, for the log and for the driver's terminal."""
    native_on_cpu = session.device.type == "cpu" and not session.settings.float32_products
    slow = slow_bfloat16_note(session.task.name) if native_on_cpu and session.precision == "bfloat16" else None
    notes = [*notes, *([] if slow is None else [slow])]
    print(freeze.format_rows(rows), *notes, sep="\n", flush=True)
    start = {"summary": freeze.format_summary(rows), "notes": notes, "resumed_after": resumed_after}
    write_json(session.log_dir / START_FILE, start)


def _tracker(session: RankContext, progress: Progress) -> AbstractContextManager[Tracker | None]:
    """Rank 0's tracker; nothing on other ranks."""
    if session.rank != 0:
        return nullcontext()
    resume_after = progress.step if progress.step else None
    return Tracker(session.task.tracking, session.task.out, session.settings.model_dump(mode="json"), resume_after)
