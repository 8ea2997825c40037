"""Continual pre-training: tokens a second, memory and FLOPs utilisation beside transformers' Trainer under DeepSpeed.

    python -m scripts.benchmarks.pretrain                          # SmolLM2 30 -> 45 on this machine, in bfloat16
    python -m scripts.benchmarks.pretrain --precision float32
    python -m scripts.benchmarks.pretrain --tables position settings profile
    python -m scripts.benchmarks.pretrain --shape llama-3.2-1b --new-layers 8 --sequence-length 2048 \\
        --global-batch 32 --micro-batches 2 4 8 16 --our-micro-batch 16 --steps 5  # one GPU

Both contenders train the same expanded model, the same new layers, in the same precision, at the same ZeRO stage,
sequence length and global batch, on the same random tokens (one document a block unless --document-tokens). Each
run is a process of its own; a search finds the Trainer's fastest micro-batch first, then the two take turns. A
step's seconds are the median over all but the first step of all turns; what our first step takes beyond that is
compilation, stated apart. Memory is read from outside: RssAnon + RssShmem of the processes, and what the GPU's driver
reports. FLOPs are those that this training needs (``pipeline/training/flops.py``), and utilisation is their rate over
the best of several square matrix products, measured here in bfloat16 and, on a CPU, in float32 too. Where that says
that bfloat16 is the slower one, our worker multiplies bfloat16 operands by the float32 units (``float32_products``).

Expected on two quiet CPU cores whose float32 products are 1.8 times as fast as their bfloat16 ones, before it was run
there: in float32 60 to 75 % of the matrix rate and 1.1 to 1.25 times the Trainer's tokens a second, in bfloat16, whose
products run at half the speed of ours, 1.3 to 1.6 times. Found where they were 2.2 times as fast: 69 % and 1.10 times;
2.03 times. Top placement needs 0.87 of the FLOPs that bottom placement needs (15 of its 45 layers are only run
forwards), and about that share of its seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median

from pipeline.files import read_json
from pipeline.launch.machine import detect_machine
from scripts.benchmarks.machine import machine
from scripts.benchmarks.processes import run_module
from scripts.benchmarks.runs import Bench, Run
from scripts.benchmarks.shapes import SHAPES

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")  # whose versions matter
TABLES = ("trainer", "position", "settings", "profile")
POSITIONS = ("top", "middle", "interleaved", "bottom")


def say(*lines: str) -> None:
    """Prints at once: a run takes minutes."""
    print(*lines, sep="\n", flush=True)


def row(*cells: str) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def compare(bench: Bench, rates: dict[str, float]) -> None:
    """Our worker beside the Trainer at its fastest micro-batch."""
    options = bench.options
    search = {size: seconds for size in options.micro_batches if (seconds := searched(bench, size)) is not None}
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


def searched(bench: Bench, size: int) -> float | None:
    """The Trainer's seconds a step at a micro-batch; None where it does not fit into the memory."""
    try:
        return median(bench.trainer(size, 1).settled)
    except RuntimeError as failure:
        if "out of memory" not in str(failure).lower():
            raise
        say(f"The Trainer's micro-batch of {size} does not fit.")
        return None


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


def by_setting(bench: Bench, rates: dict[str, float]) -> None:
    """What compiling and activation checkpointing cost and bring, each alone and both."""
    say("", row("compile", "activation checkpointing", "s a step", "first step, s more", "peak memory, GiB"))
    say(row(*["---"] * 5))
    for compiled, checkpointed in product((False, True), repeat=2):
        run = bench.ours(bench.options.position, cold=True, compile=compiled, activation_checkpointing=checkpointed)
        seconds = median(run.settled)
        first = f"{run.seconds[0] - seconds:.0f}"
        say(row(f"{compiled}", f"{checkpointed}", f"{seconds:.2f}", first, memory([run])))


def by_part(bench: Bench, rates: dict[str, float]) -> None:
    """Where one of our steps goes."""
    total, seconds = bench.profile()
    say("", row("part of our step", "s", "share"), row(*["---"] * 3))
    for part, value in {**seconds, "outside of operations": total - sum(seconds.values()), "the step": total}.items():
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
    add = parser.add_argument
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
    add("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of both contenders")
    add("--zero-stage", type=int, choices=range(4), default=2)
    add("--attention", default="auto")
    add("--float32-products", action=argparse.BooleanOptionalAction, help="default: where float32 is measured faster")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--activation-checkpointing", action=argparse.BooleanOptionalAction, default=False)
    options = parser.parse_args(arguments)
    for size in (options.our_micro_batch, *options.micro_batches):
        if options.global_batch % size:
            parser.error(f"a micro-batch of {size} does not divide the global batch of {options.global_batch}")
    return options


def introduce(options: argparse.Namespace, device: str, rates: dict[str, float]) -> None:
    """Says what is measured, and on what."""
    on = machine(*PACKAGES, gpu=device == "cuda")
    rates_named = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())
    say(
        f"`{' '.join(['python -m scripts.benchmarks.pretrain', *sys.argv[1:]])}`",
        "",
        f"{on}. {options.shape} with {options.new_layers} new layers ({options.position}), "
        f"{options.global_batch} x {options.sequence_length} tokens a step, {options.precision}, "
        f"ZeRO {options.zero_stage}; ours with compile={options.compile}, float32_products={options.float32_products}. "
        f"Measured matrix rates: {rates_named}.",
    )


def main() -> None:
    """Prints the tables that were asked for."""
    options = parse()
    device = "cuda" if detect_machine().gpus else "cpu"
    with tempfile.TemporaryDirectory(prefix="pretrain-benchmark-") as folder:
        work = Path(folder)
        rates = measure_rates(work, device)
        if options.float32_products is None:
            slow_bfloat16 = device == "cpu" and rates["float32"] > rates["bfloat16"]
            options.float32_products = options.precision == "bfloat16" and slow_bfloat16
        if device == "cuda":
            rates = {name: rates[name] for name in dict.fromkeys(("bfloat16", options.precision))}
        introduce(options, device, rates)
        bench = Bench(options, work, device)
        tables = {"trainer": compare, "position": by_position, "settings": by_setting, "profile": by_part}
        for name in options.tables:
            tables[name](bench, rates)


if __name__ == "__main__":
    main()
