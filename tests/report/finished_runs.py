"""Artifacts of finished runs with known numbers, written without any model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config import Target
from pipeline.report.runs import RunArtifacts
from pipeline.training.block_losses import BlockLosses

NUM_BASE, NUM_NEW, STEPS, TOKENS = 6, 2, 10, 1000
STAGES = (
    "load", "expand", "tokenize/corpus", "tokenize/instructions", "pretrain", "sft",
    "evaluate/load", "evaluate/expand", "evaluate/pretrain", "evaluate/sft",
)  # fmt: skip
# (task, metric) -> (n, one standard error, value by target)
ScoreTable = Mapping[tuple[str, str], tuple[int, float | None, Mapping[str, float]]]
SCORES: ScoreTable = {
    ("held_out_text", "word_perplexity"): (40, 0.4, {"load": 35.0, "expand": 50.0, "pretrain": 26.6, "sft": 27.0}),
    ("python_docs_mcq", "acc"): (300, 0.02, {"load": 0.40, "expand": 0.38, "pretrain": 0.47, "sft": 0.46}),
    ("minimal_pairs", "acc"): (500, 0.015, {"load": 0.814, "expand": 0.71, "pretrain": 0.809, "sft": 0.806}),
}

# Held-out losses of 3 and 2, with standard errors of 0.3 and 0.2, and of 0.1 for their difference.
MEASURED_BLOCKS = (BlockLosses([33.0, 27.0], [10, 10]), BlockLosses([22.0, 18.0], [10, 10]))


def write(path: Path, value: Any) -> None:
    """Writes JSON and creates the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def layers(num_base: int, num_new: int) -> list[dict[str, Any]]:
    """Top placement: a new layer in each of the last ``num_new`` gaps."""
    found: list[dict[str, Any]] = []
    for base in range(num_base):
        found.append({"layer": len(found), "new": False, "from": [base]})
        if num_base - 1 - num_new <= base < num_base - 1:
            found.append({"layer": len(found), "new": True, "from": [base, base + 1]})
    return found


def finished_run(
    root: Path,
    name: str = "quickstart",
    method: str = "lesa",
    stages: Iterable[str] = STAGES,
    scores: ScoreTable = SCORES,
    losses: Iterable[float] = (4.0, 3.5, 3.2, 3.1, 3.05, 3.0),
    seconds_per_step: float = 2.0,
    num_base: int = NUM_BASE,
    num_new: int = NUM_NEW,
    seed: int = 0,
    warnings: Iterable[str] = (),
    blocks: Sequence[BlockLosses] = (),
    averages: float | None = None,
    tokens: int = TOKENS,
) -> RunArtifacts:
    """Writes one run's artifacts below ``root``; runs of one root share ``load``, ``tokenize``, ``evaluate/load``.

    Given ``blocks``, they replace ``losses``. ``averages`` is the loss of the averages of the weights.
    """
    losses = [measured.mean for measured in blocks] or list(losses)
    directories = {}
    for stage in stages:
        shared = stage in ("load", "evaluate/load") or stage.startswith("tokenize")
        directory = root / ("shared" if shared else name) / stage
        directories[stage] = directory
        metrics = _expansion_metrics(method, warnings) if stage == "expand" else {}
        _manifest(directory, stage, f"{'' if shared else name}{stage}", seed, metrics)
        if stage == "load":
            write(directory / "config.json", {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": num_base})
        elif stage == "expand":
            new = 0 if method == "none" else num_new
            write(directory / "expansion.json", {
                "method": method, "settings": {}, "source": "", "num_base_layers": num_base,
                "num_layers": num_base + new, "layers": layers(num_base, new),
            })  # fmt: skip
        elif stage in ("pretrain", "sft"):
            trained = 400_000 if method != "none" else 1_500_000
            _training(directory, losses if stage == "pretrain" else [2.0, 1.5], seconds_per_step, trained, tokens)
            if blocks:
                _add_blocks(directory / "training.json", blocks)
            if averages is not None:
                training = json.loads((directory / "training.json").read_text())
                write(directory / "training.json", {**training, "ema": {"decay": 0.9, "held_out_loss": averages}})
        elif stage.startswith("evaluate/"):
            _evaluation(directory, str(Target.of_role(stage)), scores)
    return RunArtifacts(name, method, directories)


def with_other_data(run: RunArtifacts, role: str, **settings: Any) -> RunArtifacts:
    """Gives all runs of a root another dataset, with these settings."""
    file = run.directories[role] / "manifest.json"
    manifest = json.loads(file.read_text())
    key = hashlib.sha256(repr(settings).encode()).hexdigest()
    write(file, {**manifest, "key": key, "settings": {**manifest["settings"], **settings}})
    return run


def _expansion_metrics(method: str, warnings: Iterable[str]) -> dict[str, Any]:
    same = method in ("llama_pro", "opt_deus", "none")
    return {"check": {"cache_difference": 0.0, "logit_difference": 2e-7 if same else None}, "warnings": list(warnings)}


def _manifest(directory: Path, stage: str, identity: str, seed: int, metrics: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"held_out_blocks": 4, "sequence_length": 64} if stage in ("pretrain", "sft") else {}
    if stage.startswith("evaluate"):
        settings = {"limit": None}
    write(directory / "manifest.json", {
        "key": hashlib.sha256(identity.encode()).hexdigest(), "stage": stage, "settings": settings, "seed": seed,
        "seconds": 10.0 + len(stage), "peak_memory_bytes": 3 * 2**29, "metrics": metrics,
        "packages": {"torch": "2.13.0"}, "parents": {}, "git_commit": "0" * 40,
    })  # fmt: skip


def _training(directory: Path, losses: list[float], seconds_per_step: float, trained: int, tokens: int) -> None:
    fractions = [index / (len(losses) - 1) for index in range(len(losses))]
    held_out = [
        {"fraction": round(f, 3), "step": round(f * STEPS), "tokens": round(f * tokens), "flops": f * 1e12,
         "seconds": f * STEPS * seconds_per_step, "loss": loss}
        for f, loss in zip(fractions, losses, strict=True)
    ]  # fmt: skip
    write(directory / "training.json", {
        "steps": STEPS, "tokens": tokens, "flops": 1e12, "seconds": STEPS * seconds_per_step, "world_size": 1,
        "precision": "bfloat16", "zero_stage": 2, "trainable_parameters": trained, "total_parameters": 1_900_000,
        "final_loss": losses[-1], "held_out": held_out,
    })  # fmt: skip
    lines = [
        {"step": step, "loss": losses[-1] + math.exp(-step / 3), "tokens": step * tokens / STEPS}
        for step in range(1, 11)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _add_blocks(file: Path, blocks: Sequence[BlockLosses]) -> None:
    """Adds the losses by block, which trainings by earlier versions do not have."""
    training = json.loads(file.read_text())
    for point, measured in zip(training["held_out"], blocks, strict=True):
        point |= {"loss": measured.mean, "loss_stderr": measured.stderr, "blocks": {"loss": asdict(measured)}}
    file.write_text(json.dumps(training))


def _evaluation(directory: Path, target: str, scores: ScoreTable) -> None:
    rows = [
        {"task": task, "metric": metric, "value": values[target], "stderr": stderr, "n": n}
        for (task, metric), (n, stderr, values) in scores.items()
    ]
    write(
        directory / "evaluation.json", {"rows": rows, "prompt_format": "plain", "first_tokens": [1], "dtype": "float32"}
    )
