"""One training stage on one rank, from its task to its artifact: read, freeze, start or resume, train, export."""

from __future__ import annotations

import fnmatch
import hashlib
import resource
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import distributed

from pipeline.artifact import read_json, sha256_file, write_json
from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.flops import TrainingFlops
from pipeline.model_dir import ModelDirectory, export_with_replaced
from pipeline.stage import StageTask
from pipeline.tracking import Tracker
from pipeline.training import checkpoint, freeze
from pipeline.training.batches import Blocks
from pipeline.training.chat_files import carry_chat_files
from pipeline.training.deepspeed import deepspeed_config
from pipeline.training.engine import load_model, start_distributed, start_engine
from pipeline.training.flops import training_flops
from pipeline.training.job import CHECKPOINTS, START_FILE, TRAINING_FILE
from pipeline.training.loop import Loop, Progress, Status
from pipeline.training.masters import Masters
from pipeline.training.precision import Precision, resolve_precision, slow_bfloat16_note
from pipeline.training.schedule import total_steps


@dataclass(frozen=True)
class Session:
    """What a stage's functions share on one rank."""

    task: StageTask
    settings: Train
    log_dir: Path
    device: torch.device
    precision: Precision
    rank: int
    ranks: int

    @property
    def model_dir(self) -> Path:
        """The model to train."""
        return self.task.parents["model"]

    @property
    def data_dir(self) -> Path:
        """The token blocks to train on."""
        return self.task.parents["data"]

    @property
    def checkpoints(self) -> Path:
        """Where the state goes while training lasts."""
        return self.task.out / CHECKPOINTS


def train(task: StageTask, log_dir: Path, wants_stop: Callable[[], bool]) -> dict[str, Any]:
    """Trains, resuming what is there, and writes the stage's artifact into ``task.out``. Collective.

    Returns:
        The outcome: ``{"status": "done" | "stopped"}``.

    Raises:
        UserError: nothing would train, or a checkpoint belongs to another run.
        TrainingDiverged: a number is not finite.
    """
    settings = task.settings
    assert isinstance(settings, Train)
    device = start_distributed()
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    precision = resolve_precision(settings.precision, device)
    session = Session(task, settings, log_dir, device, precision, rank, ranks)
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


def _prepare(session: Session) -> Prepared:
    """Loads the model, freezes what is to stay as it is, and starts the engine."""
    settings, section = session.settings, session.task.name
    config = deepspeed_config(settings, session.precision, session.ranks)
    model = load_model(section, session.model_dir, settings, session.precision, session.device, config)
    freeze.freeze_others(model, freeze.select_trainable(section, settings.trainable, model, session.model_dir))
    rows, flops = freeze.describe(model), training_flops(model, settings.sequence_length)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    engine = start_engine(model, settings, session.precision, config)
    return Prepared(rows, flops, engine, Masters(engine, trained))


def _train(session: Session, wants_stop: Callable[[], bool]) -> Status:
    prepared, identity = _prepare(session), _identity(session)
    progress = _resume(session, prepared.masters, identity) or _start(session, prepared.masters)
    if session.rank == 0:
        _announce(session, prepared.rows, progress.step)
    blocks = Blocks(session.data_dir, "train")
    with _tracker(session, progress) as tracker:
        status = Loop(
            section=session.task.name,
            train=session.settings,
            seed=session.task.seed,
            steps=total_steps(session.settings, len(blocks)),
            blocks=blocks,
            held_out=Blocks(session.data_dir, "held_out"),
            engine=prepared.engine,
            flops=prepared.flops,
            device=session.device,
            progress=progress,
            wants_stop=wants_stop,
            save=lambda state: _save(session, prepared.masters, identity, state),
            tracker=tracker,
        ).run()
    if status == "done":
        _finish(session, prepared.rows, progress)
    return status


# ------------------------------------------------------------------------------- starting and resuming


def _start(session: Session, masters: Masters) -> Progress:
    """Master weights come from the model's own files: the compute weights may have been rounded to bfloat16."""
    base = ModelDirectory(session.model_dir)
    for name in masters.names():
        masters.write(name, "weight", base.read(name))
    return Progress()


def _resume(session: Session, masters: Masters, identity: dict[str, Any]) -> Progress | None:
    """Restores the newest good checkpoint; None where there is none."""
    step = torch.full((), -1, dtype=torch.int64, device=session.device)
    if session.rank == 0 and (found := checkpoint.newest(session.checkpoints, print)) is not None:
        step.fill_(found.step)
    distributed.broadcast(step, src=0)  # one rank decides, or a damaged file could part them
    if step < 0:
        return None
    chosen = checkpoint.Checkpoint(session.checkpoints / f"step-{int(step):08d}")
    content = chosen.content()
    differing = [name for name, value in identity.items() if content["identity"].get(name) != value]
    if differing:
        raise UserError(
            setting="output_dir",
            value=chosen.path,
            rule=f"this checkpoint belongs to another run: {', '.join(differing)} differ",
            remedy=f"Delete {session.checkpoints}, or say force=[{session.task.name}].",
        )
    checkpoint.restore(chosen, masters)
    return Progress(**content["progress"])


def _identity(session: Session) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    return {
        "model": content_hash(session.model_dir, "*.safetensors"),
        "data": content_hash(session.data_dir, "*.npy"),
        "settings": session.settings.key_settings(),
        "seed": session.task.seed,
    }


def content_hash(directory: Path, pattern: str) -> str:
    """One hash over a directory's files of that name; an artifact's manifest knows theirs already."""
    manifest = directory / "manifest.json"
    if manifest.is_file():
        files = {name: entry["sha256"] for name, entry in read_json(manifest)["files"].items()}
    else:
        files = {path.name: sha256_file(path) for path in directory.glob(pattern)}
    lines = [f"{name} {files[name]}" for name in sorted(files) if fnmatch.fnmatch(name, pattern)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _save(session: Session, masters: Masters, identity: dict[str, Any], progress: Progress) -> None:
    state = {"identity": identity, "progress": progress.to_json(), "ranks": session.ranks}
    checkpoint.save(session.checkpoints, progress.step, masters, state, writes=session.rank == 0)
    distributed.barrier()


# ------------------------------------------------------------------------------------------- telling


def _announce(session: Session, rows: list[freeze.Row], resumed_after: int) -> None:
    """Writes what is about to be trained, for the log and for the driver's terminal."""
    native_on_cpu = session.device.type == "cpu" and not session.settings.float32_products
    note = slow_bfloat16_note(session.task.name) if native_on_cpu and session.precision == "bfloat16" else None
    notes = [] if note is None else [note]
    print(freeze.format_rows(rows), *notes, sep="\n", flush=True)
    start = {"summary": freeze.format_summary(rows), "notes": notes, "resumed_after": resumed_after}
    write_json(session.log_dir / START_FILE, start)


def _tracker(session: Session, progress: Progress) -> AbstractContextManager[Tracker | None]:
    """Rank 0's tracker; nothing on other ranks."""
    if session.rank != 0:
        return nullcontext()
    resume_after = progress.step if progress.step else None
    return Tracker(session.task.tracking, session.task.out, session.settings.model_dump(mode="json"), resume_after)


# ----------------------------------------------------------------------------------------- finishing


def _finish(session: Session, rows: list[freeze.Row], progress: Progress) -> None:
    """Writes the trained model and, last, the numbers that say that all is there. Collective."""
    memory = _peak_memory(session)
    if session.rank != 0:
        return
    last = checkpoint.Checkpoint(session.checkpoints / f"step-{progress.step:08d}")
    export_with_replaced(session.model_dir, session.task.out, last.tensors())
    carry_chat_files(session.data_dir, session.task.out)
    summary = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "flops": progress.flops,
        "seconds": progress.seconds,
        "world_size": session.ranks,
        "precision": session.precision,
        "zero_stage": session.settings.deepspeed.zero_stage,
        "trainable_parameters": sum(row.parameters for row in rows if row.trained),
        "total_parameters": sum(row.parameters for row in rows),
        "final_loss": progress.loss,
        "held_out": progress.held_out,
        **memory,
    }
    write_json(session.task.out / TRAINING_FILE, summary)


def _peak_memory(session: Session) -> dict[str, int]:
    """Host memory of all ranks together, and the fullest GPU's."""
    host = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device=session.device)
    distributed.all_reduce(host)
    if session.device.type != "cuda":
        return {"peak_memory_bytes": int(host)}
    gpu = torch.tensor(torch.cuda.max_memory_allocated(session.device), device=session.device)
    distributed.all_reduce(gpu, op=distributed.ReduceOp.MAX)
    return {"peak_memory_bytes": int(host), "peak_gpu_memory_bytes": int(gpu)}
