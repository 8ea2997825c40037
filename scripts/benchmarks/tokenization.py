"""How long a gigabyte of text takes to tokenize: the whole stage against the tokenizers library alone, same cores.

    python scripts/benchmarks/tokenization.py [--megabytes 1000] [--cores 2] [--output-dir outputs]

The text is CPython's documentation, over and over, its paragraphs in another order every time and each document with
a line of its own, so that no two are the same. The library is timed on its calls alone (``encode_batch_fast`` with a
thread a core, nothing read or written); the stage from the start of its process to its end: reading JSON, hashing,
encoding, packing, writing. Memory is what only these processes hold (RssAnon + RssShmem), summed over them, as seen
from outside ten times a second.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Launch, Source, Tokenize, Tracking
from pipeline.data import python_docs
from pipeline.data.encoders import available_cores
from pipeline.stage import StageTask, TrackingTarget, task_to_json

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 0.1
BATCH_DOCUMENTS = 256
MEGABYTE = 10**6
GIBIBYTE = 2**30
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOKENIZERS_PARALLELISM": "true"}

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
    """Makes the text, times both, prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--cores", type=int, default=available_cores())
    parser.add_argument("--output-dir", default="outputs", help="where the quickstart's model lies or is made")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    model = load_model(options.output_dir)
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place, "corpus.jsonl")
        size = write_corpus(corpus, options.megabytes * MEGABYTE)
        alone = time_library(model, corpus)
        seconds, peak, tokens = time_stage(model, corpus, Path(place))
    print_table(size, tokens, alone, seconds, peak)


def load_model(output_dir: str) -> Path:
    """The quickstart's model, of which only the tokenizer is used."""
    command = [sys.executable, "-m", "pipeline", "+experiment=quickstart", "stages=[load]", f"output_dir={output_dir}"]
    subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    return Path(output_dir, "quickstart", "load")


def write_corpus(path: Path, size: int) -> int:
    """JSON lines with so many bytes of text."""
    written = 0
    with open(path, "w") as stream:
        for text in documents():
            stream.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= size:
                break
    return written


def documents() -> Iterator[str]:
    """Without end, none twice."""
    originals = [*python_docs.documents(held_out=False), *python_docs.documents(held_out=True)]
    paragraphs = [text.split("\n\n") for text in originals]
    for turn in itertools.count():
        for parts in paragraphs:
            cut = turn % len(parts)
            yield "\n\n".join([f"Revision {turn}.", *parts[cut:], *parts[:cut]])


def time_library(model: Path, corpus: Path) -> float:
    """Seconds within the library's calls."""
    command = [sys.executable, "-c", LIBRARY_ALONE, str(model / "tokenizer.json"), str(corpus)]
    return float(subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout)


def time_stage(model: Path, corpus: Path, place: Path) -> tuple[float, int, int]:
    """Seconds, peak bytes of memory, and tokens of the whole stage."""
    outcome, job = place / "outcome.json", place / "task.json"
    job.write_text(json.dumps(task_to_json(stage_task(model, corpus, place / "out"))))
    (place / "out").mkdir()
    started = time.perf_counter()
    command = [sys.executable, "-m", "pipeline.stages", str(job), str(outcome)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(own_memory, tree(process.pid))))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - started
    metrics = json.loads(outcome.read_text())["metrics"]
    return seconds, peak, sum(metrics["tokens"].values())


def stage_task(model: Path, corpus: Path, out: Path) -> StageTask:
    """tokenize as a run of the pipeline would start it."""
    source = Source(
        kind="files", path=str(corpus), config_name=None, split=None, revision=None, text_field="text", weight=1.0
    )
    settings = Tokenize(
        purpose="corpus", sources=[source], sequence_length=2048, held_out_fraction=0.001, max_tokens=None,
        chat_template="model",
    )  # fmt: skip
    tracking = TrackingTarget(Tracking(wandb="disabled", project="benchmark", entity=None), "b", "tokenize", "b", out)
    launch = Launch.model_construct(device="cpu", processes=1, threads="auto")
    return StageTask("tokenize/corpus", settings, {"load": model}, out, 0, launch, tracking)


def tree(process: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = [int(child) for path in Path(f"/proc/{process}/task").glob("*/children")
                    for child in path.read_text().split()]  # fmt: skip
    except OSError:  # it has just ended
        return []
    return [process, *(pid for child in children for pid in tree(child))]


def own_memory(process: int) -> int:
    """Bytes that are not a file's."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def print_table(size: int, tokens: int, alone: float, stage: float, peak: int) -> None:
    """Markdown."""
    print(f"{size / MEGABYTE:,.0f} MB of text, {tokens:,} tokens, {available_cores()} cores ({cpu_name()}), ", end="")
    print(f"tokenizers {importlib.metadata.version('tokenizers')}, Python {platform.python_version()}\n")
    print("| | seconds | MB/s | times the library | memory, GiB |\n|---|---:|---:|---:|---:|")
    print(f"| tokenizers alone, `encode_batch_fast` | {alone:.1f} | {size / alone / MEGABYTE:.2f} | 1.00 | |")
    print(
        f"| the whole tokenize stage | {stage:.1f} | {size / stage / MEGABYTE:.2f} | {stage / alone:.2f} "
        f"| {peak / GIBIBYTE:.2f} |"
    )


def cpu_name() -> str:
    """As the kernel tells it."""
    names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
