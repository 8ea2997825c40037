"""The end of a training stage: the whole model, and the numbers that say what was done."""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch import distributed

from pipeline.artifact import sync_directory, write_json
from pipeline.model_dir import export_with_replaced
from pipeline.training import freeze
from pipeline.training.chat_files import carry_chat_files
from pipeline.training.checkpoint import Checkpoint, directory_name
from pipeline.training.context import Session
from pipeline.training.job import TRAINING_FILE
from pipeline.training.loop import Progress
from pipeline.training.spikes import DEVIATIONS
from pipeline.training.utilisation import Peak


def finish(session: Session, rows: list[freeze.Row], progress: Progress, peak: Peak) -> None:
    """Writes the trained model and, last, ``training.json``. Collective."""
    memory = _peak_memory(session)
    if session.rank != 0:
        return
    last = Checkpoint(session.checkpoints / directory_name(progress.step))
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
        "mfu": progress.flops / progress.seconds / peak.rate,
        "peak_flops_per_second": {"rate": peak.rate, "source": peak.source},
        "checkpoints": _checkpoints(last, progress),
        "warnings": _spike_warnings(progress),
        **memory,
    }
    sync_directory(session.task.out)  # the checkpoints go once this file is there
    write_json(session.task.out / TRAINING_FILE, summary)


def _checkpoints(last: Checkpoint, progress: Progress) -> dict[str, Any]:
    """What saving cost; a run that was killed after its last save has no seconds of that one."""
    return {
        "saved": progress.saves,
        "seconds": progress.save_seconds,
        "bytes": sum(path.stat().st_size for path in last.path.iterdir()),
    }


def _spike_warnings(progress: Progress) -> list[str]:
    if not progress.spikes:
        return []
    steps = ", ".join(f"{spike['step']} ({spike['loss']:.3g})" for spike in progress.spikes)
    return [f"the loss spiked at {len(progress.spikes)} step(s), more than {DEVIATIONS:g} deviations up: {steps}"]


def _peak_memory(session: Session) -> dict[str, int]:
    """Host memory of all ranks together, and the fullest GPU's."""
    host = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device=session.device)
    distributed.all_reduce(host)
    if session.device.type != "cuda":
        return {"peak_memory_bytes": int(host)}
    gpu = torch.tensor(torch.cuda.max_memory_allocated(session.device), device=session.device)
    distributed.all_reduce(gpu, op=distributed.ReduceOp.MAX)
    return {"peak_memory_bytes": int(host), "peak_gpu_memory_bytes": int(gpu)}
