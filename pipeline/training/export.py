"""The end of a training stage: the whole model, and the numbers that say what was done."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from pipeline.files import fsync_directory, read_json, write_json
from pipeline.models.export import export_with_replaced
from pipeline.training import freeze
from pipeline.training.checkpoint import Checkpoint, directory_name
from pipeline.training.job import TRAINING_FILE
from pipeline.training.loop import DEVIATIONS, Progress
from pipeline.training.mfu import Peak
from pipeline.training.rank_context import RankContext


def finish(session: RankContext, rows: list[freeze.Row], progress: Progress, peak: Peak) -> None:
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
    fsync_directory(session.task.out)  # the checkpoints go once this file is there
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


def _peak_memory(session: RankContext) -> dict[str, int]:
    """Host memory of all ranks together, and the fullest GPU's."""
    host = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device=session.device)
    distributed.all_reduce(host)
    if session.device.type != "cuda":
        return {"peak_memory_bytes": int(host)}
    gpu = torch.tensor(torch.cuda.max_memory_allocated(session.device), device=session.device)
    distributed.all_reduce(gpu, op=distributed.ReduceOp.MAX)
    return {"peak_memory_bytes": int(host), "peak_gpu_memory_bytes": int(gpu)}


# --------------------------------------------------------------------------------------------------
# What makes a tuned model a chat model for whoever loads it: its template, and where it stops.

CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG_FILE = "generation_config.json"


def carry_chat_files(data_dir: Path, model_dir: Path) -> None:
    """The template that the conversations were rendered with, and its end of turn, go with the model that learnt them.

    A base model often stops at its end of text alone (Qwen2.5: ``<|endoftext|>``, turns end with ``<|im_end|>``), and
    would talk on after every answer. Token blocks of plain text change nothing.
    """
    template, end = data_dir / CHAT_TEMPLATE_FILE, read_json(data_dir / "dataset.json").get("end_of_turn")
    if template.is_file():
        shutil.copyfile(template, model_dir / CHAT_TEMPLATE_FILE)
    if end is not None:
        _stop_at(end, model_dir)


def _stop_at(token: int, model_dir: Path) -> None:
    place = model_dir / GENERATION_CONFIG_FILE
    config = read_json(place) if place.exists() else {}
    known = config.get("eos_token_id", read_json(model_dir / "config.json").get("eos_token_id"))
    stops = known if isinstance(known, list) else [] if known is None else [known]
    if token not in stops:
        write_json(place, {**config, "eos_token_id": [*stops, token]})
