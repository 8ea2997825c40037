"""Size and seconds of a checkpoint beside the Trainer's: python -m scripts.benchmarks.checkpoint

Both train the same new layers of the same expanded model for a few short steps and save after each. Ours holds the
trained weights and their moments in float32, flushed to the disk; the Trainer's holds the whole model and DeepSpeed's
partitioned state, as it writes them. The page cache serves both alike; on a network disk sizes are what counts.

Expected for SmolLM2 30 -> 45, before it was run: 53 million trained parameters in 12 bytes each are 0.64 GB for us; the
Trainer adds the whole model, 188 million parameters, in the precision it trains in, so 1.4 GB in float32. Found: 0.64
and 2.25 GB, about what two copies of the whole model take, the Trainer's and one in DeepSpeed's own files.
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
    """Bytes and seconds of our checkpoints."""
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
    """Bytes and seconds of the Trainer's checkpoints."""
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
    """The command line."""
    parser = argparse.ArgumentParser(description="Size and seconds of a checkpoint beside the Trainer's.")
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
        places = {name: work / name for name in ("ours", "trainer")}
        for place in places.values():
            place.mkdir()
        found = {
            "ours": ours(options, model, data, places["ours"], device),
            "Trainer": trainer(options, model, data, places["trainer"], device),
        }
    on = machine(*PACKAGES, gpu=device == "cuda")
    say(f"{on}. {options.shape} with {options.new_layers} new layers, {options.precision}, ZeRO 2.", "")
    say(row("a checkpoint", "GB", "seconds"), row("---", "---", "---"))
    for name, numbers in found.items():
        say(row(name, f"{numbers['bytes'] / 1e9:.2f}", f"{numbers['seconds'] / numbers['saved']:.1f}"))


if __name__ == "__main__":
    main()
