"""Continual pre-training: tokens a second, memory and FLOPs utilisation beside transformers' Trainer under DeepSpeed.

    python -m scripts.benchmarks.pretrain                                          # SmolLM2 30 -> 45, this machine
    python -m scripts.benchmarks.pretrain --tables position profile
    python -m scripts.benchmarks.pretrain --shape llama-3.2-1b --new-layers 8 --sequence-length 2048 \\
        --global-batch 32 --micro-batches 2 4 8 16 --our-micro-batch 16 --steps 5  # one GPU

Both contenders train the same expanded model, the same new layers, in the same precision, at the same ZeRO stage,
sequence length and global batch, on the same random tokens (one document a block unless --document-tokens). Each
run is a process of its own; a search finds the Trainer's fastest micro-batch first, then the two take turns. A
step's seconds are the median over all but the first step of all turns; what our first step takes beyond that is
compilation, stated apart. Memory is read from outside: RssAnon + RssShmem of the processes, and what the GPU's driver
reports. FLOPs are those that this training needs (``pipeline/training/flops.py``), and utilisation is their rate over
the best of several square matrix products, measured here in bfloat16 and in the precision used.

Expected on two quiet CPU cores in float32, before it was run there: matrix products take 70 % of our step and
attention 17 %; the Trainer spends 10 to 15 % more on unfused small operations and on the logits of the whole batch. So
1.15 to 1.3 times its tokens a second, in half its memory or less, at 60 to 75 % of the float32 matrix rate; top
placement takes about 0.6 of the seconds that bottom placement takes. The whole of it fits in eight minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from pipeline.artifact import read_json, write_json
from pipeline.config import Train
from pipeline.launch import detect_machine
from pipeline.stage import task_to_json
from scripts.benchmarks.hf_trainer import SECONDS_FILE
from scripts.benchmarks.models import CONF, SHAPES, stage_task
from scripts.benchmarks.our_worker import PROFILE_FILE
from scripts.benchmarks.processes import Peak, run_module

TABLES = ("trainer", "position", "profile")
POSITIONS = ("top", "middle", "interleaved", "bottom")


@dataclass(frozen=True)
class Run:
    """One process's steps."""

    seconds: list[float]  # of every step, the first included
    flops_a_step: int  # 0 where the contender does not count
    peak: Peak

    @property
    def settled(self) -> list[float]:
        """Without the first step, which compiles and fills caches."""
        return self.seconds[1:]


class Bench:
    """The runs on one model in one working directory."""

    def __init__(self, options: argparse.Namespace, work: Path, device: str, precision: str) -> None:
        self.options, self.work, self.device, self.precision = options, work, device, precision
        self._number = 0
        self.data = write_blocks(work / "data", options)

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return int(self.options.global_batch * self.options.sequence_length)

    def model(self, position: str) -> Path:
        """The expanded model with new layers there, made when it is first asked for."""
        options = self.options
        out = self.work / f"model-{position}"
        if not (out / "expansion.json").exists():
            dtype = "float32" if options.shape == "smollm2" else "bfloat16"
            arguments = (options.shape, str(options.new_layers), position, dtype, str(out))
            run_module("scripts.benchmarks.models", *arguments, log=self.work / "models.log")
        return out

    def ours(self, position: str, profile: bool = False) -> Run:
        """Our worker until it logged enough steps; or to the end of a profile."""
        out = self._new_directory("ours")
        task = stage_task("pretrain", self._settings(), {"model": self.model(position), "data": self.data}, out)
        write_json(out / "task.json", task_to_json(task))
        wanted = self.options.steps + 1
        peak = run_module(
            "scripts.benchmarks.our_worker", str(out / "task.json"), *(["profile"] if profile else []),
            log=out / "log", until=None if profile else lambda: len(logged(out)) >= wanted,
        )  # fmt: skip
        lines = logged(out)[:wanted]
        totals = [0.0, *(line["seconds"] for line in lines)]
        seconds = [later - before for before, later in pairwise(totals)]
        return Run(seconds, lines[0]["flops"], peak)

    def profile(self) -> dict[str, float]:
        """Seconds of one of our steps by part."""
        self.ours(self.options.position, profile=True)
        seconds: dict[str, float] = read_json(self._directory("ours") / PROFILE_FILE)
        return seconds

    def trainer(self, micro_batch: int, steps: int) -> Run:
        """The Trainer for so many settled steps."""
        options, out = self.options, self._new_directory("trainer")
        job = {
            "model": str(self.model(options.position)), "data": str(self.data), "out": str(out),
            "device": self.device, "precision": self.precision, "zero_stage": options.zero_stage,
            "global_batch": options.global_batch, "micro_batch": micro_batch, "steps": steps + 1,
            "activation_checkpointing": options.activation_checkpointing,
        }  # fmt: skip
        write_json(out / "job.json", job)
        peak = run_module("scripts.benchmarks.hf_trainer", str(out / "job.json"), log=out / "log")
        return Run(read_json(out / SECONDS_FILE), 0, peak)

    def _settings(self) -> Train:
        options = self.options
        values = yaml.safe_load((CONF / "pretrain" / "default.yaml").read_text())
        values |= {
            "sequence_length": options.sequence_length, "global_batch": options.global_batch, "steps": 1000,
            "micro_batch": options.our_micro_batch, "precision": self.precision, "evaluate_at": [],
            "checkpoint_every_steps": 1000, "activation_checkpointing": options.activation_checkpointing,
            "compile": options.compile, "attention": options.attention,
        }  # fmt: skip
        values["deepspeed"] |= {"zero_stage": options.zero_stage}
        return Train.model_validate_json(json.dumps(values))

    def _directory(self, contender: str) -> Path:
        return self.work / f"{self._number:02d}-{contender}"

    def _new_directory(self, contender: str) -> Path:
        self._number += 1
        self._directory(contender).mkdir()
        return self._directory(contender)


def logged(out: Path) -> list[dict[str, Any]]:
    """The steps in a running task's metrics."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if '"loss"' in line]


def write_blocks(directory: Path, options: argparse.Namespace) -> Path:
    """Random tokens as a tokenize artifact, enough for every step of one run."""
    directory.mkdir()
    blocks, length = options.global_batch * (options.steps + 1), options.sequence_length
    positions = np.tile(np.arange(length) % (options.document_tokens or length), (blocks, 1))
    tokens = np.random.default_rng(0).integers(0, 49152, (blocks, length))
    for split, count in (("train", blocks), ("held_out", 0)):
        for name, values, dtype in (
            ("input_ids", tokens, np.uint32), ("position_ids", positions, np.uint32),
            ("loss_mask", positions > 0, np.uint8),
        ):  # fmt: skip
            np.save(directory / f"{split}.{name}.npy", values[:count].astype(dtype), allow_pickle=False)
    sizes = {"train": blocks, "held_out": 0}
    dataset = {
        "purpose": "corpus", "sequence_length": length, "vocab_size": 49152, "blocks": sizes, "documents": sizes,
        "tokens": sizes, "supervised_tokens": {"train": int((positions > 0).sum()), "held_out": 0}, "dropped": {},
    }  # fmt: skip
    write_json(directory / "dataset.json", dataset)
    return directory


# ------------------------------------------------------------------------------------------- tables


def say(*lines: str) -> None:
    """Prints at once: a run takes minutes."""
    print(*lines, sep="\n", flush=True)


def row(*cells: str) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def compare(bench: Bench, rates: dict[str, float]) -> None:
    """Our worker beside the Trainer at its fastest micro-batch."""
    options = bench.options
    search = {size: median(bench.trainer(size, 1).settled) for size in options.micro_batches}
    best = min(search, key=lambda size: search[size])
    tried = ", ".join(f"{size}: {bench.tokens / seconds:.0f}" for size, seconds in search.items())
    say(f"\nTrainer's tokens/s by micro-batch, one step each: {tried}; {best} is used.")
    runs: dict[str, list[Run]] = {"ours": [], "Trainer": []}
    for _ in range(options.repeats):
        runs["ours"].append(bench.ours(options.position))
        runs["Trainer"].append(bench.trainer(best, options.steps))
    flops = runs["ours"][0].flops_a_step
    rates_named = [f"of {name} matrix rate" for name in rates]
    say(
        "",
        row("", "micro-batch", "s a step", "tokens/s", *rates_named, "peak memory, GiB"),
        row(*["---"] * (5 + len(rates))),
    )
    speeds = {}
    for name, size in (("ours", options.our_micro_batch), ("Trainer", best)):
        seconds = [value for run in runs[name] for value in run.settled]
        middle = median(seconds)
        speeds[name] = bench.tokens / middle
        spread = f"{middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        shares = [f"{flops / middle / rate:.1%}" for rate in rates.values()]
        say(row(name, str(size), spread, f"{speeds[name]:.1f}", *shares, memory(runs[name])))
    say(f"\nours / Trainer: {speeds['ours'] / speeds['Trainer']:.2f} in tokens/s. {compilation(runs['ours'])}")


def memory(runs: Sequence[Run]) -> str:
    """The largest peak of several runs."""
    host, gpu = (max(peaks) / 2**30 for peaks in zip(*((run.peak.host, run.peak.gpu) for run in runs), strict=True))
    return f"{host:.2f}" if gpu == 0 else f"{gpu:.1f} on the GPU, {host:.1f} on the host"


def compilation(runs: Sequence[Run]) -> str:
    """What first steps cost beyond the others, cold and with the compiler's cache filled."""
    extra = [run.seconds[0] - median(run.settled) for run in runs]
    return f"Our first step takes {extra[0]:.0f} s longer (compilation), {extra[-1]:.0f} s in the last turn."


def by_position(bench: Bench, rates: dict[str, float]) -> None:
    """Seconds a step by where the new layers are."""
    say("", row("new layers", "lowest", "s a step", "tokens/s", "TFLOP a step", "peak memory, GiB"), row(*["---"] * 6))
    for position in POSITIONS:
        run = bench.ours(position)
        layers = read_json(bench.model(position) / "expansion.json")["layers"]
        lowest = next(entry["layer"] for entry in layers if entry["new"])
        seconds = median(run.settled)
        speed = f"{bench.tokens / seconds:.1f}"
        say(row(position, str(lowest), f"{seconds:.2f}", speed, f"{run.flops_a_step / 1e12:.2f}", memory([run])))


def by_part(bench: Bench, rates: dict[str, float]) -> None:
    """Where one of our steps goes."""
    seconds = bench.profile()
    total = sum(seconds.values())
    say("", row("part of our step", "s", "share"), row(*["---"] * 3))
    for part, value in seconds.items():
        say(row(part, f"{value:.2f}", f"{value / total:.1%}"))


# --------------------------------------------------------------------------------------------- main


def measure_rates(work: Path, device: str) -> dict[str, float]:
    """Best matrix products a second, by precision, in a process of its own."""
    run_module("scripts.benchmarks.matrix_rate", device, str(work / "rates.json"), log=work / "rates.log")
    rates: dict[str, float] = read_json(work / "rates.json")
    return rates


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Continual pre-training beside transformers' Trainer.")
    add = partial(parser.add_argument)
    add("--tables", nargs="+", choices=TABLES, default=["trainer"])
    add("--shape", choices=SHAPES, default="smollm2")
    add("--new-layers", type=int, default=15)
    add("--position", default="top", choices=POSITIONS)
    add("--sequence-length", type=int, default=512)
    add("--document-tokens", type=int, default=0, help="cut blocks into documents of so many tokens; 0: one a block")
    add("--global-batch", type=int, default=8)
    add("--our-micro-batch", type=int, default=8)
    add("--micro-batches", type=int, nargs="+", default=[2, 4, 8], help="what the Trainer's search tries")
    add("--steps", type=int, default=2, help="measured steps a run, after the first")
    add("--repeats", type=int, default=2)
    add("--precision", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: the faster one here")
    add("--zero-stage", type=int, choices=range(4), default=2)
    add("--attention", default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--activation-checkpointing", action=argparse.BooleanOptionalAction, default=False)
    return parser.parse_args(arguments)


def machine(device: str) -> str:
    """What it ran on, with versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "deepspeed"))
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.processor()
    gpu = " and a GPU," if device == "cuda" else ""
    return f"{len(os.sched_getaffinity(0))} cores of {name},{gpu} Python {platform.python_version()}, {versions}"


def introduce(options: argparse.Namespace, device: str, precision: str, rates: dict[str, float]) -> None:
    """Says what is measured, and on what."""
    rates_named = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())
    say(
        f"`{' '.join(['python -m scripts.benchmarks.pretrain', *sys.argv[1:]])}`",
        "",
        f"{machine(device)}. {options.shape} with {options.new_layers} new layers ({options.position}), "
        f"{options.global_batch} x {options.sequence_length} tokens a step, {precision}, ZeRO {options.zero_stage}, "
        f"compile={options.compile}. Measured matrix rates: {rates_named}.",
    )


def main() -> None:
    """Prints the tables that were asked for."""
    options = parse()
    device = "cuda" if detect_machine().gpus else "cpu"
    with tempfile.TemporaryDirectory(prefix="pretrain-benchmark-") as folder:
        work = Path(folder)
        rates = measure_rates(work, device)
        precision = max(rates, key=lambda name: rates[name]) if options.precision == "auto" else options.precision
        rates = {name: rates[name] for name in dict.fromkeys(("bfloat16", precision))}
        introduce(options, device, precision, rates)
        bench = Bench(options, work, device, precision)
        tables = {"trainer": compare, "position": by_position, "profile": by_part}
        for name in options.tables:
            tables[name](bench, rates)


if __name__ == "__main__":
    main()
