"""Settings composed from conf/ as in a run, and tasks of single stages outside a run."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.__main__ import compose_jobs
from pipeline.artifacts.task import StageTask, TrackingTarget, task_to_json
from pipeline.config import AnyExpand, Launch, Settings, Source, Tokenize, Train
from pipeline.files import read_json, write_json
from scripts.benchmarks.processes import Peak, run_module


@cache
def quickstart(*overrides: str) -> Settings:
    """Returns the quickstart's settings with some overrides, without tracking."""
    (job,) = compose_jobs(["experiment=quickstart", "tracking=none", *overrides], multirun=False, config_dir=None)
    return job.settings


def expand_settings(method: str, **changes: Any) -> AnyExpand:
    """Returns a method's settings with some changes."""
    return quickstart(f"expand={method}", *_overrides("expand", changes)).expand


def pretrain_settings(**changes: Any) -> Train:
    """Returns the pre-training settings with some changes, with ``__`` in their names instead of dots."""
    return quickstart(*_overrides("pretrain", changes)).pretrain


def _overrides(group: str, changes: dict[str, Any]) -> list[str]:
    return [f"{group}.{name.replace('__', '.')}={json.dumps(value)}" for name, value in changes.items()]


def text_files(path: str, weight: float = 1.0) -> Source:
    """Returns a source that reads a file, directory or glob."""
    return Source(
        kind="files", path=path, config_name=None, split=None, revision=None, text_field="text", weight=weight
    )


def corpus_settings(sources: list[Source], sequence_length: int, held_out_fraction: float) -> Tokenize:
    """Returns settings that tokenize all text of some sources."""
    return Tokenize(
        purpose="corpus", sources=sources, sequence_length=sequence_length, held_out_fraction=held_out_fraction,
        forgetting=None, validation_fraction=0.0, max_forgetting_tokens=None, max_tokens=None, chat_template=None,
        system_messages="keep", max_dropped=0.5, max_record_bytes=2**28,
    )  # fmt: skip


def one_process(device: str) -> Launch:
    """Returns launch settings with a single process, which both sides of a comparison use."""
    return quickstart(f"launch.device={device}", "launch.processes=1").launch


def stage_task(name: str, settings: Any, parents: dict[str, Path], out: Path, seed: int = 0) -> StageTask:
    """Returns the task of a stage on this machine."""
    run = quickstart()
    return StageTask(
        name=name,
        settings=settings,
        parents=parents,
        out=out,
        seed=seed,
        launch=run.launch,
        tracking=TrackingTarget(run.tracking, "benchmark", name, "benchmark", out / "wandb"),
    )


def training_task(settings: Train, parents: dict[str, Path], out: Path, device: str) -> StageTask:
    """Returns a task of the pretrain stage in a single process."""
    task = stage_task("pretrain", settings, parents, out)
    return replace(task, launch=one_process(device))


def expand_task(settings: AnyExpand, base: Path, out: Path, seed: int = 0) -> StageTask:
    """Returns a task of the expand stage."""
    return stage_task("expand", settings, {"load": base}, out, seed)


def run_stage(task: StageTask, directory: Path, timeout: float = 1800.0) -> tuple[Peak, dict[str, Any]]:
    """Runs a task in its own process, like the driver.

    Args:
        task: the task.
        directory: where the task, its outcome and its log are written.
        timeout: in seconds.

    Returns:
        The peak memory and the metrics.
    """
    job, outcome = directory / "task.json", directory / "outcome.json"
    write_json(job, task_to_json(task))
    peak = run_module("pipeline.stages", str(job), str(outcome), log=directory / "log", timeout=timeout)
    metrics: dict[str, Any] = read_json(outcome)["metrics"]
    return peak, metrics


def load_smollm2(directory: Path) -> Path:
    """Runs the load stage for SmolLM2, unless the directory exists already, and returns the directory."""
    from pipeline.stages import load

    if not (directory / "config.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        load.run(stage_task("load", quickstart().model, {}, directory))
    return directory
