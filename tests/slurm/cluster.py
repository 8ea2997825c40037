"""A real Slurm of two nodes as the tests see it: run a command against it, wait for jobs, look at its processes."""

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
PATIENCE = 400.0  # seconds; a job on a busy machine


def slurm(*command: str) -> str:
    """One of Slurm's commands; its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def bring_back(node: str) -> None:
    """Takes a node that was down into service, unless Slurm has: it does when it hears from the node's daemon."""

    def serves() -> bool:
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], capture_output=True)
        return "DOWN" not in slurm("scontrol", "show", "node", node, "--oneliner").upper().split("STATE=")[1].split()[0]

    wait_until(serves)


def info(job: int) -> JobInfo:
    found = job_info(job)
    assert found is not None
    return found


def wait_until(ready: Any, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def ends(jobs: Iterable[int]) -> dict[int, str]:
    """Waits for the jobs, and returns the state in which each ended."""
    jobs = list(jobs)

    wait_until(lambda: all(info(job).state in ENDED for job in jobs))
    return {job: info(job).state for job in jobs}


@dataclass(frozen=True)
class Workplace:
    """A directory in which commands are given, with the overrides that all of them share."""

    directory: Path
    overrides: tuple[str, ...]

    def command(self, *arguments: str) -> str:
        """Output of a command that ends well."""
        status, output = run("+experiment=quickstart", *self.overrides, *arguments, cwd=self.directory)
        assert status == EXIT_DONE, output
        return output

    def submit(self, *arguments: str, name: str = "quickstart") -> dict[str, int]:
        """Submits a run; job ids by the artifacts' names."""
        self.command("action=submit", f"name={name}", *arguments)
        return {node: entry["job"] for node, entry in self.jobs(name).items()}

    def jobs(self, name: str = "quickstart") -> Mapping[str, Any]:
        return json.loads((self.results(name) / "slurm" / "jobs.json").read_text())

    def results(self, name: str = "quickstart") -> Path:
        return self.directory / "outputs" / name

    def log(self, node: str, name: str = "quickstart") -> str:
        return Path(self.jobs(name)[node]["log"]).read_text()

    def weights(self, stage: str, name: str = "quickstart") -> dict[str, str]:
        """Hashes of a finished model's weight files."""
        found = {path.name: sha256_file(path) for path in (self.results(name) / stage).resolve().glob("*.safetensors")}
        assert found
        return found

    def steps_done(self, stage: str) -> int:
        """Logged by training that is under way; 0 before it began."""
        logs = list((self.directory / "outputs" / "artifacts" / stage).glob("*.partial/metrics.jsonl"))
        lines = logs[0].read_text().splitlines() if logs else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def workers(directory: Path) -> dict[int, int]:
    """Process ids of training workers whose files lie under a directory, by rank."""
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
