"""Time to tokenize a gigabyte of text: the complete stage compared with the tokenizers library alone.

    python -m scripts.benchmarks.tokenization [--megabytes 1000] [--cores 2] [--output-dir outputs]

The text is CPython's documentation, repeated with rotated paragraphs and a distinct first line for each document, so
that no two documents are equal. For the library, only its calls are timed (``encode_batch_fast`` with one thread per
core, without reading or writing). The stage is timed from the start to the end of its process: reading JSON, hashing,
encoding, packing and writing. Both use the same cores. Memory is what only these processes use (RssAnon + RssShmem),
summed over them and read from outside.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.data import python_docs
from pipeline.launch.machine import usable_cores
from scripts.benchmarks.machine import machine
from scripts.benchmarks.processes import run_module
from scripts.benchmarks.tasks import corpus_settings, run_stage, stage_task, text_files

BATCH_DOCUMENTS = 256
MEGABYTE = 10**6
GIBIBYTE = 2**30

LIBRARY_ALONE = f"""
import itertools, json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
seconds = 0.0
with open(sys.argv[2]) as lines:
    while batch := [json.loads(line)["text"] for line in itertools.islice(lines, {BATCH_DOCUMENTS})]:
        started = time.perf_counter()
        tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        seconds += time.perf_counter() - started
print(seconds)
"""


def main() -> None:
    """Writes the text, times both and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--cores", type=int, default=usable_cores())
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs"), help="where the quickstart's model is, or is created"
    )
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    with tempfile.TemporaryDirectory() as directory:
        model = load_model(options.output_dir.absolute(), Path(directory, "load.log"))
        corpus = Path(directory, "corpus.jsonl")
        size = write_corpus(corpus, options.megabytes * MEGABYTE)
        alone = time_library(model, corpus)
        seconds, peak, tokens = time_stage(model, corpus, Path(directory))
    print_table(size, tokens, alone, seconds, peak)


def load_model(output_dir: Path, log: Path) -> Path:
    """Returns the quickstart's model, of which only the tokenizer is used."""
    run_module("pipeline", "+experiment=quickstart", "stages=[load]", f"output_dir={output_dir}", log=log)
    return output_dir / "quickstart" / "load"


def write_corpus(path: Path, size: int) -> int:
    """Writes JSON lines with at least ``size`` bytes of text, and returns the number of bytes."""
    written = 0
    with open(path, "w") as stream:
        for text in documents():
            stream.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= size:
                break
    return written


def documents() -> Iterator[str]:
    """Yields different documents indefinitely."""
    originals = [*python_docs.documents(held_out=False), *python_docs.documents(held_out=True)]
    paragraphs = [text.split("\n\n") for text in originals]
    for turn in itertools.count():
        for parts in paragraphs:
            cut = turn % len(parts)
            yield "\n\n".join([f"Revision {turn}.", *parts[cut:], *parts[:cut]])


def time_library(model: Path, corpus: Path) -> float:
    """Returns the seconds spent in the library's calls."""
    command = [sys.executable, "-c", LIBRARY_ALONE, str(model / "tokenizer.json"), str(corpus)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def time_stage(model: Path, corpus: Path, directory: Path) -> tuple[float, int, int]:
    """Returns the seconds, the peak memory in bytes and the tokens of the complete stage."""
    settings = corpus_settings([text_files(str(corpus))], sequence_length=2048, held_out_fraction=0.001)
    out = directory / "out"
    out.mkdir()
    task = stage_task("tokenize/corpus", settings, {"load": model}, out)
    started = time.perf_counter()
    peak, metrics = run_stage(task, directory, timeout=7200.0)
    seconds = time.perf_counter() - started
    return seconds, peak.host, sum(metrics["tokens"].values())


def print_table(size: int, tokens: int, alone: float, stage: float, peak: int) -> None:
    """Prints a Markdown table."""
    print(f"{size / MEGABYTE:,.0f} MB of text, {tokens:,} tokens; {machine('tokenizers')}\n")
    print("| | seconds | MB/s | relative to the library | memory, GiB |\n|---|---:|---:|---:|---:|")
    print(f"| tokenizers library alone, `encode_batch_fast` | {alone:.1f} | {size / alone / MEGABYTE:.2f} | 1.00 | |")
    print(
        f"| complete tokenize stage | {stage:.1f} | {size / stage / MEGABYTE:.2f} | {stage / alone:.2f} "
        f"| {peak / GIBIBYTE:.2f} |"
    )


if __name__ == "__main__":
    main()
