"""Time and memory of each expansion method on a large checkpoint: ``python -m scripts.benchmarks.expand_memory DIR``.

Writes a random checkpoint with the exact shape of Llama-3-8B into DIR (bfloat16, sharded, 16 GB) and expands it from 32
to 48 layers with each method, in a separate process as the pipeline does. Requires 50 GB of disk space. Memory is what
only that process uses (RssAnon + RssShmem), read from outside. Mapped files are not counted. The time is that of the
stage including its self-check. An interrupted run resumes, and its times are added up.

Rows of random matrices all have about the same distance from each other, unlike those of a trained model, so that
Sinkhorn converges within a few iterations. Times of OpT-DeUS on trained weights are in
``scripts/benchmarks/expand.py``. Its memory is the same.

Expected before the first run, from operation counts at 125 GFLOP/s in float64 and 230 in float32 on two cores: LESA
takes about 45 minutes, half of it for the two decompositions of ``[14336, 14336]`` Gram matrices, and 7 GB for their
workspace; OpT-DeUS takes about 15 minutes and 4.5 GB; methods that copy are as fast as the disk, and use no more memory
than torch itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from pipeline.artifacts.task import task_to_json
from pipeline.files import read_json, write_json
from pipeline.models.reading import copy_side_files
from pipeline.models.tensors import TensorSpec
from pipeline.models.writing import ShardWriter
from scripts.benchmarks.processes import run_module
from scripts.benchmarks.shapes import LLAMA
from scripts.benchmarks.tasks import expand_settings, expand_task, load_smollm2

GIGABYTE = 1e9
RECORD_SECONDS = 5.0  # between records of the progress, from which an interrupted run resumes
METHODS = ("llama_pro", "solar", "copy", "average", "opt_deus", "lesa")


def main() -> None:
    """Writes the checkpoint unless it exists, runs the methods and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", default="llama-3-8b", choices=LLAMA)
    parser.add_argument("--layers", type=int, help="use only this many layers, at full width")
    parser.add_argument("--new-layers", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    chosen = parser.parse_args()
    base = chosen.directory / f"{chosen.shape}-{chosen.layers or 'all'}"
    if not (base / "config.json").is_file():
        write_random_checkpoint(chosen.shape, base, chosen.layers)
    copy_rate = seconds_per_gigabyte(base)
    threads = torch.get_num_threads()
    depth = "" if chosen.layers is None else f" cut to {chosen.layers} layers"
    print(
        f"{chosen.shape}{depth}, {chosen.new_layers} new layers, torch {torch.__version__}, {threads} threads; ", end=""
    )
    print(f"cp takes {copy_rate:.2f} s per GB.")
    print("Sinkhorn converges faster on random weights, so OpT-DeUS takes longer on a trained model.\n")
    print("| method | minutes in total | minutes for writing weights | relative to cp | peak memory, GB | self-check |")
    print("|---|---:|---:|---:|---:|---|")
    for method in chosen.methods:
        print(row(method, base, chosen.directory, chosen.new_layers, copy_rate), flush=True)


def write_random_checkpoint(shape: str, directory: Path, layers: int | None = None) -> None:
    """Writes normally distributed weights (standard deviation 0.02, norms 1) and SmolLM2's tokenizer.

    Args:
        layers: number of layers, if fewer than the shape has.
    """
    hidden, intermediate, depth, heads, key_value_heads, head_dim, vocabulary, tied = LLAMA[shape]
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers or depth,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, head_dim=head_dim, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=8192, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    specs = {name: TensorSpec(torch.bfloat16, shape) for name, shape in llama_tensors(config)}
    generator = np.random.default_rng(0)
    with ShardWriter(directory, specs) as writer:
        for name, spec in specs.items():
            value = torch.ones(spec.shape) if "norm" in name else normal(spec.shape, generator)
            writer.write(name, value.to(spec.dtype))
    copy_side_files(load_smollm2(directory.parent / "smollm2"), directory)
    write_json(directory / "config.json", json.loads(config.to_json_string()))


def normal(shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
    """Returns normally distributed float32 values. NumPy draws them several times as fast as torch."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).mul_(0.02)


def llama_tensors(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the names and shapes of the tensors in a Llama checkpoint."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        shapes = {
            "input_layernorm": (hidden,), "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden), "self_attn.o_proj": (hidden, query),
            "post_attention_layernorm": (hidden,), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        for module, shape in shapes.items():
            yield f"model.layers.{layer}.{module}.weight", shape
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def seconds_per_gigabyte(base: Path) -> float:
    """Returns the time that copying the base's first weight file takes."""
    source = min(base.glob("model*.safetensors"))
    target = base.parent / "copied"
    started = time.perf_counter()
    shutil.copyfile(source, target)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds / (source.stat().st_size / GIGABYTE)


def row(method: str, base: Path, directory: Path, new_layers: int, copy_rate: float) -> str:
    """Expands with one method, and returns its row of the table."""
    out = directory / f"{method}.partial"
    out.mkdir(exist_ok=True)
    history = directory / f"{method}.json"  # time and memory of interrupted runs
    before = read_json(history) if history.is_file() else {"seconds": 0.0, "memory": 0}
    task, outcome = directory / f"{method}.task.json", directory / f"{method}.outcome.json"
    settings = expand_settings(method, new_layers=new_layers, position="top")
    write_json(task, task_to_json(expand_task(settings, base, out)))
    outcome.unlink(missing_ok=True)  # of an earlier run
    started = recorded = time.perf_counter()

    def record_progress(peak: int) -> bool:
        nonlocal recorded
        now = time.perf_counter()
        if now - recorded > RECORD_SECONDS:
            recorded = now
            write_json(history, {"seconds": before["seconds"] + now - started, "memory": max(before["memory"], peak)})
        return False

    peak = run_module(
        "pipeline.stages", str(task), str(outcome), log=directory / "log", until=record_progress, timeout=4 * 3600
    )
    seconds = before["seconds"] + time.perf_counter() - started
    metrics, memory = read_json(outcome)["metrics"], max(before["memory"], peak.host)
    written = sum(path.stat().st_size for path in out.glob("model*.safetensors")) / GIGABYTE
    weights = metrics["weights_seconds"] + before["seconds"]
    shutil.rmtree(out)
    history.unlink(missing_ok=True)
    return (
        f"| {method} | {seconds / 60:.1f} | {weights / 60:.1f} | {weights / written / copy_rate:.2f} "
        f"| {memory / GIGABYTE:.2f} | {metrics['check']['logits_of']}, difference "
        f"{metrics['check']['logit_difference']} |"
    )


if __name__ == "__main__":
    main()
