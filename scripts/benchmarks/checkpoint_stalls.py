"""How long training waits for a checkpoint: python -m scripts.benchmarks.checkpoint_stalls

Prints, for 1, 2 and 4 ranks on one machine, the seconds for which training waits (stall) and those until a checkpoint
is complete (total), beside those of a blocking save: every tensor is assembled on all ranks, and rank 0 checks it,
writes it with safetensors, reads it again to hash it, and flushes it. That is how checkpoints were saved before
they were written in the background. Both save the same state, in turns, while nothing else runs; the first round, which
allocates memory, is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts.task import StageTask, task_from_json, task_to_json
from pipeline.config import Train
from pipeline.files import fsync_directory, read_json, sha256_file, write_json
from pipeline.launch.child import end_with_parent
from pipeline.launch.machine import detect_machine
from pipeline.launch.workers import LOG_DIR_VARIABLE, OUTCOME_FILE, run_workers
from scripts.benchmarks.machine import machine
from scripts.benchmarks.pretrain import PACKAGES, row, say
from scripts.benchmarks.processes import run_module
from scripts.benchmarks.shapes import SHAPES
from scripts.benchmarks.tasks import pretrain_settings, quickstart, stage_task

if TYPE_CHECKING:
    from pipeline.training.optimizer_state import OptimizerState

RESULT = "stalls.json"
ROUNDS = 3


def measure(task: StageTask, log_dir: Path) -> dict[str, Any]:
    """Returns the medians of one number of ranks. Collective."""
    import torch
    from torch import distributed

    from pipeline.training import freeze
    from pipeline.training.checkpoint_writer import CheckpointWriter
    from pipeline.training.engine import RankContext, load_model, start_distributed, start_engine
    from pipeline.training.optimizer_state import OptimizerState
    from pipeline.training.precision import resolve_precision

    settings = task.settings
    assert isinstance(settings, Train)
    device = start_distributed(timedelta(minutes=15), log_dir)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    context = RankContext(
        task, settings, log_dir, device, resolve_precision(settings.precision, device.type), rank, ranks
    )
    model = load_model(context)
    freeze.freeze_others(model, freeze.select_trainable(task.name, settings.trainable, model, context.model_dir))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = OptimizerState(start_engine(context, model, {}, ()), trained, {}, {})
    writer = CheckpointWriter(context.checkpoints, state, keep=1, device=device)
    seconds: dict[str, list[float]] = {"stall": [], "total": [], "blocking": []}
    for step in range(ROUNDS + 1):
        distributed.barrier()
        started = time.perf_counter()
        blocking_save(task.out / f"blocking-{step}", state, rank == 0)
        distributed.barrier()
        seconds["blocking"].append(time.perf_counter() - started)
        started = time.perf_counter()
        writer.save(step, {})
        seconds["stall"].append(time.perf_counter() - started)
        writer.finish()
        distributed.barrier()
        seconds["total"].append(time.perf_counter() - started)
    worst = torch.tensor([statistics.median(values[1:]) for values in seconds.values()], device=device)
    distributed.all_reduce(worst, op=distributed.ReduceOp.MAX)
    (saved,) = context.checkpoints.iterdir()
    size = sum(path.stat().st_size for path in saved.iterdir())
    return {**dict(zip(seconds, worst.tolist(), strict=True)), "bytes": size}


def blocking_save(directory: Path, state: OptimizerState, is_writer: bool) -> None:
    """Saves all tensors while all ranks wait. Collective."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name in state.names():
        for key in state.keys(name):
            value = state.read(name, key)
            assert torch.isfinite(value).all()
            if is_writer:
                tensors[f"{key}.{name}"] = value
    if is_writer:
        directory.mkdir()
        save_file(tensors, directory / "tensors.safetensors")
        write_json(directory / "state.json", {"sha256": sha256_file(directory / "tensors.safetensors")})
        fsync_directory(directory)


def worker(job: Path, log_dir: Path) -> None:
    """Measures on one of the ranks."""
    task = task_from_json(read_json(job))
    found = measure(task, log_dir)
    if os.environ["RANK"] == "0":
        write_json(task.out / RESULT, found)
        write_json(log_dir / OUTCOME_FILE, {"status": "done"})


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="How long training waits for a checkpoint.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--new-layers", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    return parser.parse_args()


def main() -> None:
    """Prints the table."""
    options = parse()
    device = "cuda" if detect_machine().gpus else "cpu"
    settings = pretrain_settings(sequence_length=64, global_batch=4, micro_batch=1, steps=1, precision="float32")
    rows = []
    with tempfile.TemporaryDirectory(prefix="stall-benchmark-") as folder:
        work = Path(folder)
        model = work / "model"
        arguments = (options.shape, str(options.new_layers), "top", str(model))
        run_module("scripts.benchmarks.models", *arguments, log=work / "models.log")
        for ranks in options.ranks:
            out = work / f"ranks-{ranks}"
            (out / "logs").mkdir(parents=True)
            task = stage_task("pretrain", settings, {"model": model, "data": model}, out)
            launch = quickstart(f"launch.device={device}", f"launch.processes={ranks}", "launch.threads=1").launch
            write_json(out / "task.json", task_to_json(replace(task, launch=launch)))
            run_workers("scripts.benchmarks.checkpoint_stalls", out / "task.json", launch, out / "logs")
            rows.append((ranks, read_json(out / RESULT)))
    on = machine(*PACKAGES, gpu=device == "cuda")
    size = rows[0][1]["bytes"] / 1e9
    say(f"{on}. {options.shape} with {options.new_layers} new layers, {size:.2f} GB, ZeRO 2.", "")
    say(row("ranks", "blocking, s", "stall, s", "total, s", "stall / blocking", "total / blocking"))
    say(row(*["---"] * 6))
    for ranks, found in rows:
        seconds = [found[name] for name in ("blocking", "stall", "total")]
        ratios = [found[name] / found["blocking"] for name in ("stall", "total")]
        say(row(str(ranks), *(f"{value:.2f}" for value in seconds), *(f"{value:.3f}" for value in ratios)))


if __name__ == "__main__":
    if LOG_DIR_VARIABLE in os.environ:
        end_with_parent()
        worker(Path(sys.argv[1]), Path(os.environ[LOG_DIR_VARIABLE]))
    else:
        main()
