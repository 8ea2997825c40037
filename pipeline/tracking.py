"""Logs metrics to ``metrics.jsonl`` in the artifact's directory and, optionally, to an experiment tracker.

Each stage is one run of the tracker, and the stages of a pipeline run form a group. The run is found again by the
artifact's key and steps are explicit, so that a restarted stage continues its curve. Only global rank 0 creates a
``Tracker``. The clients are in ``pipeline.trackers``.
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
from pipeline.trackers import start_client

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
        target: the tracker's settings, group and run.
        directory: the artifact's directory, in which ``metrics.jsonl`` is written.
        config: the stage's settings, shown in the tracker.
        resume_after: the step after which a restarted stage resumes. Existing lines of later steps are removed. If
            None, all existing lines are removed.
        saved: an intact copy of the log up to that step, which replaces the existing lines.
    """

    def __init__(
        self,
        target: TrackingTarget,
        directory: Path,
        config: Mapping[str, Any],
        resume_after: int | None = None,
        saved: Path | None = None,
    ) -> None:
        self._path = directory / METRICS_FILE
        if saved is None:
            _drop_lines_after(self._path, resume_after)
        else:
            _restore(self._path, saved)
        self._stream = open(self._path, "a", buffering=1)  # line by line, because the driver reads it during training
        self._client = start_client(target, config, resume_after)
        self._uploads = target.settings.log_model

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs metrics at a step."""
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._client is not None:
            self._client.log(metrics, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Shows a table. The artifact itself contains the same numbers."""
        if self._client is not None:
            self._client.table(name, columns, rows)

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """Sets the final values of the run."""
        if self._client is not None:
            self._client.summary(metrics)

    def images(self, files: Sequence[Path]) -> None:
        """Shows images, by the names of their files."""
        if self._client is not None and files:
            self._client.images(files)

    def model(self, name: str, files: Sequence[Path]) -> None:
        """Records where a model's files are. They are uploaded only with ``tracking.log_model``."""
        if self._client is not None and files:
            self._client.model(name, files, self._uploads)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if self._client is not None:
            self._client.finish(succeeded=kind is None)


def _drop_lines_after(path: Path, step: int | None) -> None:
    """Removes the lines of later steps, or all lines if ``step`` is None, and an incomplete last line."""
    if not path.exists():
        return
    kept = [] if step is None else [line for line in read_metrics(path) if line["step"] <= step]
    temporary = temporary_path(path)
    temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    os.replace(temporary, path)


def _restore(path: Path, saved: Path) -> None:
    """Replaces a log by a copy. Reports lines that differ from the copy, as a power cut or a failing disk leaves."""
    content = saved.read_bytes()
    if not path.exists() or not path.read_bytes().startswith(content):
        report_once(f"{path} is damaged and is restored from {saved}")
    temporary = temporary_path(path)
    temporary.write_bytes(content)
    os.replace(temporary, path)
