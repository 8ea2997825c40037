"""Logs metrics to ``metrics.jsonl`` in the artifact's directory and, optionally, to Weights & Biases.

Each stage is one W&B run, and the stages of a pipeline run form a group. The run's id is derived from the artifact's
key and steps are explicit, so that a restarted stage continues its curve. Only global rank 0 creates a ``Tracker``. No
other module imports wandb.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pipeline.artifacts.task import TrackingTarget
from pipeline.config import Tracking
from pipeline.errors import UserError
from pipeline.files import report_once, temporary_path

METRICS_FILE = "metrics.jsonl"
Mode = Literal["disabled", "offline", "online"]
MODES: dict[str, Mode] = {  # of WANDB_MODE
    "disabled": "disabled", "offline": "offline", "dryrun": "offline", "online": "online", "run": "online",
}  # fmt: skip
MAX_NAME_CHARACTERS = 128  # of W&B's groups and runs


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


def _restore(path: Path, saved: Path) -> None:
    """Replaces a log by a copy. Reports lines that differ from the copy, as a power cut or a failing disk leaves."""
    content = saved.read_bytes()
    if not path.exists() or not path.read_bytes().startswith(content):
        report_once(f"{path} is damaged and is restored from {saved}")
    temporary = temporary_path(path)
    temporary.write_bytes(content)
    os.replace(temporary, path)


def wandb_mode(tracking: Tracking) -> Mode:
    """Returns the mode of W&B: ``WANDB_MODE`` overrides ``tracking.wandb``, except that it cannot enable W&B.

    Raises:
        UserError: ``WANDB_MODE`` is no mode.
    """
    if tracking.wandb == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled"
    given = os.environ.get("WANDB_MODE") or tracking.wandb
    if given not in MODES:
        raise UserError(
            setting="WANDB_MODE",
            value=given,
            rule=f"this environment variable must be one of {', '.join(MODES)}",
            remedy="Correct or unset it. Without it, tracking.wandb applies.",
        )
    return MODES[given]


def login_fault(environment: Mapping[str, str]) -> UserError | None:
    """Checks that there is a login of W&B on this machine, and that ``WANDB_API_KEY`` looks like a key."""
    key = environment.get("WANDB_API_KEY")
    if key and not re.fullmatch(r"([^-\s]*-)?[\w-]{40,}|[\w-]+\.[\w-]+\.[\w-]+", key):  # as W&B checks it
        return UserError(
            setting="WANDB_API_KEY",
            value="(hidden)",
            rule="W&B rejects it: a key has at least 40 letters, digits and underscores",
            remedy="Copy the key from https://wandb.ai/authorize, or set tracking=offline and sync later.",
        )
    netrc = Path(environment.get("NETRC", "~/.netrc")).expanduser()
    if key or (netrc.is_file() and "wandb" in netrc.read_text(errors="replace")):
        return None
    return UserError(
        setting="tracking.wandb",
        value="online",
        rule="there is no W&B login on this machine",
        remedy="Run 'wandb login' or set WANDB_API_KEY, or set tracking=offline and sync later.",
    )


def _start_run(target: TrackingTarget, config: Mapping[str, Any]) -> Any:
    mode = wandb_mode(target.settings)
    if mode == "disabled":
        return None
    import wandb

    target.wandb_dir.mkdir(parents=True, exist_ok=True)
    # The defaults are in the home directory, which compute nodes often cannot write to. The cache is each user's own,
    # since W&B creates it without the permissions that ``group_writable`` asks for.
    for variable, directory in {"WANDB_DATA_DIR": "wandb", "WANDB_CACHE_DIR": f"wandb/cache-{os.getuid()}"}.items():
        os.environ.setdefault(variable, str(target.wandb_dir / directory))
    return wandb.init(
        mode=mode,
        project=target.settings.project,
        entity=target.settings.entity,
        group=target.group[:MAX_NAME_CHARACTERS],
        job_type=target.job_type,
        name=f"{target.group}/{target.job_type}"[-MAX_NAME_CHARACTERS:],
        id=target.run_id,
        resume="allow" if mode == "online" else None,
        dir=str(target.wandb_dir),
        config=dict(config),
        settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True),
    )
