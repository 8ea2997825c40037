"""Continual pre-training: tokens per second, memory and MFU, compared with transformers' Trainer and DeepSpeed.

    python -m scripts.benchmarks.pretrain                          # SmolLM2 30 -> 45 on this machine, in bfloat16
    python -m scripts.benchmarks.pretrain --precision float32
    python -m scripts.benchmarks.pretrain --tables position settings profile
    python -m scripts.benchmarks.pretrain --shape llama-3.2-1b --new-layers 8 --sequence-length 2048 \\
        --global-batch 32 --micro-batches 2 4 8 16 --our-micro-batch 16 --steps 5  # one GPU

Both train the same new layers of the same expanded model, in the same precision, at the same ZeRO stage, sequence
length and global batch, on the same random tokens, in documents of 512 (--document-tokens). Each run
is a separate process. A search first finds the Trainer's fastest micro-batch, then the two alternate. The time per step
is the median over all steps of all runs except the first step of each. The extra time of our first step is compilation,
which is reported separately. Memory is read from outside: RssAnon + RssShmem of the processes, and the GPU memory that
the driver reports. FLOPs are those that this training requires (``pipeline/training/flops.py``). The MFU relates their
rate to the best of several square matrix products, measured here in bfloat16 and, on a CPU, also in float32. Where
bfloat16 is slower than float32, our worker multiplies bfloat16 operands in float32 (``float32_products``).

Expected before the first run on two idle CPU cores whose float32 products are 1.8 times as fast as their bfloat16
products: in float32, 60 to 75 % of the matrix rate and 1.1 to 1.25 times the Trainer's tokens per second; in bfloat16,
whose products run at half the speed of ours, 1.3 to 1.6 times. Measured where they were 2.2 times as fast: 69 % and
1.10 times; 2.03 times. New layers at the top need 0.87 of the FLOPs of new layers at the bottom (15 of the 45 layers
only run forward), and about that fraction of the time. Idle threads that spin (``--tables wait-policy``) were expected
to make a step up to 8 % faster on an idle machine and at least 1.5 times slower beside one busy core. Measured with
short steps: 16 to 30 % faster, and 5.8 times slower. Steps that keep freed memory (``--tables freed-memory``) were
expected to take a quarter less time in bfloat16 than steps that return it to the kernel, whose pages it clears each
time. Measured with small batches: 14 % less.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median

from pipeline.files import read_json
from pipeline.launch.machine import detect_machine
from scripts.benchmarks.machine import machine
from scripts.benchmarks.processes import run_module
from scripts.benchmarks.runs import Bench, Run
from scripts.benchmarks.shapes import SHAPES

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")  # whose versions are printed
TABLES = ("trainer", "attention", "position", "settings", "profile", "wait-policy", "freed-memory")
POSITIONS = ("top", "middle", "interleaved", "bottom")
# The thresholds that glibc's malloc reaches by itself once large blocks have been freed, in bytes.
GLIBC_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}


def say(*lines: str) -> None:
    """Prints lines immediately, since a run takes minutes."""
    print(*lines, sep="\n", flush=True)


def row(*cells: str) -> str:
    """Returns a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def spread(seconds: Sequence[float]) -> str:
    """Returns the median and the range."""
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def compare(bench: Bench, rates: dict[str, float]) -> None:
    """Compares our worker with the Trainer at its fastest micro-batch."""
    options = bench.options
    search = {size: step for size in options.micro_batches if (step := try_micro_batch(bench, size)) is not None}
    best = min(search, key=lambda size: search[size])
    tried = ", ".join(f"{size}: {bench.tokens / seconds:.0f}" for size, seconds in search.items())
    say(f"\nTrainer's tokens/s by micro-batch, one step each: {tried}. Used: {best}.")
    runs: dict[str, list[Run]] = {"ours": [], "Trainer": []}
    for _ in range(options.repeats):
        runs["ours"].append(bench.ours(options.position))
        runs["Trainer"].append(bench.trainer(best, options.steps))
    flops = runs["ours"][0].flops_per_step
    rates_named = [f"of {name} matrix rate" for name in rates]
    say(
        "",
        row("", "micro-batch", "s per step", "tokens/s", *rates_named, "peak memory, GiB"),
        row(*["---"] * (5 + len(rates))),
    )
    speeds = {}
    for name, size in (("ours", options.our_micro_batch), ("Trainer", best)):
        seconds = [value for run in runs[name] for value in run.warm]
        middle = median(seconds)
        speeds[name] = bench.tokens / middle
        shares = [f"{flops / middle / rate:.1%}" for rate in rates.values()]
        say(row(name, str(size), spread(seconds), f"{speeds[name]:.1f}", *shares, memory(runs[name])))
    say(f"\nours / Trainer: {speeds['ours'] / speeds['Trainer']:.2f} in tokens/s. {compilation(runs['ours'])}")


def try_micro_batch(bench: Bench, size: int) -> float | None:
    """Returns the Trainer's seconds per step at a micro-batch, or None if memory does not suffice."""
    try:
        return median(bench.trainer(size, 1).warm)
    except RuntimeError as failure:
        if "out of memory" not in str(failure).lower():
            raise
        say(f"The Trainer's micro-batch of {size} does not fit.")
        return None


def memory(runs: Sequence[Run]) -> str:
    """Returns the largest peak memory of several runs."""
    host, gpu = (max(peaks) / 2**30 for peaks in zip(*((run.peak.host, run.peak.gpu) for run in runs), strict=True))
    return f"{host:.2f}" if gpu == 0 else f"{gpu:.1f} on the GPU, {host:.1f} on the host"


def compilation(runs: Sequence[Run]) -> str:
    """Describes the extra time of first steps, with an empty and with a filled compilation cache."""
    extra = [run.seconds[0] - median(run.warm) for run in runs]
    return f"Our first step takes {extra[0]:.0f} s longer (compilation), {extra[-1]:.0f} s in the last run."


def by_attention(bench: Bench, rates: dict[str, float]) -> None:
    """Measures attention with a mask and by document, and the peak memory compared with the plan's estimate."""
    rate = rates[bench.options.precision]
    say("", row("attention", "compile", "s per step", "tokens/s", "MFU", "peak memory, GiB", "planned, GiB"))
    say(row(*["---"] * 7))
    for attention, compiled in (("documents", True), ("sdpa", False), ("documents", False)):
        if compiled and not bench.options.compile:
            continue
        changes = {"attention": attention, "compile": compiled}
        run = bench.ours(bench.options.position, **changes)
        seconds = median(run.warm)
        speed, mfu = f"{bench.tokens / seconds:.0f}", f"{run.flops_per_step / seconds / rate:.1%}"
        planned = f"{bench.planned_memory(bench.options.position, **changes) / 2**30:.1f}"
        say(row(attention, f"{compiled}", f"{seconds:.2f}", speed, mfu, memory([run]), planned))


def by_position(bench: Bench, rates: dict[str, float]) -> None:
    """Measures the time per step for each position of the new layers."""
    say(
        "",
        row("new layers", "lowest", "s per step", "tokens/s", "TFLOP per step", "peak memory, GiB"),
        row(*["---"] * 6),
    )
    for position in POSITIONS:
        run = bench.ours(position)
        layers = read_json(bench.model(position) / "expansion.json")["layers"]
        lowest = next(entry["layer"] for entry in layers if entry["new"])
        seconds = median(run.warm)
        speed = f"{bench.tokens / seconds:.1f}"
        say(row(position, str(lowest), f"{seconds:.2f}", speed, f"{run.flops_per_step / 1e12:.2f}", memory([run])))


def by_setting(bench: Bench, rates: dict[str, float]) -> None:
    """Measures the effects of compilation and activation checkpointing, separately and together."""
    say("", row("compile", "activation checkpointing", "s per step", "extra s in the first step", "peak memory, GiB"))
    say(row(*["---"] * 5))
    for compiled, checkpointed in product((False, True), repeat=2):
        run = bench.ours(bench.options.position, cold=True, compile=compiled, activation_checkpointing=checkpointed)
        seconds = median(run.warm)
        first = f"{run.seconds[0] - seconds:.0f}"
        say(row(f"{compiled}", f"{checkpointed}", f"{seconds:.2f}", first, memory([run])))


def by_part(bench: Bench, rates: dict[str, float]) -> None:
    """Divides the time of one of our steps between its parts."""
    total, seconds = bench.profile()
    say("", row("part of our step", "s", "share"), row(*["---"] * 3))
    for part, value in {**seconds, "outside operations": total - sum(seconds.values()), "the step": total}.items():
        say(row(part, f"{value:.2f}", f"{value / total:.1%}"))


def by_wait_policy(bench: Bench, rates: dict[str, float]) -> None:
    """Measures steps whose idle threads sleep or spin, alone and beside programs that keep one core busy."""
    say("", row("idle threads", "other busy cores", "s per step"), row(*["---"] * 3))
    for busy, policy in product((0, 1), ("passive", "active")):
        with _busy_cores(busy):
            runs = [bench.ours(bench.options.position, wait_policy=policy) for _ in range(bench.options.repeats)]
        seconds = [value for run in runs for value in run.warm]
        say(row(policy, str(busy), spread(seconds)))


def by_freed_memory(bench: Bench, rates: dict[str, float]) -> None:
    """Measures steps that keep freed memory, as ours do on CPUs, and that return it to the kernel as glibc does."""
    say("", row("freed memory", "s per step", "peak memory, GiB"), row(*["---"] * 3))
    runs: dict[str, list[Run]] = {"returned to the kernel": [], "kept": []}
    for _ in range(bench.options.repeats):
        runs["returned to the kernel"].append(bench.ours(bench.options.position, variables=GLIBC_THRESHOLDS))
        runs["kept"].append(bench.ours(bench.options.position))
    for name, found in runs.items():
        say(row(name, spread([value for run in found for value in run.warm]), memory(found)))


@contextmanager
def _busy_cores(count: int) -> Iterator[None]:
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


# --------------------------------------------------------------------------------------------- main


def measure_rates(work: Path, device: str, shape: str) -> dict[str, float]:
    """Returns the best rate of matrix products in FLOP/s, by precision, measured in a separate process."""
    size = ["256"] if shape == "tiny" else []  # which only checks that the program runs
    run_module("scripts.benchmarks.matrix_rate", device, str(work / "rates.json"), *size, log=work / "rates.log")
    rates: dict[str, float] = read_json(work / "rates.json")
    return rates


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Continual pre-training, compared with transformers' Trainer.")
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=["trainer"])
    add("--shape", choices=SHAPES, default="smollm2")
    add("--new-layers", type=int, default=15)
    add("--position", default="top", choices=POSITIONS)
    add("--sequence-length", type=int, default=512)
    add("--document-tokens", type=int, default=512, help="tokens per document; 0: one document per block")
    add("--global-batch", type=int, default=8)
    add("--our-micro-batch", type=int, default=8)
    add("--micro-batches", type=int, nargs="+", default=[2, 4, 8], help="tried for the Trainer")
    add("--steps", type=int, default=2, help="measured steps per run, after the first")
    add("--repeats", type=int, default=2)
    add("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of both")
    add("--zero-stage", type=int, choices=range(4), default=2)
    add("--attention", default="auto")
    add(
        "--float32-products", action=argparse.BooleanOptionalAction, help="default: if float32 is measured to be faster"
    )
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--activation-checkpointing", action=argparse.BooleanOptionalAction, default=False)
    options = parser.parse_args(arguments)
    for size in (options.our_micro_batch, *(options.micro_batches if "trainer" in options.tables else ())):
        if options.global_batch % size:
            parser.error(f"a micro-batch of {size} does not divide the global batch of {options.global_batch}")
    return options


def introduce(options: argparse.Namespace, device: str, rates: dict[str, float]) -> None:
    """Prints what is measured, and on which machine."""
    on = machine(*PACKAGES, gpu=device == "cuda")
    rates_named = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())
    say(
        f"`{' '.join(['python -m scripts.benchmarks.pretrain', *sys.argv[1:]])}`",
        "",
        f"{on}. {options.shape} with {options.new_layers} new layers ({options.position}), "
        f"{options.global_batch} x {options.sequence_length} tokens per step, {options.precision}, "
        f"ZeRO {options.zero_stage}; ours with compile={options.compile}, float32_products={options.float32_products}. "
        f"Measured matrix rates: {rates_named}.",
    )


def main() -> None:
    """Prints the requested tables."""
    options = parse()
    device = "cuda" if detect_machine().gpus else "cpu"
    with tempfile.TemporaryDirectory(prefix="pretrain-benchmark-") as folder:
        work = Path(folder)
        rates = measure_rates(work, device, options.shape)
        if options.float32_products is None:
            slow_bfloat16 = device == "cpu" and rates["float32"] > rates["bfloat16"]
            options.float32_products = options.precision == "bfloat16" and slow_bfloat16
        if device == "cuda":
            rates = {name: rates[name] for name in dict.fromkeys(("bfloat16", options.precision))}
        introduce(options, device, rates)
        bench = Bench(options, work, device)
        tables = {
            "trainer": compare, "attention": by_attention, "position": by_position, "settings": by_setting,
            "profile": by_part, "wait-policy": by_wait_policy, "freed-memory": by_freed_memory,
        }  # fmt: skip
        for name in options.tables:
            tables[name](bench, rates)


if __name__ == "__main__":
    main()
