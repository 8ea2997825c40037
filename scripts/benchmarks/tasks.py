"""Settings as a run composes them from conf/, and tasks of single stages outside of any run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.__main__ import compose_jobs
from pipeline.artifacts.task import StageTask, TrackingTarget, task_to_json
from pipeline.config import AnyExpand, Launch, Settings, Source, Tokenize, Train
from pipeline.files import read_json, write_json
from scripts.benchmarks.processes import Peak, run_module


def quickstart(*overrides: str) -> Settings:
    """The quickstart's settings with some values changed, untracked."""
    (job,) = compose_jobs(["experiment=quickstart", "tracking=disabled", *overrides], multirun=False, config_dir=None)
    return job.settings


def expand_settings(method: str, **changes: Any) -> AnyExpand:
    """A method's settings with some values changed."""
    return quickstart(f"expand={method}", *_overrides("expand", changes)).expand


def pretrain_settings(**changes: Any) -> Train:
    """Pre-training's settings with some values changed; ``__`` stands for a dot."""
    return quickstart(*_overrides("pretrain", changes)).pretrain


def _overrides(group: str, changes: dict[str, Any]) -> list[str]:
    return [f"{group}.{name.replace('__', '.')}={json.dumps(value)}" for name, value in changes.items()]


def text_files(path: str, weight: float = 1.0) -> Source:
    """Documents as the tokenize stage finds them in a file, directory or glob."""
    return Source(
        kind="files", path=path, config_name=None, split=None, revision=None, text_field="text", weight=weight
    )


def corpus_settings(sources: list[Source], sequence_length: int, held_out_fraction: float) -> Tokenize:
    """Settings that tokenize all text of these sources."""
    return Tokenize(
        purpose="corpus", sources=sources, sequence_length=sequence_length, held_out_fraction=held_out_fraction,
        max_tokens=None, chat_template=None,
    )  # fmt: skip


def one_process(device: str) -> Launch:
    """How a contender is started."""
    return quickstart(f"launch.device={device}", "launch.processes=1").launch


def stage_task(name: str, settings: Any, parents: dict[str, Path], out: Path, seed: int = 0) -> StageTask:
    """A task on this machine as it is."""
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
    """The pretrain stage in one process, as the other contender has."""
    task = stage_task("pretrain", settings, parents, out)
    return replace(task, launch=one_process(device))


def expand_task(settings: AnyExpand, base: Path, out: Path, seed: int = 0) -> StageTask:
    """The expand stage from directory to directory."""
    return stage_task("expand", settings, {"load": base}, out, seed)


def run_stage(task: StageTask, place: Path, timeout: float = 1800.0) -> tuple[Peak, dict[str, Any]]:
    """Runs a task as the driver does, in a process of its own: its memory and its metrics.

    Args:
        place: where the task, its outcome and its log are written.
    """
    job, outcome = place / "task.json", place / "outcome.json"
    write_json(job, task_to_json(task))
    peak = run_module("pipeline.stages", str(job), str(outcome), log=place / "log", timeout=timeout)
    metrics: dict[str, Any] = read_json(outcome)["metrics"]
    return peak, metrics


def load_smollm2(directory: Path) -> Path:
    """The real small model as the load stage writes it, unless it is there."""
    from pipeline.stages import load

    if not (directory / "config.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        load.run(stage_task("load", quickstart().model, {}, directory))
    return directory
