"""Our training: ``python -m scripts.benchmarks.our_worker TASK.json [profile]`` trains like the pretrain stage.

With ``PIPELINE_LOG_DIR`` it is a worker that records a profile of its third step instead.
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
# An operation belongs to the first part with a pattern that its name contains.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "gemm", "nvjet"),
    "attention": ("attend_by_document", "scaled_dot_product", "flash", "fmha"),
    "optimizer": ("adam",),
    "fused small operations": ("CompiledFxGraph", "triton"),
}


def train(task: StageTask) -> None:
    """Runs the stage until the benchmark, which reads the logged steps, ends this process."""
    from pipeline.training.job import run_training

    run_training(task)


def profile(task: StageTask) -> None:
    """Starts a worker that profiles one step."""
    job = task.out / "profile-task.json"
    from pipeline.artifacts.task import task_to_json

    write_json(job, task_to_json(task))
    run_workers("scripts.benchmarks.our_worker", job, task.launch, task.out / "logs")


def profiled_worker(task: StageTask, log_dir: Path) -> None:
    """Trains, and profiles the time between the third and the fourth call of the stop callback, which is one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from pipeline.training.trainer import train as train_task

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if _on_gpu() else [])
    profiler = torch_profile(activities=activities)
    called: list[float] = []  # times of the calls, one per step

    def wants_stop() -> bool:
        if len(called) == 3:
            profiler.stop()
        called.append(time.perf_counter())
        if len(called) == 3:
            profiler.start()
        return len(called) == 4

    train_task(task, log_dir, wants_stop)
    parts = seconds_by_part(profiler.key_averages())
    write_json(task.out / PROFILE_FILE, {"seconds": called[3] - called[2], "parts": parts})
    write_json(log_dir / OUTCOME_FILE, {"status": "done"})


def _on_gpu() -> bool:
    return os.environ["DS_ACCELERATOR"] == "cuda"


def seconds_by_part(events: Any) -> dict[str, float]:
    """Returns the seconds spent in each part, in descending order: in its operations or, on a GPU, in its kernels."""
    from torch.autograd import DeviceType

    seconds: dict[str, float] = {}
    for event in events:
        if _on_gpu() and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue  # an operation includes the time of its kernels, which are separate events
        own = event.self_device_time_total if _on_gpu() else event.self_cpu_time_total
        part = part_of(event.key)
        seconds[part] = seconds.get(part, 0.0) + own / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def part_of(operation: str) -> str:
    """Returns the part that an operation or kernel belongs to."""
    for part, patterns in PARTS.items():
        if any(pattern in operation for pattern in patterns):
            return part
    return "all other operations"


def main() -> None:
    """Trains, starts a profiled training, or runs the profiled worker."""
    end_with_parent()  # otherwise an interrupted benchmark would leave a training run of a thousand steps behind
    task = task_from_json(read_json(Path(sys.argv[1])))
    if LOG_DIR_VARIABLE in os.environ:
        profiled_worker(task, Path(os.environ[LOG_DIR_VARIABLE]))
    elif sys.argv[2:] == ["profile"]:
        profile(task)
    else:
        train(task)


if __name__ == "__main__":
    main()
