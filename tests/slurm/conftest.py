"""Fixtures with a real Slurm cluster. If Slurm is not installed, the tests are skipped."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.slurm.cluster import Workplace, final_states

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STAGES = ("load", "expand", "tokenize", "pretrain", "sft", "evaluate", "report")
STEPS = 200


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster of two nodes, n1 and n2, for the session."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing (apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("no Slurm here: its daemons must be started as root")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as directory:
        environment = {**os.environ, "DEV_SLURM_DIR": f"{directory}/slurm", "DEV_SLURM_PORT": str(_free_ports(3))}
        script = str(REPOSITORY / "scripts" / "dev_slurm")
        os.chmod(directory, 0o755)  # munge requires that everyone can reach its socket
        try:
            subprocess.run([script, "up"], env=environment, check=True, stdout=subprocess.DEVNULL)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SLURM_CONF", f"{directory}/slurm/slurm.conf")
                yield
        finally:
            subprocess.run([script, "down"], env=environment, check=True)


def _free_ports(count: int) -> int:
    """Returns the first of ``count`` consecutive free ports. Daemons of a killed session may still use some."""
    for first in range(17100, 20000, count):
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("", port)))
            return first
    raise RuntimeError("no free ports")


@pytest.fixture(scope="session")
def overrides(cluster: None, shrunk: list[str]) -> tuple[str, ...]:
    """The shrunk quickstart, with training on two nodes with one process each."""
    resources = [f"slurm.{stage}.{name}" for stage in STAGES for name in ("memory=null", "cpus=8", "time=20")]
    training = [f"slurm.{stage}.nodes=2" for stage in ("pretrain", "sft")]
    steps = [f"pretrain.steps={STEPS}", "pretrain.checkpoint_every_steps=50", "evaluate.targets=[load,sft]"]
    return (*shrunk, *resources, *training, *steps)


@pytest.fixture(scope="session")
def full_run(overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A directory in which a full run was submitted. Tests must wait for its jobs before they use its artifacts."""
    workplace = Workplace(tmp_path_factory.mktemp("full_run"), overrides)
    workplace.submit()
    return workplace


@pytest.fixture
def tokenized(full_run: Workplace, tmp_path: Path) -> Workplace:
    """A separate directory with copies of the artifacts before training, made after the full run has ended."""
    final_states(entry["job"] for entry in full_run.jobs().values())
    for stage in ("load", "expand", "tokenize"):
        shutil.copytree(
            full_run.directory / "outputs" / "artifacts" / stage, tmp_path / "outputs" / "artifacts" / stage
        )
    return Workplace(tmp_path, full_run.overrides)


@pytest.fixture(scope="session", autouse=True)
def warm_processes() -> None:
    """Jobs start new interpreters: Slurm tracks and signals them."""
