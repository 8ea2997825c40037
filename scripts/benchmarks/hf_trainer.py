"""The baseline: transformers' Trainer with its DeepSpeed integration, set up as its documentation recommends.

``python -m scripts.benchmarks.hf_trainer JOB.json`` starts the ranks, which run the same module. The ZeRO 2
section is from huggingface.co/docs/transformers/deepspeed, with "auto" wherever that page has it. The optimizer is the
Trainer's default, torch's fused AdamW. Nothing is evaluated or reported during training, and nothing is saved unless
the job contains ``save``.
"""

from __future__ import annotations

import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.config import Launch
from pipeline.files import read_json, write_json
from pipeline.launch.child import end_with_parent
from pipeline.launch.workers import LOG_DIR_VARIABLE, OUTCOME_FILE, run_workers

SECONDS_FILE = "seconds.json"
SAVES_FILE = "saves.json"


def deepspeed_config(zero_stage: int) -> dict[str, Any]:
    """Returns the configuration that the documentation recommends for a ZeRO stage."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage in (1, 2):
        zero |= {
            "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": True, "reduce_scatter": True,
            "reduce_bucket_size": 5e8, "contiguous_gradients": True, "round_robin_gradients": True,
        }  # fmt: skip
    if zero_stage == 3:
        zero |= {
            "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        }  # fmt: skip
    return {
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


def train(job: dict[str, Any], out: Path) -> None:
    """Trains for ``job["steps"]`` steps, and writes the duration of each."""
    import numpy as np
    import torch
    from torch.utils.data import Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from pipeline.training.freeze import freeze_others, select_trainable
    from pipeline.training.process_group import join_process_group

    on_gpu = job["device"] == "cuda"
    join_process_group(torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu"))

    class Blocks(Dataset[dict[str, torch.Tensor]]):
        def __init__(self) -> None:
            self._ids = np.load(Path(job["data"]) / "train.input_ids.npy", mmap_mode="r")

        def __len__(self) -> int:
            return len(self._ids)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(self._ids[index].astype(np.int64))
            return {"input_ids": ids, "labels": ids}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.saves: list[float] = []  # seconds

        def on_train_begin(self, *arguments: Any, **names: Any) -> None:
            self.times.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **names: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

        def on_save(self, *arguments: Any, **names: Any) -> None:
            self.saves.append(time.perf_counter() - self.times[-1])

    # The arguments must exist before the model, because ZeRO 3 partitions the weights while they are loaded.
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        deepspeed=deepspeed_config(job["zero_stage"]),
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["global_batch"] // job["micro_batch"],
        max_steps=job["steps"],
        bf16=job["precision"] == "bfloat16",
        use_cpu=job["device"] == "cpu",
        ddp_backend="gloo" if job["device"] == "cpu" else None,
        learning_rate=1e-3, lr_scheduler_type="cosine", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        gradient_checkpointing=job["activation_checkpointing"],
        save_strategy="steps" if job.get("save") else "no", save_steps=1, save_total_limit=2,
        logging_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model_dir = Path(job["model"])
    dtype = getattr(torch, job["precision"])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa")
    freeze_others(model, select_trainable("pretrain", "auto", model, model_dir))
    clock = Clock()
    trainer = Trainer(model=model, args=arguments, train_dataset=Blocks(), callbacks=[clock])
    assert trainer.is_deepspeed_enabled
    trainer.train()
    write_json(out / SECONDS_FILE, [later - before for before, later in pairwise(clock.times)])
    if clock.saves:
        last = out / "trainer" / f"checkpoint-{job['steps']}"
        size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
        write_json(out / SAVES_FILE, {"saved": len(clock.saves), "seconds": sum(clock.saves), "bytes": size})


def main() -> None:
    """Trains on a rank, or starts the ranks."""
    end_with_parent()
    job = read_json(Path(sys.argv[1]))
    out = Path(job["out"])
    if LOG_DIR_VARIABLE not in os.environ:
        launch = Launch.model_validate(job["launch"])
        run_workers("scripts.benchmarks.hf_trainer", Path(sys.argv[1]), launch, out / "logs")
        return
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # it would be compiled on first use, but only serves inference
    )
    train(job, out)
    write_json(Path(os.environ[LOG_DIR_VARIABLE]) / OUTCOME_FILE, {"status": "done"})


if __name__ == "__main__":
    main()
