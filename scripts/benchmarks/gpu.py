"""Everything that is measured on one GPU, in less than ten minutes: python -m scripts.benchmarks.gpu OUT

    python -m scripts.benchmarks.gpu OUT                        # an H200 or H100 with 80 GB
    python -m scripts.benchmarks.gpu OUT --steps numbers 1b     # only these steps
    python -m scripts.benchmarks.gpu OUT --device cpu           # tiny shapes, to check that all steps run

Each step is a process with a time limit, and a step that fails does not end the others. The most important ones come
first. ``OUT/gpu.md`` has the tables as Markdown, ``OUT/gpu.json`` the same as JSON, and ``OUT/gpu.log`` what the steps
wrote to stderr. All are written after every step. ``scripts/benchmarks/wheels`` prepares the packages for a machine
without a network.

Expected on one H200 before the first run, by calculation with 680 TFLOP/s of matrix products and 2.8 TB/s: 8B 32 -> 48
with documents of 512 tokens in blocks of 2,048 trains at 29 to 32 % MFU with a mask, 35 % by document, and 45 %
compiled. The peak memory is within 15 % of the plan. 1B 16 -> 24 is at least 1.3 times as fast as the Trainer. Losses
in float32 equal those of the CPU to 1e-4, and those in bfloat16 to 1e-2. A resumed run has the same bits only if
no kernel adds in an order that depends on timing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks.machine import machine

REPOSITORY = Path(__file__).resolve().parents[2]
LAST_LINES = 15  # of a failed step's log that the table shows


@dataclass(frozen=True)
class Step:
    """One measurement: a module of ``scripts.benchmarks`` that prints Markdown."""

    name: str
    title: str
    seconds: float  # time limit
    module: str
    arguments: str


PACKED = "--sequence-length 2048 --document-tokens 512"
ON_GPU = (
    Step(
        "8b", "Training 8B, 32 to 48 layers", 190, "pretrain",
        f"--tables attention --shape llama-3-8b --new-layers 16 --position interleaved {PACKED} --global-batch 8 "
        "--our-micro-batch 4 --micro-batches 4 --steps 3 --activation-checkpointing",
    ),
    Step("numbers", "Losses, resuming and attention compared with the CPU", 90, "gpu_checks", "cuda"),
    Step(
        "1b", "Training 1B, 16 to 24 layers, compared with the Trainer", 130, "pretrain",
        f"--tables trainer attention --shape llama-3.2-1b --new-layers 8 --position interleaved {PACKED} "
        "--global-batch 32 --our-micro-batch 16 --micro-batches 16 --steps 3 --repeats 1",
    ),
    Step("loss", "The loss by rows per chunk", 30, "gpu_loss", "cuda --hidden 4096 --vocabulary 128256 --tokens 8192"),
    Step(
        "algebra", "Linear algebra of expansion methods", 60, "gpu_algebra",
        "cuda --layers 8 --shape 14336 4096 --transport 14336",
    ),
    Step(
        "checkpoint", "Checkpoints of 1B", 60, "checkpoint",
        "--shape llama-3.2-1b --new-layers 8 --precision bfloat16 --steps 2",
    ),
)  # fmt: skip
TINY = "--shape tiny --new-layers 2 --sequence-length 64 --document-tokens 16 --global-batch 4 --steps 2"
ON_CPU = (
    Step(
        "tiny", "Training a tiny model, compared with the Trainer", 480, "pretrain",
        f"--tables trainer attention {TINY} --our-micro-batch 4 --micro-batches 4 --repeats 1 --no-compile",
    ),
    Step("numbers", "Losses, resuming and attention", 480, "gpu_checks", "cpu"),
    Step("loss", "The loss by rows per chunk", 240, "gpu_loss", "cpu --hidden 64 --vocabulary 1000 --tokens 64"),
    Step(
        "algebra", "Linear algebra of expansion methods", 240, "gpu_algebra",
        "cpu --layers 4 --shape 96 32 --transport 64",
    ),
    Step("checkpoint", "Checkpoints of a tiny model", 480, "checkpoint", "--shape tiny --new-layers 2 --steps 1"),
)  # fmt: skip


def run_step(step: Step, device: str, log: Path) -> dict[str, Any]:
    """Runs one step. Returns its outcome, its seconds, and what it printed."""
    command = [sys.executable, "-m", f"scripts.benchmarks.{step.module}", *step.arguments.split()]
    started = time.monotonic()
    with open(log, "ab") as stream:
        stream.write(f"==== {step.name}: {' '.join(command[2:])}\n".encode())
        stream.flush()
        begin = stream.tell()
        # A session of its own, so that all processes of the step can be killed together.
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, "DS_ACCELERATOR": device}, stdout=subprocess.PIPE,
            stderr=stream, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=step.seconds)
            outcome = "done" if process.returncode == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            outcome = f"stopped after its limit of {step.seconds:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    text = output.decode(errors="replace")
    failure = "" if outcome == "done" else "\n".join(_text_from(log, begin).splitlines()[-LAST_LINES:])
    return {
        "step": step.name, "title": step.title, "outcome": outcome, "seconds": round(time.monotonic() - started, 1),
        "command": " ".join(command[2:]), "text": text, "tables": tables_in(text), "failure": failure,
    }  # fmt: skip


def _text_from(log: Path, begin: int) -> str:
    with open(log, "rb") as stream:
        stream.seek(begin)
        return stream.read().decode(errors="replace")


def tables_in(text: str) -> list[list[dict[str, str]]]:
    """Returns the rows of every Markdown table in a text, by the names of the columns."""
    tables: list[list[dict[str, str]]] = []
    heads: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            heads = []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not heads:
            heads = cells
            tables.append([])
        elif set(line) - set("|-: "):  # not the line below the heads
            tables[-1].append(dict(zip(heads, cells, strict=True)))
    return tables


def write(results: Sequence[dict[str, Any]], out: Path, where: str) -> None:
    """Writes ``gpu.md`` and ``gpu.json``."""
    blocks = [f"# One GPU\n\n{where}."]
    for result in results:
        blocks.append(f"## {result['title']}\n\n{result['outcome']} in {result['seconds']:.0f} s.\n\n{result['text']}")
        if result["failure"]:
            blocks.append(f"```\n{result['failure']}\n```")
    (out / "gpu.md").write_text("\n\n".join(blocks) + "\n")
    (out / "gpu.json").write_text(json.dumps({"machine": where, "steps": list(results)}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="All measurements on one GPU.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", nargs="+", choices=sorted({step.name for step in (*ON_GPU, *ON_CPU)}))
    options = parser.parse_args()
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("torch finds no GPU; --device cpu runs all steps with tiny shapes")
    return options


def main() -> None:
    """Runs the steps. The exit status is 1 if one of them failed."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu.log"
    log.unlink(missing_ok=True)
    steps = ON_GPU if options.device == "cuda" else ON_CPU
    where = machine("torch", "transformers", "deepspeed", gpu=options.device == "cuda")
    results: list[dict[str, Any]] = []
    for step in steps:
        if options.steps and step.name not in options.steps:
            continue
        print(f"{step.name}: at most {step.seconds:.0f} s", flush=True)
        results.append(run_step(step, options.device, log))
        print(f"{step.name}: {results[-1]['outcome']} in {results[-1]['seconds']:.0f} s", flush=True)
        write(results, options.out, where)
    sys.exit(any(result["outcome"] != "done" for result in results))


if __name__ == "__main__":
    main()
