"""Small token blocks, settings and tasks for tests, created with numpy only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.artifacts.task import StageTask, TrackingTarget
from pipeline.config import Train
from tests.plain_settings import NO_TRACKING, cpu_launch

CONF = Path(__file__).resolve().parents[2] / "conf"
VOCABULARY = 384
NEW_LAYERS = (1, 3)


def train_settings(**changes: Any) -> Train:
    """Returns conf/pretrain/default.yaml scaled down for tests. Dictionaries are merged into sections."""
    values = yaml.safe_load((CONF / "pretrain" / "default.yaml").read_text())
    small = {"sequence_length": 32, "global_batch": 4, "micro_batch": 1, "steps": 4, "held_out_blocks": 3}
    small |= {"precision": "float32", "checkpoint_every_steps": 1000, "evaluate_at": [0.0, 1.0]}
    for name, value in {**small, **changes}.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return Train.model_validate_json(json.dumps(values))


def write_blocks(
    directory: Path,
    blocks: int = 10,
    held_out: int = 5,
    length: int = 32,
    ragged: bool = False,
    text: Sequence[int] = (),
) -> Path:
    """Writes a tokenize artifact with documents of random lengths.

    Args:
        directory: where to write it.
        blocks: number of training blocks.
        held_out: number of held-out blocks.
        length: tokens per block.
        ragged: also remove random targets from the loss mask, and all targets of one training block.
        text: the tokens to use instead of random ones.
    """
    random = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    supervised = {}
    for split, count in (("train", blocks), ("held_out", held_out)):
        positions = np.stack([_positions(random, length) for _ in range(count)]) if count else np.zeros((0, length))
        mask = positions > 0
        if ragged:
            mask &= random.random(mask.shape) < random.random((count, 1))
            mask[3:4] &= split == "held_out"
        start = 0 if split == "train" else blocks * length
        ids = np.resize(text[start:], (count, length)) if text else random.integers(3, VOCABULARY, (count, length))
        _save(directory / f"{split}.input_ids.npy", ids, np.uint32)
        _save(directory / f"{split}.position_ids.npy", positions, np.uint32)
        _save(directory / f"{split}.loss_mask.npy", mask, np.uint8)
        supervised[split] = int(mask.sum())
    sizes = {"train": blocks, "held_out": held_out}
    dataset = {
        "purpose": "corpus", "sequence_length": length, "vocab_size": VOCABULARY, "blocks": sizes,
        "documents": sizes, "tokens": {split: count * length for split, count in sizes.items()},
        "supervised_tokens": supervised, "dropped": {},
    }  # fmt: skip
    (directory / "dataset.json").write_text(json.dumps(dataset))
    return directory


def _positions(random: np.random.Generator, length: int) -> np.ndarray:
    """Returns the positions of documents of 3 to 20 tokens, the last one truncated."""
    documents = [np.arange(random.integers(3, 20)) for _ in range(length)]
    return np.concatenate(documents)[:length]


def _save(path: Path, values: np.ndarray, dtype: type) -> None:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=values.shape)
    array[...] = values
    array.flush()


def write_grown(directory: Path, tiny_llama_dir: Path, model: Any, **how: Any) -> Path:
    """Writes a model of 4 layers, of which ``NEW_LAYERS`` are new, with the tokenizer of another directory.

    Args:
        directory: a new directory, which is returned.
        tiny_llama_dir: where the tokenizer is.
        model: of transformers.
        how: arguments of ``save_pretrained``.
    """
    shutil.copytree(tiny_llama_dir, directory)
    model.save_pretrained(directory, **how)
    layers = [{"layer": i, "new": i in NEW_LAYERS, "from": [i]} for i in range(4)]
    expansion = {"method": "copy", "settings": {}, "source": "", "num_base_layers": 2, "num_layers": 4}
    (directory / "expansion.json").write_text(json.dumps({**expansion, "layers": layers}))
    return directory


def training_task(
    settings: Train, model: Path, data: Path, out: Path, processes: int = 1, **parents: Path
) -> StageTask:
    """Creates a pretrain task on CPU workers that writes to ``out``."""
    tracking = NO_TRACKING
    return StageTask(
        name="pretrain",
        settings=settings,
        parents={"model": model, "data": data, **parents},
        out=out,
        seed=0,
        launch=cpu_launch(processes),
        tracking=TrackingTarget(tracking, "test", "pretrain", "test", out / "wandb"),
    )


def logged(task: StageTask, name: str) -> list[float]:
    """Returns the history of one metric from a task's ``metrics.jsonl``."""
    lines = [json.loads(line) for line in (task.out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]
