"""Logs metrics to ``metrics.jsonl`` in the artifact's directory and, optionally, to Weights & Biases.

Each stage is one W&B run, and the stages of a pipeline run form a group. The run's id is derived from the artifact's
key and steps are explicit, so that a restarted stage continues its curve. Only global rank 0 creates a ``Tracker``. No
other module imports wandb.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.artifacts.task import TrackingTarget
from pipeline.files import report_once, temporary_path

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file. Lines that are damaged or incomplete are skipped.

    A process that was killed may leave half a line at the end, which is normal. Any other damage, such as zeros after a
    power cut, is reported on stderr.
    """
    if not path.exists():
        return []
    *complete, last = path.read_text(errors="replace").split("\n")
    parsed = [parse_metrics(line) for line in (*complete, last)]
    damaged = parsed[:-1].count(None) + ("\0" in last)
    if damaged:
        report_once(f"{path} contains {damaged} damaged line(s), which are skipped")
    return [line for line in parsed if line is not None]


def parse_metrics(line: str) -> dict[str, Any] | None:
    """Returns one line of a metrics file, or None if it is damaged or incomplete."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


class Tracker:
    """Logs the metrics of one stage.

    Args:
        target: the W&B settings, group and run.
        directory: the artifact's directory, in which ``metrics.jsonl`` is written.
        config: the stage's settings, shown in W&B.
        resume_after: the step after which a restarted stage resumes. Existing lines of later steps are removed. If
            None, all existing lines are removed.
    """

    def __init__(
        self, target: TrackingTarget, directory: Path, config: Mapping[str, Any], resume_after: int | None = None
    ) -> None:
        self._path = directory / METRICS_FILE
        _drop_lines_after(self._path, resume_after)
        self._stream = open(self._path, "a", buffering=1)  # line by line, because the driver reads it during training
        self._run = _start_run(target, config)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs metrics at a step."""
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Shows a table in W&B. The artifact itself contains the same numbers."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """Sets the summary values of the W&B run."""
        if self._run is not None:
            self._run.summary.update(dict(metrics))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)


def _drop_lines_after(path: Path, step: int | None) -> None:
    """Removes the lines of later steps, or all lines if ``step`` is None, and an incomplete last line."""
    if not path.exists():
        return
    kept = [] if step is None else [line for line in read_metrics(path) if line["step"] <= step]
    temporary = temporary_path(path)
    temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    os.replace(temporary, path)


def _start_run(target: TrackingTarget, config: Mapping[str, Any]) -> Any:
    if target.settings.wandb == "disabled":
        return None
    import wandb

    target.wandb_dir.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        mode=target.settings.wandb,
        project=target.settings.project,
        entity=target.settings.entity,
        group=target.group,
        job_type=target.job_type,
        name=f"{target.group}/{target.job_type}",
        id=target.run_id,
        resume="allow" if target.settings.wandb == "online" else None,
        dir=str(target.wandb_dir),
        config=dict(config),
        settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True),
    )
