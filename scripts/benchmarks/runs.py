"""The runs of the pre-training benchmark: inputs and results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pipeline.artifacts.task import task_to_json
from pipeline.config import Train
from pipeline.estimates import Setup, memory_of, trained_part
from pipeline.files import read_json, write_json
from pipeline.models.families import shape_of
from scripts.benchmarks.hf_trainer import SECONDS_FILE
from scripts.benchmarks.our_worker import PROFILE_FILE
from scripts.benchmarks.processes import Peak, run_module
from scripts.benchmarks.shapes import tokens_of
from scripts.benchmarks.tasks import one_process, pretrain_settings, training_task


@dataclass(frozen=True)
class Run:
    """The measurements of one process."""

    seconds: list[float]  # of every step, including the first
    flops_per_step: int  # 0 for the Trainer
    peak: Peak

    @property
    def warm(self) -> list[float]:
        """Seconds of all steps but the first, which compiles and fills caches."""
        return self.seconds[1:]


class Bench:
    """Runs training jobs of one model in one working directory."""

    def __init__(self, options: argparse.Namespace, work: Path, device: str) -> None:
        self.options, self.work, self.device = options, work, device
        self._number = 0
        self.data = write_blocks(work / "data", options)

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return int(self.options.global_batch * self.options.sequence_length)

    def model(self, position: str) -> Path:
        """Returns the expanded model with its new layers at a position, created on first use."""
        options = self.options
        out = self.work / f"model-{position}"
        if not (out / "expansion.json").exists():
            arguments = (options.shape, str(options.new_layers), position, str(out))
            run_module("scripts.benchmarks.models", *arguments, log=self.work / "models.log")
        return out

    def ours(
        self,
        position: str,
        profile: bool = False,
        cold: bool = False,
        wait_policy: str = "passive",
        variables: Mapping[str, str] = MappingProxyType({}),
        **changes: Any,
    ) -> Run:
        """Runs our worker until it has logged enough steps.

        Args:
            position: of the new layers.
            profile: record a profile of one step instead.
            cold: use an empty compilation cache.
            wait_policy: what idle CPU threads do.
            variables: added to the environment.
            changes: settings that differ from the command line's.
        """
        out = self._new_directory("ours")
        task = training_task(
            self._settings(changes), {"model": self.model(position), "data": self.data}, out, self.device
        )
        task = replace(task, launch=task.launch.model_copy(update={"wait_policy": wait_policy}))
        write_json(out / "task.json", task_to_json(task))
        steps = self.options.steps + 1
        peak = run_module(
            "scripts.benchmarks.our_worker", str(out / "task.json"), *(["profile"] if profile else []),
            log=out / "log", until=lambda peak: not profile and len(logged(out)) >= steps,
            variables={"TORCHINDUCTOR_CACHE_DIR": str((out if cold else self.work) / "inductor"), **variables},
        )  # fmt: skip
        lines = logged(out)[:steps]
        totals = [0.0, *(line["seconds"] for line in lines)]
        seconds = [later - before for before, later in pairwise(totals)]
        return Run(seconds, lines[0]["flops"], peak)

    def planned_memory(self, position: str, **changes: Any) -> int:
        """Returns the peak memory in bytes that the plan estimates for ``ours`` on its device."""
        model, settings = self.model(position), self._settings(changes)
        shape = shape_of(read_json(model / "config.json"))
        trained = trained_part("pretrain", settings.trainable, shape, read_json(model / "expansion.json"))
        setup = Setup(settings, self.options.precision, ranks=1, on_gpu=self.device == "cuda")
        return memory_of(trained, setup).total

    def profile(self) -> tuple[float, dict[str, float]]:
        """Returns the seconds of one of our steps, and of its operations by part."""
        self.ours(self.options.position, profile=True)
        found = read_json(self._directory("ours") / PROFILE_FILE)
        return found["seconds"], found["parts"]

    def trainer(self, micro_batch: int, steps: int) -> Run:
        """Runs the Trainer for ``steps`` steps after the first."""
        options, out = self.options, self._new_directory("trainer")
        job = {
            "model": str(self.model(options.position)), "data": str(self.data), "out": str(out),
            "device": self.device, "launch": one_process(self.device).model_dump(mode="json"),
            "precision": options.precision, "zero_stage": options.zero_stage,
            "global_batch": options.global_batch, "micro_batch": micro_batch, "steps": steps + 1,
            "activation_checkpointing": options.activation_checkpointing,
        }  # fmt: skip
        write_json(out / "job.json", job)
        peak = run_module("scripts.benchmarks.hf_trainer", str(out / "job.json"), log=out / "log")
        return Run(read_json(out / SECONDS_FILE), 0, peak)

    def _settings(self, changes: dict[str, Any]) -> Train:
        options = self.options
        settings: dict[str, Any] = {
            "sequence_length": options.sequence_length, "global_batch": options.global_batch, "steps": 1000,
            "micro_batch": options.our_micro_batch, "precision": options.precision, "evaluate_at": [],
            "checkpoint_every_steps": 1000, "activation_checkpointing": options.activation_checkpointing,
            "compile": options.compile, "attention": options.attention, "float32_products": options.float32_products,
            "deepspeed__zero_stage": options.zero_stage,
        }  # fmt: skip
        return pretrain_settings(**settings | changes)

    def _directory(self, name: str) -> Path:
        return self.work / f"{self._number:02d}-{name}"

    def _new_directory(self, name: str) -> Path:
        self._number += 1
        self._directory(name).mkdir()
        return self._directory(name)


def logged(out: Path) -> list[dict[str, Any]]:
    """Returns the metrics of the steps that a running task has logged."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if '"loss"' in line]


def write_blocks(directory: Path, options: argparse.Namespace) -> Path:
    """Writes random tokens in the format of a tokenize artifact, enough for all steps of a run."""
    directory.mkdir()
    blocks, length = options.global_batch * (options.steps + 1), options.sequence_length
    positions = np.tile(np.arange(length) % (options.document_tokens or length), (blocks, 1))
    vocabulary = tokens_of(options.shape)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (blocks, length))
    for split, count in (("train", blocks), ("held_out", 0)):
        for name, values, dtype in (
            ("input_ids", tokens, np.uint32), ("position_ids", positions, np.uint32),
            ("loss_mask", positions > 0, np.uint8),
        ):  # fmt: skip
            np.save(directory / f"{split}.{name}.npy", values[:count].astype(dtype), allow_pickle=False)
    sizes = {"train": blocks, "held_out": 0}
    dataset = {
        "purpose": "corpus", "sequence_length": length, "vocab_size": vocabulary, "blocks": sizes, "documents": sizes,
        "tokens": sizes, "supervised_tokens": {"train": int((positions > 0).sum()), "held_out": 0}, "dropped": {},
    }  # fmt: skip
    write_json(directory / "dataset.json", dataset)
    return directory
