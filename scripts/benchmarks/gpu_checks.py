"""Whether a device computes what the CPU does: python -m scripts.benchmarks.gpu_checks cuda|cpu

A tiny model is trained for ten steps on packed documents, in float32 on the CPU and on the device in both precisions at
all ZeRO stages. Then a run is stopped after five steps and resumed. Attention by document and with a mask, with
and without cuDNN, is compared with dense attention in float32; cuDNN's backward pass with a mask has returned NaN for
blocks of 704 tokens (https://github.com/pytorch/pytorch/issues/196678).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.artifacts.task import StageTask, task_from_json, task_to_json
from pipeline.files import read_json, write_json
from pipeline.launch.child import end_with_parent
from pipeline.launch.workers import LOG_DIR_VARIABLE, OUTCOME_FILE, run_workers
from scripts.benchmarks.models import make
from scripts.benchmarks.pretrain import row, say
from scripts.benchmarks.runs import logged, write_blocks
from scripts.benchmarks.tasks import one_process, pretrain_settings, training_task

STEPS, STOP_AFTER = 10, 5
LENGTH = 64
LEARNED_TOKENS = 32  # which the text consists of
AWKWARD_LENGTH = 704  # tokens, 64 modulo 128


@dataclass(frozen=True)
class Case:
    """One training."""

    device: str
    precision: str
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.device}, {self.precision}, ZeRO {self.zero_stage}"

    def task(self, model: Path, data: Path, out: Path) -> StageTask:
        """Returns the task of the pretrain stage, with its directory created."""
        settings = pretrain_settings(
            sequence_length=LENGTH, global_batch=4, micro_batch=2, steps=STEPS, precision=self.precision,
            trainable="all", learning_rate=1e-2, evaluate_at=[], compile=False,
            checkpoint_every_steps=1000, deepspeed__zero_stage=self.zero_stage,
        )  # fmt: skip
        out.mkdir()
        return training_task(settings, {"model": model, "data": data}, out, self.device)


# ---------------------------------------------------------------------------------------------- training


def run_plan(
    plan: Sequence[tuple[StageTask, int | None]], device: str, work: Path, threads: int | Literal["auto"] = "auto"
) -> None:
    """Runs tasks one after the other in one process, each until a step or to its end."""
    file = work / f"plan-{device}-{len(plan)}.json"
    write_json(file, [{"task": task_to_json(task), "stop_after": stop} for task, stop in plan])
    logs = file.with_suffix("")
    logs.mkdir()
    launch = one_process(device).model_copy(update={"threads": threads})
    run_workers("scripts.benchmarks.gpu_checks", file, launch, logs)


def worker(plan: Path, log_dir: Path) -> None:
    """Runs the plan as the only rank."""
    from pipeline.training.trainer import train

    for entry in read_json(plan):
        task, asked = task_from_json(entry["task"]), 0
        logs = task.out / "logs"
        logs.mkdir(exist_ok=True)

        def wants_stop() -> bool:
            nonlocal asked
            asked += 1
            return asked == entry["stop_after"]  # noqa: B023 - called only within this iteration

        train(task, logs, wants_stop)
    write_json(log_dir / OUTCOME_FILE, {"status": "done"})


def losses(task: StageTask) -> list[float]:
    """Returns the loss of every step."""
    return [line["loss"] for line in logged(task.out)]


def compare_trainings(device: str, work: Path) -> None:
    """Prints how far losses are from those of the CPU, and whether a resumed run equals an uninterrupted one."""
    model = work / "model"
    make("tiny", 2, "interleaved", model)
    options = argparse.Namespace(shape="tiny", global_batch=4, steps=STEPS, sequence_length=LENGTH, document_tokens=24)
    data = write_blocks(work / "data", options)
    ids = data / "train.input_ids.npy"
    np.save(ids, np.load(ids) % LEARNED_TOKENS)  # so that the loss falls
    reference = Case("cpu", "float32", 0)
    stages = range(4) if device == "cuda" else (0, 2)  # tests cover all stages on CPUs
    cases = [Case(device, precision, stage) for precision in ("float32", "bfloat16") for stage in stages]
    tasks = {case: case.task(model, data, work / f"case-{index}") for index, case in enumerate(cases)}
    again = Case(device, "bfloat16", 2)
    repeated = {name: again.task(model, data, work / name) for name in ("again", "resumed")}
    expected = tasks.get(reference) or reference.task(model, data, work / "reference")
    if reference not in tasks:
        run_plan([(expected, None)], "cpu", work)
    plan = [*((task, None) for task in tasks.values()), (repeated["again"], None), (repeated["resumed"], STOP_AFTER)]
    run_plan([*plan, (repeated["resumed"], None)], device, work)

    say(row("training", "largest difference of a loss from CPU, float32", "first loss", "last loss"), row(*["---"] * 4))
    for case, task in tasks.items():
        pairs = list(zip(losses(task), losses(expected), strict=True))
        difference = max(abs(ours / theirs - 1) for ours, theirs in pairs)
        say(row(str(case), f"{difference:.1e}", f"{pairs[0][0]:.5f}", f"{pairs[-1][0]:.5f}"))
    straight = tasks[again]
    say("", row(f"{again}", "same losses", "same weights"), row(*["---"] * 3))
    for name, task in (("the same training again", repeated["again"]), ("resumed", repeated["resumed"])):
        weights = [(each.out / "model.safetensors").read_bytes() for each in (task, straight)]
        say(row(name, str(losses(task) == losses(straight)), str(weights[0] == weights[1])))


# --------------------------------------------------------------------------------------------- attention


def compare_attention(device: torch.device) -> None:
    """Prints the errors of attention's output and gradients in bfloat16."""
    from pipeline.training.attention import attend_by_document

    heads, keys, size, lengths = 8, 2, 64, (300, 1, 403)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, AWKWARD_LENGTH, size) for count in (heads, keys, keys, heads)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    documents = (positions == 0).cumsum(1)
    mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (each.repeat_interleave(heads // keys, dim=1) for each in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def by_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_by_document(torch.nn.Module(), q, k, v, None, position_ids=positions)[0].transpose(1, 2)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (each.repeat_interleave(heads // keys, dim=1) for each in (k, v))
        scores = (q @ k.transpose(2, 3) / size**0.5).masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v

    expected = _output_and_gradients(dense, [each.float() for each in (q, k, v)], grad.float())
    say("", row(f"attention, {AWKWARD_LENGTH} tokens", *(f"error of {x}" for x in ("out", "dq", "dk", "dv"))))
    say(row(*["---"] * 5))
    for name, function, cudnn in (("by document", by_document, True), ("mask", masked, True), ("mask", masked, False)):
        with _cudnn(cudnn):
            found = _output_and_gradients(function, [q, k, v], grad)
        errors = [((x.float() - y).abs().max() / y.abs().max()).item() for x, y in zip(found, expected, strict=True)]
        label = name if name == "by document" else f"{name}, cuDNN {'allowed' if cudnn else 'excluded'}"
        say(row(label, *(f"{error:.1e}" for error in errors)))


def _output_and_gradients(function: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@contextmanager
def _cudnn(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def main() -> None:
    """Prints the tables, or runs the tasks of a plan as a worker."""
    if LOG_DIR_VARIABLE in os.environ:
        end_with_parent()
        worker(Path(sys.argv[1]), Path(os.environ[LOG_DIR_VARIABLE]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=["cuda", "cpu"])
    device = parser.parse_args().device
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as folder:
        compare_trainings(device, Path(folder))
    compare_attention(torch.device(device))
    if device == "cuda":
        facts = {"cuDNN": torch.backends.cudnn.version(), "capability": torch.cuda.get_device_capability()}
        say("", f"{torch.cuda.get_device_name()}: {json.dumps(facts)}")


if __name__ == "__main__":
    main()
