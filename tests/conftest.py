"""Fixtures shared by all tests: tiny random models, data and settings, without a network or real weights."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from pipeline.config import AnyExpand
from tests import warm

TINY_TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b",
    "Return the number of items in a container.",
    "user assistant system json dumps loads file open read write",
] * 50


def pytest_configure() -> None:
    """Creates the replacement for the interpreter in the first process, which shares it with its xdist workers."""
    if warm.VARIABLE not in os.environ:
        os.environ[warm.VARIABLE] = str(warm.install())


@pytest.fixture(scope="session", autouse=True)
def warm_processes() -> Iterator[None]:
    """Makes stages, launchers and ranks that this process starts skip their imports; see ``tests.warm``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", os.environ[warm.VARIABLE])
        yield


@pytest.fixture
def real_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the test start new interpreters, as in production."""
    monkeypatch.setattr(sys, "executable", warm.REAL)


def pytest_collection_finish() -> None:
    """Applies the pipeline's settings for vector math to tests that compute in this process."""
    if "torch" in sys.modules:
        from pipeline.models.vector_math import initialize_vector_math

        initialize_vector_math()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE of 384 tokens with the chat template and special tokens of SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TINY_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A random 4-layer Llama (grouped-query attention, tied embeddings) as a Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
    directory = tmp_path_factory.mktemp("tiny_llama")
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama_with_bos(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer that prepends ``<|endoftext|>`` to every text, like Llama's BOS token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("with_bos") / "model"
    shutil.copytree(tiny_llama_dir, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 60 different short documents."""
    lines = [
        json.dumps({"text": f"Document {index}. " + " ".join(TINY_TEXT[(index + shift) % 4] for shift in range(4))})
        for index in range(60)
    ]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def tiny_chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 40 single-turn conversations."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is item {index}?"},
                    {"role": "assistant", "content": f"The number of item {index} in a container."},
                ]
            }
        )
        for index in range(40)
    ]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def shrunk(tiny_llama_dir: Path, tiny_corpus: Path, tiny_chats: Path) -> list[str]:
    """Overrides that make any experiment run on the tiny model within seconds."""
    sizes = {"sequence_length": 64, "global_batch": 4, "micro_batch": 2, "steps": 3, "epochs": "null",
             "held_out_blocks": 2, "checkpoint_every_steps": 1, "activation_checkpointing": "false"}  # fmt: skip
    return [
        "model=hub", f"model.path={tiny_llama_dir}", "model.dtype=float32",
        "data=files", f"data.corpus.path={tiny_corpus}", f"data.instructions.path={tiny_chats}",
        "data.held_out_fraction=0.2", "expand.new_layers=2",
        *(f"{stage}.{name}={value}" for stage in ("pretrain", "sft") for name, value in sizes.items()),
        "evaluate=bundled", "evaluate.tasks=[held_out_text]", "evaluate.limit=4",
        "tracking=disabled", "launch.processes=1", "launch.threads=1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def expand_settings() -> Callable[..., AnyExpand]:
    """``expand_settings("lesa", new_layers=2, variant="paper")`` returns a method's defaults with some changes."""
    conf = Path(__file__).resolve().parent.parent / "conf"
    shared = OmegaConf.load(conf / "config.yaml")["expand"]

    def compose(method: str, **changes: Any) -> AnyExpand:
        own = OmegaConf.load(conf / "expand" / f"{method}.yaml")
        composed = OmegaConf.create({"expand": OmegaConf.merge(own, shared, changes)})
        values: Any = OmegaConf.to_container(composed, resolve=True)
        values["expand"].pop("variants", None)
        settings: AnyExpand = TypeAdapter(AnyExpand).validate_python(values["expand"])
        return settings

    return compose
