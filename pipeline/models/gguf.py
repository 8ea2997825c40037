"""Reads the metadata of a GGUF file, without its weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the ``gguf`` package takes seconds to
read the vocabulary. This one skips it and takes milliseconds.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import UserError

_NUMBER_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOAT_TYPES = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}  # of tensors
MAX_STRING_BYTES = 2**26  # chat templates are the longest
# Families by architecture: those of the language models in GGUF_CONFIG_MAPPING (transformers.integrations.ggml) and in
# GGUF_CONFIG_ARCHS (transformers.integrations.gguf), as load_gguf_checkpoint names them. The driver imports neither.
ARCHITECTURES = {
    **{name: name for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "starcoder2", "stablelm")},
    **{name: name for name in ("gpt2", "bloom", "mamba", "nemotron", "deci", "lfm2")},
    "gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe",
    "minimax-m2": "minimax_m2", "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text",
}  # fmt: skip
MISREAD = {  # architectures in the same tables whose models would be wrong
    "falcon": "llama.cpp reorders its fused attention weights, and transformers does not undo that",
    "gemma4": "its sliding and full attention layers differ in head size, and only one size is read",
}
SCALED_ROTATION = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_CONFIG_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
# Entries that transformers does not read from the files of every architecture.
UNREAD = (
    "vocab_size", "head_dim", "sliding_window", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size",
)  # fmt: skip


@dataclass(frozen=True)
class Metadata:
    """The part of a GGUF file before its weights.

    Attributes:
        values: metadata by key. Of arrays, only those of the tokenizer, each as its length.
        tensor_names: in the order of the file.
        tensors: the number of tensors by type. Types of quantized tensors are numbers.
        elements: the number of elements of all tensors by type.
    """

    values: dict[str, Any]
    tensor_names: tuple[str, ...]
    tensors: Mapping[str, int]
    elements: Mapping[str, int]

    def config(self) -> dict[str, Any]:
        """Returns the config.json entries that determine sizes and limits, plus ``has_chat_template``.

        llama.cpp's converter writes 0 for what a model does not have, such as a sliding window. transformers would
        take 0 for the size of the window.
        """
        architecture = self.values.get("general.architecture")
        config = {name: self.values.get(f"{architecture}.{key}") for name, key in _CONFIG_KEYS.items()}
        config["vocab_size"] = config["vocab_size"] or self.values.get("tokenizer.ggml.tokens")
        return {
            **{name: value for name, value in config.items() if value},
            "model_type": ARCHITECTURES.get(str(architecture), architecture),
            "tie_word_embeddings": "output.weight" not in self.tensor_names,
            "has_chat_template": "tokenizer.chat_template" in self.values,
        }

    @property
    def rotary(self) -> dict[str, float]:
        """What the file says about rotary positions, as entries of ``rope_parameters``."""
        architecture, config = self.values.get("general.architecture"), self.config()
        base, rotated = (self.values.get(f"{architecture}.rope.{key}") for key in ("freq_base", "dimension_count"))
        stated = {} if base is None else {"rope_theta": base}
        if rotated is not None and config.get("num_attention_heads"):
            size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            stated["partial_rotary_factor"] = rotated / size
        return stated

    def check(self, where: object) -> None:
        """Checks that transformers reads everything that determines what the model computes.

        Raises:
            UserError: it does not.
        """
        architecture = str(self.values.get("general.architecture"))
        if architecture in MISREAD:
            rule = f"files of the architecture {architecture} are not supported: {MISREAD[architecture]}"
        elif architecture not in ARCHITECTURES:
            rule = f"transformers does not read GGUF files of the architecture {architecture}"
        elif architecture == "llama" and self.values.get("llama.expert_count"):
            rule = "it is a mixture of experts of the architecture llama, whose experts transformers does not read"
        elif (factor := self.values.get(f"{architecture}.rope.scaling.factor", 1.0)) != 1.0:
            rule = f"it scales rotary positions (rope.scaling.factor {factor:g}), which transformers does not read"
        elif scaled := sorted(set(SCALED_ROTATION) & set(self.tensor_names)):
            rule = f"it scales rotary positions ({scaled[0]}), which transformers does not read"
        else:
            return
        remedy = "Use the model's safetensors, for example from the Hugging Face Hub."
        raise UserError(setting="model.gguf_file", value=where, rule=rule, remedy=remedy)


def read_metadata(path: Path) -> Metadata:
    """Reads everything before the weights.

    Raises:
        UserError: the file is not a little-endian GGUF file of version 2 or 3, or is truncated or damaged.
    """
    with open(path, "rb") as stream:
        try:
            if stream.read(4) != b"GGUF" or _number(stream, "I") not in (2, 3):
                raise _unreadable(path, "this is not a GGUF file of version 2 or 3")
            tensors, entries = _number(stream, "Q"), _number(stream, "Q")
            values = {}
            for _ in range(entries):
                key, kind = _string(stream), _number(stream, "I")
                value = _value(stream, kind)
                if kind != _ARRAY or key.startswith("tokenizer."):
                    values[key] = value
            names, number_of, elements = [], Counter[str](), Counter[str]()
            for _ in range(tensors):
                name, type_, count = _tensor(stream)
                names.append(name)
                number_of[type_] += 1
                elements[type_] += count
            return Metadata(values, tuple(names), number_of, elements)
        except (struct.error, ValueError, OverflowError, KeyError, RecursionError) as error:
            raise _unreadable(path, "the file is truncated or damaged") from error


def _unreadable(path: Path, rule: str) -> UserError:
    remedy = "Download the file again, or set model.gguf_file to another one."
    return UserError(setting="model.gguf_file", value=path, rule=rule, remedy=remedy)


def _number(stream: BinaryIO, format_: str) -> Any:
    return struct.unpack("<" + format_, stream.read(struct.calcsize("<" + format_)))[0]


def _string(stream: BinaryIO) -> str:
    length = _number(stream, "Q")
    if length > MAX_STRING_BYTES:  # reading would allocate as much
        raise ValueError(f"a string of {length} bytes")
    return stream.read(length).decode("utf-8", "replace")


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind == _ARRAY:
        return _skip_array(stream)
    return _number(stream, _NUMBER_FORMATS[kind])


def _skip_array(stream: BinaryIO) -> int:
    """Skips an array and returns its length."""
    kind, length = _number(stream, "I"), int(_number(stream, "Q"))
    if kind in _NUMBER_FORMATS:
        stream.seek(length * struct.calcsize("<" + _NUMBER_FORMATS[kind]), 1)
        return length
    # Strings and nested arrays vary in length, so they are skipped one by one.
    for _ in range(length):
        if kind == _STRING:
            stream.seek(_number(stream, "Q"), 1)
        else:
            _skip_array(stream)
    return length


def _tensor(stream: BinaryIO) -> tuple[str, str, int]:
    """Returns the name, the type and the number of elements of a tensor."""
    name = _string(stream)
    dimensions = [_number(stream, "Q") for _ in range(_number(stream, "I"))]
    type_, _offset = _number(stream, "I"), _number(stream, "Q")
    return name, _FLOAT_TYPES.get(type_, str(type_)), prod(dimensions)
