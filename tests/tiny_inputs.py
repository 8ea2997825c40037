"""Tiny random inputs: a tokenizer, a model, a corpus, conversations, and settings that make any experiment use them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import AnyExpand

CONF = Path(__file__).resolve().parent.parent / "conf"

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b",
    "Return the number of items in a container.",
    "user assistant system json dumps loads file open read write",
] * 50


def make_tokenizer() -> Any:
    """Returns a byte-level BPE of 384 tokens with the chat template and special tokens of SmolLM2."""
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
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return fast


def write_llama(directory: Path, tokenizer: Any) -> None:
    """Writes a random 4-layer Llama (grouped-query attention, tied embeddings) as a Hugging Face directory."""
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
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_corpus(path: Path) -> None:
    """Writes a JSONL file with 60 different short documents."""
    lines = [
        json.dumps({"text": f"Document {index}. " + " ".join(TEXT[(index + shift) % 4] for shift in range(4))})
        for index in range(60)
    ]
    path.write_text("\n".join(lines))


def write_chats(path: Path) -> None:
    """Writes a JSONL file with 40 single-turn conversations."""
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
    path.write_text("\n".join(lines))


def shrinking_overrides(model: Path, corpus: Path, chats: Path) -> list[str]:
    """Returns overrides that make any experiment run on tiny inputs within seconds."""
    sizes = {"sequence_length": 64, "global_batch": 4, "micro_batch": 2, "steps": 3, "epochs": "null",
             "held_out_blocks": 2, "checkpoint_every_steps": 1, "activation_checkpointing": "false",
             "precision": "float32"}  # fmt: skip
    return [
        "model=hub", f"model.path={model}", "model.dtype=float32",
        "data=files", f"data.corpus.path={corpus}", f"data.instructions.path={chats}",
        "data.held_out_fraction=0.2", "expand.new_layers=2",
        *(f"{stage}.{name}={value}" for stage in ("pretrain", "sft") for name, value in sizes.items()),
        "evaluate=bundled", "evaluate.tasks=[held_out_text]", "evaluate.limit=4", "evaluate.sample_answers=0",
        "tracking=none", "launch.processes=1", "launch.threads=1",
    ]  # fmt: skip


@contextmanager
def coarse_plots() -> Iterator[None]:
    """Plots have few pixels and a simple layout, because drawing them takes most of a report's time."""
    from pipeline.report import plot_style

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_style, "DPI", 20)
        patch.setitem(plot_style._STYLE, "figure.constrained_layout.use", False)
        yield


def expand_settings(method: str, **changes: Any) -> AnyExpand:
    """``expand_settings("lesa", new_layers=2, variant="paper")`` returns a method's defaults with some changes."""
    from omegaconf import OmegaConf

    composed = OmegaConf.create({"expand": OmegaConf.merge(_expand_defaults(method), changes)})
    values: Any = OmegaConf.to_container(composed, resolve=True)
    values["expand"].pop("variants", None)
    settings: AnyExpand = _expand_type().validate_python(values["expand"])
    return settings


@cache
def _expand_defaults(method: str) -> Any:
    """Reads the files once for the hundreds of tests that need them."""
    from omegaconf import OmegaConf

    own = OmegaConf.load(CONF / "expand" / f"{method}.yaml")
    return OmegaConf.merge(own, OmegaConf.load(CONF / "config.yaml")["expand"])


@cache
def _expand_type() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(AnyExpand)
