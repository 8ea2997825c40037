"""Builds the missing artifacts of a run in order and reports those that exist."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.artifacts.lock import Lock
from pipeline.artifacts.store import Artifact, begin_attempt, finish_attempts
from pipeline.artifacts.task import Metrics, StageTask, TrackingTarget, task_to_json
from pipeline.config import Evaluate, Settings
from pipeline.driver.graph import STAGES, Node, expected_files, forced, select_nodes
from pipeline.driver.parallel import MachineShare, batches, build_all, shares_of, whole_machine
from pipeline.errors import UserError, WorkersFailed
from pipeline.files import read_record, remove_abandoned, sha256_json, temporary_path, write_json
from pipeline.launch.environment import child_environment
from pipeline.launch.failure import describe_exit, failure_message
from pipeline.launch.machine import first_node_prefix
from pipeline.launch.workers import OUTCOME_FILE, load_outcome, raise_refusal

KEYS_FILE = "keys.json"  # in a run's directory: the key of every artifact that it needs or needed, by name
FAILURE_FILE = Path("logs", "failure.txt")  # in a partial directory: why the last attempt failed
RECORDED_PACKAGES = ("torch", "transformers", "datasets", "deepspeed", "accelerate", "lm-eval", "safetensors")
RECORDED_IF_INSTALLED = ("pot", "vllm")
REBUILD_RECORDS = "rebuild-*.json"  # in the directory of all artifacts; see Rebuild
Run = tuple[Settings, Mapping[str, Node]]


def run_graph(run: Settings, nodes: Mapping[str, Node], console: Console) -> dict[str, float]:
    """Builds the missing ones among the selected nodes of a run. What ``force`` names is invalidated before.

    Returns:
        Seconds by node name, in the order in which they ended, 0.0 for artifacts that existed.

    Raises:
        UserError: a stage rejected its input.
        Stopped: a stage stopped for a signal, after it saved its state.
        WorkersFailed: a process of a stage died.
    """
    selected = select_nodes(nodes, run.stages)
    record_keys(run, selected)
    for directory in {(Path(run.output_dir) / run.name / name).parent for name in selected}:
        remove_abandoned(directory)
    seconds: dict[str, float] = {}

    def provide(node: Node, share: MachineShare) -> None:
        seconds[node.name] = _provide(run, node, share, console)
        link(run, node)

    for batch in batches(selected):
        missing = sum(not node.artifact.is_complete() for node in batch)
        shares = shares_of(run, missing) if isinstance(batch[0].settings, Evaluate) else [whole_machine(run)]
        build_all(batch, shares, provide)
    return seconds


def record_keys(run: Settings, nodes: Mapping[str, Node]) -> None:
    """Records which artifacts a run needs before they are built, so that ``action=clean`` keeps them."""
    path = Path(run.output_dir) / run.name / KEYS_FILE
    if not keys_recorded(run, nodes):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**_known_keys(run), **{name: node.artifact.key for name, node in nodes.items()}})


def keys_recorded(run: Settings, nodes: Mapping[str, Node]) -> bool:
    """Whether ``record_keys`` would change nothing."""
    return {name: node.artifact.key for name, node in nodes.items()}.items() <= _known_keys(run).items()


def _known_keys(run: Settings) -> dict[str, str]:
    record = Path(run.output_dir) / run.name / KEYS_FILE
    known: dict[str, str] = read_record(record, lambda value: isinstance(value, dict)) or {}
    return known


def missing_nodes(run: Settings, nodes: Mapping[str, Node]) -> dict[str, Node]:
    """Returns the selected nodes whose artifacts do not exist or are to be rebuilt."""
    redo = forced_nodes(run, nodes)
    selected = select_nodes(nodes, run.stages)
    return {name: node for name, node in selected.items() if name in redo or not node.artifact.is_complete()}


def forced_nodes(run: Settings, nodes: Mapping[str, Node]) -> dict[str, Node]:
    """Returns the selected nodes that ``force`` has rebuilt, parents first."""
    selected = select_nodes(nodes, run.stages)
    redo = forced(selected, run.force)
    return {name: node for name, node in selected.items() if name in redo}


@dataclass(frozen=True)
class Rebuild:
    """What a command with ``force`` builds again, in all of its jobs together.

    All artifacts are invalidated before the first one is built, and ``force`` is dropped then. What was built once is
    therefore not built again by another job of a sweep, nor if the command is interrupted and repeated: until
    everything is built, repeating it finds the record and continues. Afterwards, repeating it begins again.

    Attributes:
        record: identifies the rebuild in progress and lists its artifacts. It is named by what is rebuilt, and written
            after all of that was invalidated, so that a command which is killed before begins again.
        root: the directory of all artifacts.
    """

    record: Path
    root: Path

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Rebuild | None:
        """Describes the rebuild that some jobs ask for; None if they ask for none."""
        if not any(run.force for run, _ in runs):
            return None
        keys = sorted({node.artifact.key for run, nodes in runs for node in forced_nodes(run, nodes).values()})
        root = Path(runs[0][0].output_dir) / "artifacts"
        return cls(root / REBUILD_RECORDS.replace("*", sha256_json(keys)[:16]), root)

    def begin(self, nodes: Iterable[Node], console: Console) -> None:
        """Invalidates artifacts, each under its lock, which may have to be waited for."""
        rebuild, artifacts = uuid.uuid4().hex, list(dict.fromkeys(node.artifact for node in nodes))
        for artifact in artifacts:
            with artifact.lock().held(partial(_report_wait, artifact.stage, console)):
                artifact.tidy()
                artifact.invalidate(rebuild)
        write_json(self.record, {"rebuild": rebuild, "artifacts": [[each.stage, each.key] for each in artifacts]})

    def is_interrupted(self) -> bool:
        """Whether the rebuild has begun, and one of its artifacts is still to be built."""
        record = read_record(self.record, lambda value: isinstance(value["artifacts"], list) and value["rebuild"])
        if record is None:
            return False
        return any(Artifact(self.root, stage, key).awaits(record["rebuild"]) for stage, key in record["artifacts"])


def _report_wait(name: str, console: Console, holder: str) -> None:
    console.print(f"  [yellow]waits[/]  {name:<24} {holder}")


def _provide(run: Settings, node: Node, share: MachineShare, console: Console) -> float:
    """Builds an artifact under its lock unless it exists. Returns the seconds that took."""
    if node.artifact.is_complete():
        console.print(f"  [green]exists[/] {node.name:<24} {node.artifact.key[:12]}")
        return 0.0

    lock = node.artifact.lock()
    with lock.held(partial(_report_wait, node.name, console), share.processes.check) as taken_over:
        node.artifact.tidy()
        if taken_over:
            node.artifact.mark_shared()
        if node.artifact.is_complete():  # built by the process that held the lock
            return 0.0
        return _build(run, node, lock, share, console)


def _build(run: Settings, node: Node, lock: Lock, share: MachineShare, console: Console) -> float:
    directory = node.artifact.partial
    failure, resumed = directory / FAILURE_FILE, directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    # This comes before any other write: the newest file in the directory tells when an earlier attempt was killed.
    attempts = begin_attempt(directory)
    failure.parent.mkdir(exist_ok=True)
    failure.unlink(missing_ok=True)
    console.print(f"  [cyan]{'resume' if resumed else 'build '}[/] {node.name:<24} {node.artifact.key[:12]}")
    started = time.monotonic()
    try:
        metrics = _execute(replace(make_task(run, node), launch=share.launch), share)
    except WorkersFailed as error:
        lock.confirm()  # the loss of the lock explains the failure, and the directory is another process's now
        failure.write_text(f"{error}\n")
        raise
    seconds = time.monotonic() - started
    number, total = finish_attempts(directory, attempts)
    lock.confirm()
    manifest = {**_manifest(node, metrics, total), "attempts": number}
    node.artifact.commit(manifest, expected_files(node), confirm=lock.confirm)
    console.print(f"  [green]done[/]   {node.name:<24} {seconds:8.1f} s")
    for line in [*metrics.get("read", []), *metrics.get("warnings", [])]:
        console.print(f"           {line}", markup=False)
    return seconds


def make_task(run: Settings, node: Node) -> StageTask:
    """Creates the task for the stage's function."""
    existing = {role: other for role, other in node.reuses.items() if other.artifact.is_complete()}
    return StageTask(
        name=node.name,
        settings=node.settings,
        parents={role: parent.artifact.path for role, parent in {**node.parents, **existing}.items()},
        out=node.artifact.partial,
        seed=node.seed,
        launch=run.launch,
        tracking=TrackingTarget(
            settings=run.tracking,
            group=run.name,
            job_type=node.name,
            run_id=node.artifact.key[:16],
            directory=Path(run.output_dir).absolute() / run.name,
        ),
    )


def _execute(task: StageTask, share: MachineShare) -> Metrics:
    stage = task.name.partition("/")[0]
    if STAGES[stage].own_process:
        return _execute_in_process(task, share)
    metrics: Metrics = importlib.import_module(f"pipeline.stages.{stage}").run(task)
    return metrics


def _execute_in_process(task: StageTask, share: MachineShare) -> Metrics:
    """Runs ``python -m pipeline.stages`` and reads its outcome."""
    logs = task.out / "logs"  # not a temporary directory, because the stage may run on another node
    logs.mkdir(parents=True, exist_ok=True)
    task_file, outcome_file = logs / "task.json", logs / OUTCOME_FILE
    outcome_file.unlink(missing_ok=True)
    write_json(task_file, task_to_json(task))
    command = [*first_node_prefix(), sys.executable, "-m", "pipeline.stages", str(task_file), str(outcome_file)]
    environment = {**child_environment(task.launch, os.environ), "TOKENIZERS_PARALLELISM": "true", **share.variables}
    status = share.processes.run(command, environment)
    outcome = load_outcome(logs)
    raise_refusal(outcome)
    if outcome["status"] == "failed":
        raise WorkersFailed(f"stage {task.name}: {outcome['cause']}")
    if outcome["status"] != "done":
        raise WorkersFailed(failure_message(f"stage {task.name}: {describe_exit(status)}", logs / "stage.log"))
    metrics: Metrics = outcome["metrics"]
    return metrics


def _manifest(node: Node, metrics: Metrics, seconds: float) -> dict[str, Any]:
    return {
        "key": node.artifact.key,
        "stage": node.name,
        "settings": node.settings.model_dump(mode="json"),
        "seed": node.seed,
        "parents": {role: parent.artifact.key for role, parent in node.parents.items()},
        "packages": package_versions(),
        "python": sys.version.split()[0],
        "git_commit": _git_commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": metrics.get("peak_memory_bytes"),
        "metrics": metrics,
    }


@cache
def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that determine results, as they were at the first call.

    Raises:
        UserError: one of them is not installed.
    """
    versions = {}
    for name in (*RECORDED_PACKAGES, *RECORDED_IF_INSTALLED):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            if name in RECORDED_PACKAGES:
                raise UserError(
                    setting="package",
                    value=name,
                    rule=f"it is required, but not installed for {sys.executable}",
                    remedy="Install all packages with scripts/setup, or with pip install -c constraints.txt .",
                ) from error
    return versions


def _git_commit() -> str | None:
    """Returns the commit of this source tree, or None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    answer = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or None


def link(run: Settings, node: Node) -> None:
    """Links ``<output_dir>/<name>/<node>`` to the artifact. The link is relative, so that the tree can be moved."""
    path = Path(run.output_dir) / run.name / node.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_linked(run, node):
        return
    target = os.path.relpath(node.artifact.path, path.parent)
    temporary = temporary_path(path)  # jobs of a run that start at the same time link the artifacts they share
    temporary.symlink_to(target)
    os.replace(temporary, path)


def is_linked(run: Settings, node: Node) -> bool:
    """Whether ``link`` would change nothing."""
    path = Path(run.output_dir) / run.name / node.name
    return path.is_symlink() and os.readlink(path) == os.path.relpath(node.artifact.path, path.parent)
