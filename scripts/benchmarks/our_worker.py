"""Our contender: ``python -m scripts.benchmarks.our_worker TASK.json`` trains as the pretrain stage does.

Under torchrun (``PIPELINE_LOG_DIR`` is set) it is a worker that records a profile of its third step instead.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.artifacts.task import StageTask, task_from_json
from pipeline.files import read_json, write_json
from pipeline.launch.child import end_with_parent
from pipeline.launch.workers import LOG_DIR_VARIABLE, OUTCOME_FILE, run_workers

PROFILE_FILE = "profile.json"
# The first pattern found in an operation's name decides.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "gemm", "nvjet"),
    "attention": ("attend_by_document", "scaled_dot_product", "flash", "fmha"),
    "optimizer": ("adam",),
    "fused small operations": ("CompiledFxGraph", "triton"),
}


def train(task: StageTask) -> None:
    """The stage itself; whoever started us ends us when enough steps are logged."""
    from pipeline.training.job import run_training

    run_training(task)


def profile(task: StageTask) -> None:
    """Starts this file as a worker that profiles one step."""
    job = task.out / "profile-task.json"
    from pipeline.artifacts.task import task_to_json

    write_json(job, task_to_json(task))
    run_workers("scripts.benchmarks.our_worker", job, task.launch, task.out / "logs")


def profiled_worker(task: StageTask, log_dir: Path) -> None:
    """Trains, and records the time from the third step's gradients to the fourth's."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from pipeline.training.trainer import train as train_session

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if _on_gpu() else [])
    profiler = torch_profile(activities=activities)
    asked: list[float] = []  # when, once a step

    def wants_stop() -> bool:
        if len(asked) == 3:
            profiler.stop()
        asked.append(time.perf_counter())
        if len(asked) == 3:
            profiler.start()
        return len(asked) == 4

    train_session(task, log_dir, wants_stop)
    parts = seconds_by_part(profiler.key_averages())
    write_json(task.out / PROFILE_FILE, {"seconds": asked[3] - asked[2], "parts": parts})
    write_json(log_dir / OUTCOME_FILE, {"status": "done"})


def _on_gpu() -> bool:
    return os.environ["DS_ACCELERATOR"] == "cuda"


def seconds_by_part(events: Any) -> dict[str, float]:
    """Seconds of every part's own operations, largest first; on a GPU those of its kernels."""
    from torch.autograd import DeviceType

    seconds: dict[str, float] = {}
    for event in events:
        if _on_gpu() and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue  # an operation carries the time of its kernels, which are events of their own
        own = event.self_device_time_total if _on_gpu() else event.self_cpu_time_total
        part = part_of(event.key)
        seconds[part] = seconds.get(part, 0.0) + own / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def part_of(operation: str) -> str:
    """The part that an operation or kernel belongs to."""
    for part, patterns in PARTS.items():
        if any(pattern in operation for pattern in patterns):
            return part
    return "all other operations"


def main() -> None:
    """As a worker, a driver to be profiled, or a driver."""
    end_with_parent()  # else a benchmark that is interrupted would leave a training of a thousand steps behind
    task = task_from_json(read_json(Path(sys.argv[1])))
    if LOG_DIR_VARIABLE in os.environ:
        profiled_worker(task, Path(os.environ[LOG_DIR_VARIABLE]))
    elif sys.argv[2:] == ["profile"]:
        profile(task)
    else:
        train(task)


if __name__ == "__main__":
    main()
