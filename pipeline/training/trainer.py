"""A training stage on one rank, from its task to its artifact: load, freeze, start or resume, train, export."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import distributed
from transformers import PreTrainedModel

from pipeline.artifacts.task import StageTask
from pipeline.config import Split, Train
from pipeline.errors import TrainingFailure, UserError
from pipeline.files import disk_errors_as_user_errors, write_json
from pipeline.launch.failure import OUT_OF_MEMORY
from pipeline.launch.machine import bfloat16_flags
from pipeline.models.flops import TrainingFlops
from pipeline.models.matrix_products import prefers_float32_units
from pipeline.models.reading import ModelDirectory
from pipeline.models.stored_parameters import StoredParameters
from pipeline.tracking import METRICS_FILE, Tracker
from pipeline.training import checkpoint, freeze, resume
from pipeline.training.batches import TokenBlocks
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter, report_full_disk
from pipeline.training.engine import (
    RankContext,
    choose_precision,
    leaves_units_open,
    load_model,
    start_distributed,
    start_engine,
)
from pipeline.training.final_model import export_trained_model, exported_key
from pipeline.training.gradients import GradientNorms, group_parameters
from pipeline.training.job import CHECKPOINTS, START_FILE, snapshot_dir
from pipeline.training.loop import Loop, Progress, Status
from pipeline.training.mfu import peak_of, training_flops
from pipeline.training.muon import matrices_of, update_flops
from pipeline.training.optimizer import learning_rate_multiples
from pipeline.training.optimizer_state import OptimizerState
from pipeline.training.precision import Precision
from pipeline.training.process_group import enter, wait_for_all
from pipeline.training.routing import Routing, coefficient_of, routers_of
from pipeline.training.schedule import total_steps
from pipeline.training.sequence_parallel import SequenceGroup
from pipeline.training.snapshots import partial_snapshot, save_snapshot

CPU_ALLOCATOR = "DefaultCPUAllocator"  # in the RuntimeError that torch raises if the host has no memory left


def train(task: StageTask, log_dir: Path, wants_stop: Callable[[], bool]) -> dict[str, Any]:
    """Trains, resuming from existing checkpoints, and writes the stage's artifact to ``task.out``. Collective.

    Args:
        task: the stage's task.
        log_dir: where the driver looks for ``start.json``.
        wants_stop: returns True once this rank has been asked to stop.

    Returns:
        The outcome: ``{"status": "done" | "stopped"}``.

    Raises:
        UserError: no parameter would train, a checkpoint belongs to another run, or the disk is full while the log or
            the final model is written.
        TrainingFailure: a value is not finite, the disk is full while a checkpoint is saved, or memory ran out.
    """
    settings = task.settings
    assert isinstance(settings, Train)
    device = start_distributed(timedelta(seconds=task.launch.collective_timeout_seconds), log_dir)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    with report_out_of_memory(), disk_errors_as_user_errors(task.out):
        found, notes = resume.newest_checkpoint(task.out / CHECKPOINTS, device)
        precision, on_float32_units = choose_precision(settings, device, _chosen_earlier(found, device))
        sequence = SequenceGroup.of_this_rank(settings.sequence_parallel)
        context = RankContext(task, settings, log_dir, device, precision, rank, ranks, sequence, on_float32_units)
        status = _train(context, found, notes, wants_stop)
    wait_for_all("exporting the model")
    return {"status": status}


@contextmanager
def report_out_of_memory() -> Iterator[None]:
    """Replaces the out-of-memory errors of torch and Python by one message.

    Raises:
        TrainingFailure: a GPU or the host has no memory left.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and CPU_ALLOCATOR not in str(error):
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise TrainingFailure(f"{OUT_OF_MEMORY}: {first_line}") from error


def _chosen_earlier(found: Checkpoint | None, device: torch.device) -> tuple[Precision, bool] | None:
    """Returns the precision with which a checkpoint was computed, and whether on the float32 units of this device."""
    saved = {} if found is None else found.content()["spread"]
    return (saved["precision"], saved.get("float32_products", False)) if saved.get("device") == device.type else None


def _train(context: RankContext, found: Checkpoint | None, notes: list[str], wants_stop: Callable[[], bool]) -> Status:
    parts = _prepare(context)
    progress, identity, changes = _start_or_resume(context, parts, found)
    notes = [*notes, *changes]
    peak = peak_of(context.device, context.precision)
    timeout = context.task.launch.collective_timeout_seconds
    writer = CheckpointWriter(
        context.checkpoints, parts.optimizer_state, context.settings.keep_checkpoints, context.device, timeout
    )
    with writer, _tracker(context, progress) as tracker:
        # The tracker has just dropped the log's lines after the checkpoint. The driver reads the log only once it has
        # seen this announcement.
        if context.rank == 0:
            _announce(context, parts.table, progress.step, notes)
        loop = Loop(
            section=context.task.name,
            train=context.settings,
            seed=context.task.seed,
            steps=parts.steps,
            blocks=TokenBlocks.trained(context.data_dir, context.corpus_dir, context.settings.corpus_fraction),
            evaluated=TokenBlocks.evaluated(context.data_dir),
            engine=parts.engine,
            gradients=parts.gradients,
            flops=parts.flops,
            peak=peak,
            device=context.device,
            progress=progress,
            # A stop saves, and that raises what went wrong while the previous checkpoint was written.
            wants_stop=lambda: writer.has_failed or wants_stop(),
            save=lambda current, last: _save_checkpoint(context, writer, identity, current, last),
            save_snapshot=lambda fraction: _save_snapshot(context, parts.optimizer_state, fraction),
            tracker=tracker,
            routing=parts.routing,
            sequence=context.sequence,
        )
        status = loop.run()
        _finish_checkpoint(writer, progress)
    if status == "done":
        losses = _use_averages(context.settings, parts.optimizer_state, loop)
        enter("exporting the model", is_alone=True)
        export_trained_model(context, parts.engine, parts.table, progress, peak, losses)
    return status


def _use_averages(settings: Train, optimizer_state: OptimizerState, loop: Loop) -> dict[Split, float]:
    """Replaces the weights by their averages, if there are any, and returns their loss on every split. Collective."""
    if settings.ema_decay is None:
        return {}
    enter("replacing the weights by their averages", is_alone=True)
    optimizer_state.use_averages()
    enter("computing the losses of the averages")
    if not settings.evaluate_at:
        return {}
    return {split: loop.losses_on(blocks).mean for split, blocks in loop.evaluated.items()}


@dataclass(frozen=True)
class _TrainerParts:
    """What the loop and the export need."""

    table: list[freeze.ParameterRow]
    flops: TrainingFlops
    engine: DeepSpeedEngine
    optimizer_state: OptimizerState
    gradients: GradientNorms
    steps: int
    routing: Routing | None


def _prepare(context: RankContext) -> _TrainerParts:
    """Loads the model, freezes the parameters that do not train, and starts the engine."""
    settings, section = context.settings, context.task.name
    model = load_model(context)
    freeze.freeze_others(model, freeze.select_trainable(section, settings.trainable, model, context.model_dir))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # These read the model's parameters before DeepSpeed flattens and partitions them.
    groups = group_parameters(model, context.model_dir)
    multiples = learning_rate_multiples(section, model, settings, context.model_dir)
    new = freeze.layers_with_learning_rate(settings.trainable, context.model_dir)
    matrices = matrices_of(section, model, settings, new)
    table, flops = freeze.parameter_table(model, multiples), training_flops(model, settings.sequence_length)
    flops = replace(flops, update=update_flops(model, matrices, settings.newton_schulz_steps))
    routing = _observe_routers(context, model)
    engine = start_engine(context, model, multiples, matrices)
    return _TrainerParts(
        table=table,
        flops=flops,
        engine=engine,
        optimizer_state=OptimizerState(engine, trained, multiples, matrices),
        gradients=GradientNorms(engine, groups),
        steps=total_steps(settings, len(TokenBlocks(context.data_dir, "train"))),
        routing=routing,
    )


def _observe_routers(context: RankContext, model: PreTrainedModel) -> Routing | None:
    """Prepares the routers of a mixture of experts, whose parameters have been frozen as needed.

    If no new layer has a router, all routers are reported.

    Raises:
        UserError: ``router_aux_loss`` is set, and transformers does not record what the routers of this family choose.
    """
    setting, config = context.settings.router_aux_loss, model.config
    routers = routers_of(model, freeze.decoder_layers(model))
    if not routers:
        if setting:
            raise UserError(
                setting=f"{context.task.name}.router_aux_loss",
                value=setting,
                rule=f"transformers does not record what the routers of the family {config.model_type} choose",
                remedy=f"Set {context.task.name}.router_aux_loss=null.",
            )
        if coefficient_of(None, config.get_text_config()):
            print(
                f"router_aux_loss: 0, since transformers does not record the routers of {config.model_type}", flush=True
            )
        return None
    coefficient = coefficient_of(setting, config.get_text_config())
    print(f"router_aux_loss: {coefficient:g} ({context.task.name}.router_aux_loss={setting})", flush=True)
    new = freeze.new_layers(context.model_dir) & routers.keys()
    return Routing(routers, coefficient, new or {*routers}, context.sequence)


# ------------------------------------------------------------------------------- starting and resuming


def _start_or_resume(
    context: RankContext, parts: _TrainerParts, found: Checkpoint | None
) -> tuple[Progress, dict[str, Any], list[str]]:
    """Loads the base weights or a checkpoint into the engine.

    Returns:
        The progress, the identity to store in new checkpoints, and notes for the user.
    """
    task = context.task
    identity = resume.identity(
        context.model_dir,
        [context.data_dir, *([] if context.corpus_dir is None else [context.corpus_dir])],
        context.settings,
        task.seed,
        context.device,
        read_weights=found is not None,
    )
    if found is None:
        _load_base_weights(context, parts.optimizer_state)
        return Progress(), identity, []
    resume.check_identity(found, identity, task.name)
    content = found.content()
    progress = Progress(**content["progress"])
    _check_snapshots(context, progress, parts.steps)
    checkpoint.restore(found, parts.optimizer_state)
    note = resume.rounding_note(content["spread"], _summation_settings(context))
    return progress, identity, [] if note is None else [note]


def _load_base_weights(context: RankContext, optimizer_state: OptimizerState) -> None:
    """Loads the master weights from the model's files: the compute weights may have been rounded to bfloat16."""
    base = StoredParameters(ModelDirectory(context.model_dir))
    for name in optimizer_state.names():
        optimizer_state.write_initial(name, base.read(name))


def _check_snapshots(context: RankContext, progress: Progress, steps: int) -> None:
    """Refuses snapshots that are damaged or missing at steps that the checkpoint has already passed. Collective."""
    passed = [fraction for fraction in context.settings.snapshot_at if round(fraction * steps) <= progress.step]
    directories = [snapshot_dir(context.task.out, fraction) for fraction in passed]
    damaged = resume.damaged_snapshots(directories, context.device)
    for fraction, directory in zip(passed, directories, strict=True):
        if not directory.is_dir() or directory in damaged:
            fault = f"the snapshot {directory} is damaged" if directory in damaged else "saved no snapshot there"
            raise UserError(
                setting=f"{context.task.name}.snapshot_at",
                value=fraction,
                rule=f"training has passed that point (step {progress.step} of {steps}) and {fault}",
                remedy=f"Remove that fraction, or restart the stage with force=[{context.task.name}].",
            )


def _summation_settings(context: RankContext) -> dict[str, Any]:
    """Returns everything that determines the order and rounding of sums.

    If all of it is the same, a resumed run is bitwise identical to an uninterrupted one.
    """
    settings, shared = context.settings, context.settings.sequence_parallel
    return {
        "device": context.device.type,
        "precision": context.precision,
        "ranks": context.ranks,
        "threads": torch.get_num_threads(),
        "zero_stage": settings.deepspeed.zero_stage,
        "reduce_bucket_size": context.deepspeed_config["zero_optimization"]["reduce_bucket_size"],
        "offload_optimizer": settings.deepspeed.offload_optimizer,
        "micro_batch": settings.micro_batch,
        "attention": settings.attention,
        "compile": settings.compiles(context.device.type),
        "float32_products": context.float32_products,
        **({"sequence_parallel": shared} if shared > 1 else {}),  # earlier checkpoints do not have it
    }


# -------------------------------------------------------------------------------------------- saving


def _save_checkpoint(
    context: RankContext, writer: CheckpointWriter, identity: dict[str, Any], progress: Progress, last: bool
) -> None:
    enter("saving a checkpoint", is_alone=True)
    started = time.perf_counter()
    progress.save_seconds += writer.finish()
    progress.saves += 1
    # "spread" is the name that existing checkpoints use.
    state = {"identity": identity, "progress": progress.to_json(), "spread": _summation_settings(context)}
    writer.save(progress.step, state, files=[context.task.out / METRICS_FILE], last=last)
    progress.stall_seconds += time.perf_counter() - started


def _finish_checkpoint(writer: CheckpointWriter, progress: Progress) -> None:
    """Waits until the last checkpoint is complete. Collective."""
    enter("writing the last checkpoint", is_alone=True)
    started = time.perf_counter()
    progress.save_seconds += writer.finish()
    wait_for_all("writing the last checkpoint")
    progress.stall_seconds += time.perf_counter() - started


def _save_snapshot(context: RankContext, optimizer_state: OptimizerState, fraction: float) -> None:
    """Saves the current trained weights, or their averages, as a snapshot for evaluation. Collective."""
    enter("saving a snapshot", is_alone=True)
    names = list(optimizer_state.names())
    key = exported_key(context.settings)
    weights = ((name, optimizer_state.read(name, key)) for name in names)
    if context.rank == 0:
        directory = snapshot_dir(context.task.out, fraction)
        partial, what = partial_snapshot(directory), f"the snapshot at {fraction:g} of the steps"
        with report_full_disk(partial.parent, what, lambda: shutil.rmtree(partial, ignore_errors=True)):
            save_snapshot(directory, StoredParameters(ModelDirectory(context.model_dir)), names, weights)
    else:
        deque(weights, maxlen=0)  # consumes the generator: reading is collective, so every rank must read
    wait_for_all("saving a snapshot")


# ----------------------------------------------------------------------------------------- reporting


def _announce(context: RankContext, table: list[freeze.ParameterRow], resumed_after: int, notes: list[str]) -> None:
    """Reports what will be trained, in the log and in ``start.json`` for the driver's terminal."""
    notes = [*notes, *_precision_note(context)]
    print(freeze.format_table(table), *notes, sep="\n", flush=True)
    start = {"summary": freeze.format_summary(table), "notes": notes, "resumed_after": resumed_after}
    write_json(context.log_dir / START_FILE, start)


def _precision_note(context: RankContext) -> list[str]:
    """Returns how a CPU computes, where that was left to the pipeline."""
    settings, section = context.settings, context.task.name
    if context.device.type != "cpu" or settings.precision == context.precision == "float32":
        return []
    if context.precision == "float32":
        reason = "its instructions for bfloat16 are slower" if bfloat16_flags() else "it has none for bfloat16"
        return [f"computes in float32 on this processor, since {reason}"]
    if context.float32_products:
        return ["computes in bfloat16, with matrix products on the float32 units, which are faster on this processor"]
    if not leaves_units_open(settings, context.precision, "cpu") and prefers_float32_units():
        return [f"bfloat16 is slow on this processor: {section}.precision=auto and {section}.float32_products=auto "
                "would be faster"]  # fmt: skip
    return ["computes in bfloat16, for which this processor has fast instructions"]


def _tracker(context: RankContext, progress: Progress) -> AbstractContextManager[Tracker | None]:
    """Returns rank 0's tracker; other ranks have none."""
    if context.rank != 0:
        return nullcontext()
    task, settings = context.task, context.settings.model_dump(mode="json")
    if not progress.step:
        return Tracker(task.tracking, task.out, settings)
    saved = Checkpoint(context.checkpoints / checkpoint.directory_name(progress.step)).metrics_log()
    return Tracker(task.tracking, task.out, settings, resume_after=progress.step, saved=saved)
