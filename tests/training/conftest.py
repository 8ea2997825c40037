"""Token blocks and tasks for training tests, made with numpy alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.config import Launch, Tracking, Train
from pipeline.stage import StageTask, TrackingTarget

CONF = Path(__file__).resolve().parents[2] / "conf"
VOCABULARY = 384
NEW_LAYERS = (1, 3)


def train_settings(**changes: Any) -> Train:
    """conf/pretrain/default.yaml at a size for tests; a dictionary changes a section's members."""
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
    """A tokenize artifact in documents of random lengths, of random tokens or of those of ``text``.

    ``ragged`` masks random targets too.
    """
    random = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    supervised = {}
    for split, count in (("train", blocks), ("held_out", held_out)):
        positions = np.stack([_positions(random, length) for _ in range(count)]) if count else np.zeros((0, length))
        mask = positions > 0
        if ragged:
            mask &= random.random(mask.shape) < random.random((count, 1))
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
    """Documents of 3 to 20 tokens, the last one cut."""
    documents = [np.arange(random.integers(3, 20)) for _ in range(length)]
    return np.concatenate(documents)[:length]


def _save(path: Path, values: np.ndarray, dtype: type) -> None:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=values.shape)
    array[...] = values
    array.flush()


@pytest.fixture(scope="session")
def blocks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training blocks of 32 tokens with ragged masks, five held out."""
    return write_blocks(tmp_path_factory.mktemp("blocks"), ragged=True)


@pytest.fixture(scope="session")
def grown_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A random 4-layer Llama whose ``expansion.json`` calls layers 1 and 3 new.

    The hidden size is odd, so that two ranks do not divide its norms and ZeRO has to pad.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("grown") / "model"
    shutil.copytree(tiny_llama_dir, directory)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=33, head_dim=8, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    layers = [{"layer": i, "new": i in NEW_LAYERS, "from": [i]} for i in range(4)]
    expansion = {"method": "copy", "settings": {}, "source": "", "num_base_layers": 2, "num_layers": 4}
    (directory / "expansion.json").write_text(json.dumps({**expansion, "layers": layers}))
    return directory


@pytest.fixture(scope="session")
def make_task(tmp_path_factory: pytest.TempPathFactory, grown_dir: Path, blocks_dir: Path) -> Callable[..., StageTask]:
    """Builds a pretrain task on the tiny model: ``make_task(settings, processes=2)``."""

    def make(settings: Train, processes: int = 1, out: Path | None = None, **parents: Path) -> StageTask:
        return StageTask(
            name="pretrain",
            settings=settings,
            parents={"model": grown_dir, "data": blocks_dir, **parents},
            out=out or tmp_path_factory.mktemp("out"),
            seed=0,
            launch=Launch(device="cpu", processes=processes, threads=1),
            tracking=TrackingTarget(
                settings=Tracking(wandb="disabled", project="test", entity=None),
                group="test", job_type="pretrain", run_id="test", wandb_dir=tmp_path_factory.mktemp("wandb"),
            ),
        )  # fmt: skip

    return make


def logged(task: StageTask, name: str) -> list[float]:
    """One number's history from a task's ``metrics.jsonl``."""
    lines = [json.loads(line) for line in (task.out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]
