"""Fixtures of the training tests: token blocks and a tiny expanded model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.artifacts.task import StageTask
from pipeline.config import Train
from tests.training.forked import ForkedRanks
from tests.training.small import VOCABULARY, training_task, write_blocks, write_grown


@pytest.fixture(scope="session")
def blocks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training blocks and five held-out blocks of 32 tokens with ragged masks."""
    return write_blocks(tmp_path_factory.mktemp("blocks"), ragged=True)


@pytest.fixture(scope="session")
def splits_dir(tmp_path_factory: pytest.TempPathFactory, blocks_dir: Path) -> Path:
    """The same blocks. Copies of the held-out ones are the validation split, and of the others the forgetting text."""
    directory = tmp_path_factory.mktemp("splits") / "blocks"
    shutil.copytree(blocks_dir, directory)
    for copied, split in (("held_out", "validation"), ("train", "forgetting")):
        for path in directory.glob(f"{copied}.*.npy"):
            shutil.copyfile(path, directory / path.name.replace(copied, split))
    return directory


@pytest.fixture(scope="session")
def grown_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A random Llama of 4 layers whose ``expansion.json`` marks layers 1 and 3 as new.

    The hidden size is odd, so two ranks do not divide its norms and ZeRO has to pad.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=33, head_dim=8, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    return write_grown(tmp_path_factory.mktemp("grown") / "model", tiny_llama_dir, LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def make_task(tmp_path_factory: pytest.TempPathFactory, grown_dir: Path, blocks_dir: Path) -> Callable[..., StageTask]:
    """Creates a pretrain task on the tiny model, or other parents: ``make_task(settings, processes=2, model=path)``."""

    def make(settings: Train, processes: int = 1, out: Path | None = None, **parents: Path) -> StageTask:
        parents = {"model": grown_dir, "data": blocks_dir, **parents}
        return training_task(settings, out=out or tmp_path_factory.mktemp("out"), processes=processes, **parents)

    return make


@pytest.fixture(scope="session")
def forked_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRanks]:
    """Starts ranks by forking. Its users need the xdist group "distributed", so that they share one server."""
    server = ForkedRanks(tmp_path_factory.mktemp("forked"))
    yield server
    server.close()
