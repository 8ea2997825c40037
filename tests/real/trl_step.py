"""One step of TRL's SFTTrainer on a LoRA adapter of PEFT, merged into the model.

``python -m tests.real.trl_step BASE TUNED [BASE TUNED ...]`` is a program of its own, because transformers looks for
PEFT when it is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

CHATS = [
    {"messages": [{"role": "user", "content": f"Item {item}?"}, {"role": "assistant", "content": "Yes, it is."}]}
    for item in range(4)
]


def tune(base: Path, out: Path) -> None:
    """Trains a model directory and writes the result with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = SFTConfig(
        output_dir=str(out / "trainer"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(CHATS),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["o_proj", "down_proj"]),
    )
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    paths = [Path(path) for path in sys.argv[1:]]
    for base, out in zip(paths[::2], paths[1::2], strict=True):
        tune(base, out)
