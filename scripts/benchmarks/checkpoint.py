"""Size and duration of checkpoints, compared with transformers' Trainer: python -m scripts.benchmarks.checkpoint

Both train the same new layers of the same expanded model for a few short steps and save a checkpoint after each. Ours
contains the trained weights and their moments in float32, and is flushed to disk. The Trainer's contains the complete
model and DeepSpeed's partitioned state in their own formats. Both benefit from the page cache. On a network disk, the
size is what matters.

Expected for SmolLM2 30 -> 45, before the first run: 53 million trained parameters in 12 bytes each give 0.64 GB for
ours. The Trainer adds the complete model, 188 million parameters in the precision of training, so 1.4 GB in float32.
Measured: 0.64 and 2.25 GB. The difference is about the size of two copies of the complete model, one written by the
Trainer and one by DeepSpeed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from pipeline.artifacts.task import task_to_json
from pipeline.files import read_json, write_json
from pipeline.launch.machine import detect_machine
from scripts.benchmarks.hf_trainer import SAVES_FILE
from scripts.benchmarks.machine import machine
from scripts.benchmarks.pretrain import PACKAGES, row, say
from scripts.benchmarks.processes import run_module
from scripts.benchmarks.runs import write_blocks
from scripts.benchmarks.shapes import SHAPES
from scripts.benchmarks.tasks import one_process, pretrain_settings, training_task


def ours(options: argparse.Namespace, model: Path, data: Path, out: Path, device: str) -> dict[str, Any]:
    """Returns the size and duration of our checkpoints."""
    settings = pretrain_settings(
        sequence_length=options.sequence_length, global_batch=options.global_batch, micro_batch=1,
        steps=options.steps, evaluate_at=[], checkpoint_every_steps=1, precision=options.precision,
    )  # fmt: skip
    task = training_task(settings, {"model": model, "data": data}, out, device)
    write_json(out / "task.json", task_to_json(task))
    run_module("scripts.benchmarks.our_worker", str(out / "task.json"), log=out / "log")
    checkpoints: dict[str, Any] = read_json(out / "training.json")["checkpoints"]
    return checkpoints


def trainer(options: argparse.Namespace, model: Path, data: Path, out: Path, device: str) -> dict[str, Any]:
    """Returns the size and duration of the Trainer's checkpoints."""
    job = {
        "model": str(model), "data": str(data), "out": str(out), "device": device,
        "launch": one_process(device).model_dump(mode="json"),
        "precision": options.precision,
        "zero_stage": 2, "global_batch": options.global_batch, "micro_batch": 1, "steps": options.steps,
        "activation_checkpointing": False, "save": True,
    }  # fmt: skip
    write_json(out / "job.json", job)
    run_module("scripts.benchmarks.hf_trainer", str(out / "job.json"), log=out / "log")
    saves: dict[str, Any] = read_json(out / SAVES_FILE)
    return saves


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description="Size and duration of checkpoints, compared with transformers' Trainer."
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--new-layers", type=int, default=15)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.set_defaults(sequence_length=64, global_batch=1, document_tokens=0)
    return parser.parse_args()


def main() -> None:
    """Prints the table."""
    options = parse()
    device = "cuda" if detect_machine().gpus else "cpu"
    with tempfile.TemporaryDirectory(prefix="checkpoint-benchmark-") as folder:
        work = Path(folder)
        model, data = work / "model", write_blocks(work / "data", options)
        arguments = (options.shape, str(options.new_layers), "top", str(model))
        run_module("scripts.benchmarks.models", *arguments, log=work / "models.log")
        directories = {name: work / name for name in ("ours", "trainer")}
        for directory in directories.values():
            directory.mkdir()
        measured = {
            "ours": ours(options, model, data, directories["ours"], device),
            "Trainer": trainer(options, model, data, directories["trainer"], device),
        }
    on = machine(*PACKAGES, gpu=device == "cuda")
    say(f"{on}. {options.shape} with {options.new_layers} new layers, {options.precision}, ZeRO 2.", "")
    say(row("", "GB per checkpoint", "seconds per checkpoint"), row("---", "---", "---"))
    for name, numbers in measured.items():
        say(row(name, f"{numbers['bytes'] / 1e9:.2f}", f"{numbers['seconds'] / numbers['saved']:.1f}"))


if __name__ == "__main__":
    main()
