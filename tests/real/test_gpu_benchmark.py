"""``scripts/benchmarks/gpu`` on the CPU with tiny shapes, and the wheels for a machine without a network."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarks.gpu import ON_CPU, Step, run_step, tables_in
from scripts.benchmarks.wheels import fetch, missing, names_in

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict[str, str]]]]:
    """The tables of every step."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "scripts.benchmarks.gpu", str(out), "--device", "cpu"]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + (out / "gpu.log").read_text()[-5000:]
    steps = json.loads((out / "gpu.json").read_text())["steps"]
    assert [step["step"] for step in steps] == [step.name for step in ON_CPU]
    text = (out / "gpu.md").read_text()
    assert all(step["title"] in text and step["text"] in text for step in steps)
    return {step["step"]: step["tables"] for step in steps}


def test_training_is_compared_with_the_trainer_and_with_the_plan(measured: dict) -> None:
    trainer, attention = measured["tiny"]
    assert [row[""] for row in trainer] == ["ours", "Trainer"]
    assert [row["attention"] for row in attention] == ["sdpa", "documents"]
    assert all(float(row["tokens/s"].replace(",", "")) > 0 for row in (*trainer, *attention))


def test_trainings_on_one_device_agree_and_resume_to_the_bit(measured: dict) -> None:
    trainings, resumed, attention = measured["numbers"]
    name = next(name for name in trainings[0] if name.startswith("largest difference"))
    assert len(trainings) == 4
    for row in trainings:
        assert float(row[name]) < (1e-5 if "float32" in row["training"] else 1e-2)
        assert float(row["last loss"]) < float(row["first loss"]) - 2.0  # so that a wrong gradient would be detected
    assert all(value == "True" for row in resumed for value in list(row.values())[1:])
    assert all(float(error) < 0.05 for row in attention for error in list(row.values())[1:])


def test_every_other_step_has_a_table(measured: dict) -> None:
    for name in ("loss", "algebra", "checkpoint"):
        assert all(measured[name])
    errors = [row["error"] for row in measured["algebra"][0]]
    assert all(error == "same bits" or float(error.split()[0]) < 1e-4 for error in errors)


def test_a_step_that_fails_or_never_ends_is_reported_with_what_it_printed(tmp_path: Path) -> None:
    failed = run_step(Step("x", "X", 60, "gpu_loss", "neither"), "cpu", tmp_path / "log")
    assert failed["outcome"] == "failed with status 2" and "invalid choice" in failed["failure"]
    endless = run_step(
        Step("y", "Y", 1, "matrix_rate", f"cpu {tmp_path / 'rates.json'} 100000"), "cpu", tmp_path / "log"
    )
    assert endless["outcome"] == "stopped after its limit of 1 s" and endless["seconds"] < 10


def test_tables_are_read_from_markdown() -> None:
    text = "A\n\n| a | b |\n|---|---:|\n| 1 | 2 |\n| 3 | |\n\n| c |  |\n| --- | --- |\n"
    assert tables_in(text) == [[{"a": "1", "b": "2"}, {"a": "3", "b": ""}], []]


def test_wheels_of_what_is_missing_are_downloaded_or_built(tmp_path: Path) -> None:
    """pydantic-core has compiled code for one version of Python, and antlr4 has no wheel."""
    assert names_in("Torch==2.11\n# comment\nPyYAML @ file:///x\n") == {"torch", "pyyaml"}
    everything = missing((), "3.12")
    assert {"torch", "pydantic-core", "omegaconf"} <= everything.keys() and "lm-eval" not in everything
    assert "antlr4-python3-runtime" not in missing(("omegaconf", "hydra-core"), "3.12")
    for name in ("pydantic-core", "antlr4-python3-runtime"):
        fetch(name, importlib.metadata.version(name), tmp_path, "3.12")
    names = sorted(path.name for path in tmp_path.glob("*.whl"))
    assert len(names) == 2 and "none-any" in names[0] and "cp312" in names[1]
