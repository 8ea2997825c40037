"""Where numbers go: ``metrics.jsonl`` beside the artifact, always, and Weights & Biases. The only importer of wandb.

One W&B run a stage, all of a pipeline run in one group. The run's id is derived from the artifact, and steps are
explicit, so that a restarted stage continues its own curve. Only global rank 0 makes a Tracker.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.artifacts.task import TrackingTarget

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Logs one stage's numbers.

    Args:
        target: where to; see ``TrackingTarget``.
        directory: the artifact's directory; ``metrics.jsonl`` is written there.
        config: the stage's settings, shown in W&B.
        resume_after: the last step that counts after a restart; later lines are dropped. None starts anew.
    """

    def __init__(
        self, target: TrackingTarget, directory: Path, config: Mapping[str, Any], resume_after: int | None = None
    ) -> None:
        self._path = directory / METRICS_FILE
        _keep_lines(self._path, resume_after)
        self._stream = open(self._path, "a", buffering=1)
        self._run = _start_run(target, config)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes one line of numbers at an explicit step."""
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Shows a table in W&B; its numbers lie in the artifact already."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """Sets the run's closing numbers."""
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


def _keep_lines(path: Path, resume_after: int | None) -> None:
    """Rewrites the file with the lines that still count; a line cut short by a kill is dropped with the rest."""
    if not path.exists():
        return
    kept = [] if resume_after is None else [line for line in _whole_lines(path) if line["step"] <= resume_after]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The parsed lines up to the last newline."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


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
