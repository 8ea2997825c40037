"""Expansion settings and tasks for benchmarks, composed from conf/ as a run composes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.__main__ import compose_jobs
from pipeline.artifact import write_json
from pipeline.config import AnyExpand, Settings
from pipeline.data import python_docs
from pipeline.layer_config import rebuild_config, spelled_out_config
from pipeline.layer_surgery import Names
from pipeline.model_dir import copy_side_files
from pipeline.stage import StageTask
from scripts.benchmarks.models import stage_task


def expand_settings(method: str, **changes: Any) -> AnyExpand:
    """A method's settings with some values changed."""
    overrides = [f"expand.{name}={json.dumps(value)}" for name, value in changes.items()]
    return quickstart(f"expand={method}", *overrides).expand


def quickstart(*overrides: str) -> Settings:
    """The quickstart's settings with some values changed."""
    (job,) = compose_jobs(["experiment=quickstart", *overrides], multirun=False, config_dir=None)
    return job.settings


def expand_task(settings: AnyExpand, base: Path, out: Path, seed: int = 0) -> StageTask:
    """The expand stage from directory to directory."""
    task = stage_task("expand", settings, {"load": base}, out)
    return StageTask(task.name, task.settings, task.parents, task.out, seed, task.launch, task.tracking)


def load_smollm2(directory: Path) -> Path:
    """The real small model as the load stage writes it, unless it is there."""
    from pipeline.stages import load

    if not (directory / "config.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        load.run(stage_task("load", quickstart().model, {}, directory))
    return directory


def write_model(names: Names, base: Path, out: Path) -> None:
    """What makes weights a model directory: config and tokenizer."""
    write_json(out / "config.json", rebuild_config(spelled_out_config(base), names.plan.config_sources))
    copy_side_files(base, out)


@torch.inference_mode()
def held_out_perplexity(model: Path, blocks: int = 8, block_size: int = 512) -> float:
    """Perplexity a token of the embedded corpus's held-out documents, run together into blocks, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    end = tokenizer.eos_token or ""
    ids = tokenizer(end.join(python_docs.documents(held_out=True)), return_tensors="pt")["input_ids"][0]
    batch = ids[: blocks * block_size].view(blocks, block_size)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses = [network(block[None], labels=block[None]).loss for block in batch]
    return float(torch.stack(losses).mean().exp())
