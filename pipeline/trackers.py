"""The clients of experiment trackers behind the same few methods: Weights & Biases, TensorBoard and MLflow.

Each is imported only when a stage logs to it. The settings choose one; see ``docs/tracking.md``.
"""

from __future__ import annotations

import json
import os
import re
import struct
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.artifacts.task import TrackingTarget
from pipeline.config import Tracking
from pipeline.errors import UserError

Mode = Literal["disabled", "offline", "online"]
MODES: dict[str, Mode] = {  # of WANDB_MODE
    "disabled": "disabled", "offline": "offline", "dryrun": "offline", "online": "online", "run": "online",
}  # fmt: skip
MAX_NAME_CHARACTERS = 128  # of W&B's groups and runs
MAX_PARAMETER_CHARACTERS = 500  # of MLflow's parameters
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}  # module, distribution
RUN_TAG = "depth_growth_run"  # identifies a stage's run in MLflow, whose ids cannot be chosen


class Client(Protocol):
    """One run of a tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs metrics at a step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Shows a table."""

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """Sets final values."""

    def images(self, files: Sequence[Path]) -> None:
        """Shows images, by the names of their files."""

    def model(self, name: str, files: Sequence[Path], upload: bool) -> None:
        """Records where a model's files are, or uploads them."""

    def finish(self, succeeded: bool) -> None:
        """Ends the run."""


def start_client(target: TrackingTarget, config: Mapping[str, Any], resume_after: int | None) -> Client | None:
    """Starts or continues a run of the tracker that the settings choose; None for none.

    Args:
        target: the settings, and what the run is called.
        config: the stage's settings.
        resume_after: the last step of an earlier attempt that counts; None if none does.

    Raises:
        UserError: ``WANDB_MODE`` is not a valid mode.
    """
    backend = target.settings.backend
    if backend == "tensorboard":
        return _Tensorboard(target, config, resume_after)
    if backend == "mlflow":
        return _Mlflow(target, config)
    return None if wandb_mode(target.settings) == "disabled" else _Wandb(target, config)


def not_installed(tracking: Tracking) -> UserError | None:
    """Returns an error if the package of the chosen tracker is missing."""
    module, distribution = PACKAGES.get(tracking.backend, (None, None))
    if module is None or find_spec(module) is not None:
        return None
    return UserError(
        setting="tracking.backend",
        value=tracking.backend,
        rule=f"the package {distribution} is not installed",
        remedy=f"Run: pip install {distribution}, or set tracking=offline (W&B) or tracking=none.",
    )


# ------------------------------------------------------------------------------------ Weights & Biases


def wandb_mode(tracking: Tracking) -> Mode:
    """Returns the mode of W&B: ``WANDB_MODE`` overrides ``tracking.wandb``, except that it cannot enable W&B.

    Raises:
        UserError: ``WANDB_MODE`` is not a valid mode.
    """
    if (
        tracking.backend != "wandb"
        or tracking.wandb == "disabled"
        or os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
    ):
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
    # A server of one's own is named by the variable, or by 'wandb login --host' in the settings.
    settings = _text_of(Path(environment.get("WANDB_CONFIG_DIR", "~/.config/wandb"), "settings"))
    servers = re.findall(r"https?://([^/:\s]+)", environment.get("WANDB_BASE_URL", settings))
    logins = _text_of(Path(environment.get("NETRC", "~/.netrc")))
    if key or environment.get("WANDB_IDENTITY_TOKEN_FILE") or any(name in logins for name in ("wandb", *servers)):
        return None
    return UserError(
        setting="tracking.wandb",
        value="online",
        rule="there is no W&B login on this machine",
        remedy="Run 'wandb login' or set WANDB_API_KEY, or set tracking=offline and sync later.",
    )


def _text_of(path: Path) -> str:
    path = path.expanduser()
    return path.read_text(errors="replace") if path.is_file() else ""


class _Wandb:
    """Each stage is one run with the key of its artifact as the id, so that a restarted stage continues its curve."""

    def __init__(self, target: TrackingTarget, config: Mapping[str, Any]) -> None:
        import wandb

        mode = wandb_mode(target.settings)
        target.directory.mkdir(parents=True, exist_ok=True)
        # The defaults are in the home directory, which compute nodes often cannot write to. The cache is each user's
        # own, since W&B creates it without the permissions that ``group_writable`` asks for.
        for variable, directory in {"WANDB_DATA_DIR": "wandb", "WANDB_CACHE_DIR": f"wandb/cache-{os.getuid()}"}.items():
            os.environ.setdefault(variable, str(target.directory / directory))
        self._run: Any = wandb.init(
            mode=mode,
            project=target.settings.project,
            entity=target.settings.entity,
            group=target.group[:MAX_NAME_CHARACTERS],
            job_type=target.job_type,
            name=f"{target.group}/{target.job_type}"[-MAX_NAME_CHARACTERS:],
            id=target.run_id,
            resume="allow" if mode == "online" else None,
            dir=str(target.directory),
            config=dict(config),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True
            ),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def summary(self, metrics: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(metrics))

    def images(self, files: Sequence[Path]) -> None:
        import wandb

        self._run.log({f"plots/{file.stem}": wandb.Image(str(file)) for file in files})

    def model(self, name: str, files: Sequence[Path], upload: bool) -> None:
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[-MAX_NAME_CHARACTERS:], type="model")
        for file in files:
            if upload:
                artifact.add_file(str(file))
            else:  # hashing a large model would take longer than the report
                artifact.add_reference(file.absolute().as_uri(), name=file.name, checksum=False)
        self._run.log_artifact(artifact)

    def finish(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


# ------------------------------------------------------------------------------------------ TensorBoard


class _Tensorboard:
    """Each stage is one directory, ``<output_dir>/<name>/tensorboard/<stage>/<key of its artifact>``.

    With other settings, a stage has another key and therefore a curve of its own.
    """

    def __init__(self, target: TrackingTarget, config: Mapping[str, Any], resume_after: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps of an earlier attempt that are repeated would otherwise be shown twice.
        purge = 0 if resume_after is None else resume_after + 1
        place = target.directory / "tensorboard" / target.job_type / target.run_id
        self._writer: Any = SummaryWriter(str(place), purge_step=purge)
        self._writer.add_text("settings", f"```json\n{json.dumps(dict(config), indent=1)}\n```")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))

    def summary(self, metrics: Mapping[str, Any]) -> None:
        self._writer.add_text("summary", f"```json\n{json.dumps(dict(metrics), indent=1)}\n```")

    def images(self, files: Sequence[Path]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for file in files:  # as they are, without decoding them
            content = file.read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # in the header of a PNG file
            image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
            value = Summary.Value(tag=f"plots/{file.stem}", image=image)
            self._writer._get_file_writer().add_summary(Summary(value=[value]))

    def model(self, name: str, files: Sequence[Path], upload: bool) -> None:
        self._writer.add_text(f"models/{name}", "\n".join(f"- {file}" for file in files))

    def finish(self, succeeded: bool) -> None:
        self._writer.close()


# ----------------------------------------------------------------------------------------------- MLflow


class _Mlflow:
    """Each stage is one run of the experiment ``tracking.project``.

    Without ``MLFLOW_TRACKING_URI``, runs are stored in ``<output_dir>/<name>/mlruns``. MLflow repeats a failed request;
    an error that remains ends the stage.
    """

    def __init__(self, target: TrackingTarget, config: Mapping[str, Any]) -> None:
        # The store in files needs neither a server nor a database. MLflow asks whoever uses it to say so.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        local = (target.directory / "mlruns").as_uri()
        self._client: Any = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)
        experiment = self._experiment(target.settings.project)
        earlier = self._client.search_runs([experiment], f"tags.{RUN_TAG} = '{target.run_id}'")
        name = f"{target.group}/{target.job_type}"
        tags = {RUN_TAG: target.run_id, "group": target.group, "job_type": target.job_type}
        run = earlier[0] if earlier else self._client.create_run(experiment, run_name=name, tags=tags)
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        # Values cannot be changed, and an attempt that was killed may have logged only some of them or none.
        missing = {name: json.dumps(value) for name, value in config.items() if name not in run.data.params}
        parameters = [Param(name, value[:MAX_PARAMETER_CHARACTERS]) for name, value in missing.items()]
        self._client.log_batch(self._run_id, params=parameters)

    def _experiment(self, name: str) -> str:
        """Returns the id of an experiment, which is created if it does not exist."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)
                if found is None:  # not because another stage that runs at the same time has created it
                    raise
        return str(found.experiment_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000  # in milliseconds
        # MLflow rejects other characters, such as the parentheses of lm-eval's "exact_match (strict-match)".
        accepted = {re.sub(r"[^/\w.\- :]", "_", name): value for name, value in metrics.items()}
        batch = [Metric(name, value, now, step) for name, value in accepted.items()]
        self._client.log_batch(self._run_id, metrics=batch)  # in one request

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        # Of the form that MLflow shows as a table: log_table writes the same, but needs pandas.
        self._client.log_dict(
            self._run_id, {"columns": list(columns), "data": [list(row) for row in rows]}, f"{name}.json"
        )

    def summary(self, metrics: Mapping[str, Any]) -> None:
        self._client.log_dict(self._run_id, dict(metrics), "summary.json")

    def images(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self._run_id, str(file), "plots")

    def model(self, name: str, files: Sequence[Path], upload: bool) -> None:
        if not upload:
            self._client.log_dict(self._run_id, {"files": [str(file) for file in files]}, f"models/{name}.json")
        for file in files if upload else ():
            self._client.log_artifact(self._run_id, str(file), f"models/{name}")

    def finish(self, succeeded: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")
