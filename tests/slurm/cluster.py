"""Helpers for a real Slurm cluster of two nodes: run commands, wait for jobs, find worker processes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_DONE
from pipeline.files import sha256_file
from pipeline.launch.slurm import JobInfo, job_info
from tests.test_pipeline import run

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
TIMEOUT_SECONDS = 400.0  # enough for a job on a busy machine


def slurm(*command: str) -> str:
    """Runs one of Slurm's commands and returns its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resume_node(node: str) -> None:
    """Resumes a node that was down, unless Slurm has already resumed it after hearing from the node's daemon."""

    def is_up() -> bool:
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], capture_output=True)
        return "DOWN" not in slurm("scontrol", "show", "node", node, "--oneliner").upper().split("STATE=")[1].split()[0]

    wait_until(is_up)


def info(job: int) -> JobInfo:
    found = job_info(job)
    assert found is not None
    return found


def wait_until(ready: Any, seconds: float = TIMEOUT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def final_states(jobs: Iterable[int]) -> dict[int, str]:
    """Waits for the jobs to end, and returns their states."""
    jobs = list(jobs)
    wait_until(lambda: all(info(job).state in ENDED for job in jobs))
    return {job: info(job).state for job in jobs}


@dataclass(frozen=True)
class Workplace:
    """A working directory for commands, and the overrides that all of them share."""

    directory: Path
    overrides: tuple[str, ...]

    def command(self, *arguments: str) -> str:
        """Runs a command that must succeed, and returns its output."""
        status, output = run("+experiment=quickstart", *self.overrides, *arguments, cwd=self.directory)
        assert status == EXIT_DONE, output
        return output

    def submit(self, *arguments: str, name: str = "quickstart") -> dict[str, int]:
        """Submits a run, and returns the job ids by artifact name."""
        self.command("action=submit", f"name={name}", *arguments)
        return {node: entry["job"] for node, entry in self.jobs(name).items()}

    def jobs(self, name: str = "quickstart") -> Mapping[str, Any]:
        return json.loads((self.results(name) / "slurm" / "jobs.json").read_text())

    def results(self, name: str = "quickstart") -> Path:
        return self.directory / "outputs" / name

    def log(self, node: str, name: str = "quickstart") -> str:
        return Path(self.jobs(name)[node]["log"]).read_text()

    def weights(self, stage: str, name: str = "quickstart") -> dict[str, str]:
        """Returns hashes of the weight files of a finished model."""
        found = {path.name: sha256_file(path) for path in (self.results(name) / stage).resolve().glob("*.safetensors")}
        assert found
        return found

    def steps_done(self, stage: str) -> int:
        """Returns the last step logged by unfinished training, or 0 if it has not logged any."""
        logs = list((self.directory / "outputs" / "artifacts" / stage).glob("*.partial/metrics.jsonl"))
        lines = logs[0].read_text().splitlines() if logs else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def workers(directory: Path) -> dict[int, int]:
    """Returns the process ids, by rank, of training workers whose files are in a directory."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
            environment = dict(item.partition("=")[::2] for item in (process / "environ").read_text().split("\0"))
        except OSError:
            continue
        if "pipeline.training.worker" in command and str(directory) in command and "RANK" in environment:
            found[int(environment["RANK"])] = int(process.name)
    return found
