"""``action=submit`` for a study on a real Slurm cluster: what follows from the results is submitted by a job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.errors import EXIT_DONE
from tests.slurm.cluster import final_states
from tests.study.conftest import arguments, finished, one_worker  # noqa: F401
from tests.study.small_study import STUDY, Workplace


def test_a_study_continues_as_batch_jobs_until_its_report(cluster: None, finished: Workplace) -> None:  # noqa: F811
    """A run of the tuning and a final run are missing, the second of which follows only from the first."""
    expected = finished.results()
    contender = STUDY["reference"]
    rate = next(row["learning_rate"] for row in expected["rows"] if row["contender"] == contender)
    for name in (f"rate-{rate:g}_steps-2_seed-9", f"rate-{rate:g}_steps-4_seed-1"):
        link = finished.directory / "outputs" / "tiny" / contender / name / "pretrain"
        shutil.rmtree(link.resolve())
    shutil.rmtree(finished.report)
    slurm = ["slurm.pretrain.memory=null", "slurm.report.memory=null", "slurm.pretrain.cpus=8", "slurm.report.cpus=8"]
    assert finished.run("action=submit", "slurm=cpu", *slurm) == EXIT_DONE
    record = finished.directory / "outputs" / "tiny" / "slurm" / "study.json"
    waves: list[dict[str, object]] = []
    while not finished.report.exists():
        waves.append(json.loads(record.read_text()))
        last = waves[-1]["job"]
        assert isinstance(last, int) and len(waves) <= 2
        assert set(final_states([last]).values()) == {"COMPLETED"}, _logs(record.parent)
    assert [len(wave["runs"]) for wave in waves] == [1, 1]  # type: ignore[arg-type]
    again = finished.results()
    for results in (expected, again):
        for row in results["rows"]:
            row.pop("seconds")
    assert again["rows"] == expected["rows"]


def _logs(directory: Path) -> list[str]:
    return [path.read_text()[-2000:] for path in sorted(directory.glob("study-*.log"))]
