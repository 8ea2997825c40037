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
_FAMILIES = {"gemma3": "gemma3_text"}  # by architecture, where transformers names the text model differently
_CONFIG_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class Metadata:
    """The part of a GGUF file before its weights.

    Attributes:
        values: metadata by key, with the length of an array in place of the array.
        tensor_names: in the order of the file.
        elements: the number of elements of all tensors by type. Types of quantized tensors are numbers.
    """

    values: dict[str, Any]
    tensor_names: tuple[str, ...]
    elements: Mapping[str, int]

    def config(self) -> dict[str, Any]:
        """Returns the config.json entries that determine sizes and limits, plus ``has_chat_template``."""
        architecture = self.values.get("general.architecture")
        config = {name: self.values.get(f"{architecture}.{key}") for name, key in _CONFIG_KEYS.items()}
        config["vocab_size"] = config["vocab_size"] or self.values.get("tokenizer.ggml.tokens")
        return {
            **{name: value for name, value in config.items() if value is not None},
            "model_type": _FAMILIES.get(str(architecture), architecture),
            "tie_word_embeddings": "output.weight" not in self.tensor_names,
            "has_chat_template": "tokenizer.chat_template" in self.values,
        }

    def ignored_rope_scaling(self) -> float | None:
        """Returns the factor by which rotary positions are scaled, which transformers does not apply, or None."""
        architecture = self.values.get("general.architecture")
        factor = self.values.get(f"{architecture}.rope.scaling.factor", 1.0)
        return None if factor == 1.0 else float(factor)


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
            values = {_string(stream): _value(stream, _number(stream, "I")) for _ in range(entries)}
            names, elements = [], Counter[str]()
            for _ in range(tensors):
                name, type_, count = _tensor(stream)
                names.append(name)
                elements[type_] += count
            return Metadata(values, tuple(names), elements)
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
