"""A complete training stage under the driver, killed and restarted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.artifacts.task import StageTask, task_to_json
from pipeline.files import write_json
from pipeline.training.job import CHECKPOINTS, run_training
from tests.training.small import logged, train_settings

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import json, sys
sys.executable = sys.argv[2]  # of the ranks
from pathlib import Path
from pipeline.artifacts.task import task_from_json
from pipeline.training.job import run_training
run_training(task_from_json(json.loads(Path(sys.argv[1]).read_text())))
"""


def running_with(*arguments: str) -> list[str]:
    """Returns the command lines of running processes that contain any of ``arguments``."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # the process has just ended
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if any(argument in line for argument in arguments)]


def test_a_killed_run_resumes_to_bitwise_equal_results(make_task: Callable[..., StageTask], tmp_path: Path):
    settings = train_settings(steps=24, checkpoint_every_steps=4, evaluate_at=[0.0, 0.5, 1.0])
    straight, killed = make_task(settings, 2), make_task(settings, 2)
    run_training(straight)

    write_json(tmp_path / "task.json", task_to_json(killed))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path / "task.json"), sys.executable], cwd=ROOT)
    saved = killed.out / CHECKPOINTS
    while not (saved.exists() and any(saved.iterdir())):  # until the first checkpoint is being written
        assert driver.poll() is None
        time.sleep(0.002)
    assert len(running_with(str(killed.out))) >= 2  # the ranks
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 10
    while running_with(str(tmp_path / "task.json"), str(killed.out)):
        assert time.monotonic() < deadline, "workers outlived their driver"
        time.sleep(0.05)
    assert not (killed.out / "training.json").exists()

    summary = run_training(killed)
    assert summary["steps"] == 24
    for name in ("step", "loss", "learning_rate", "grad_norm", "held_out_loss", "tokens", "flops"):
        assert logged(killed, name) == logged(straight, name), name
    ours, theirs = (load_file(task.out / "model.safetensors") for task in (killed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not saved.exists()  # checkpoints are removed at the end

    before = (killed.out / "metrics.jsonl").stat().st_mtime_ns
    assert run_training(killed) == summary == json.loads((killed.out / "training.json").read_text())
    assert (killed.out / "metrics.jsonl").stat().st_mtime_ns == before  # nothing was repeated
