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
# Those whose weights ``gguf_weights.py`` reads, because transformers does not. Files of Mixtral have the architecture
# llama, and experts.
READ_HERE = {"gptneox": "gpt_neox", "gpt-oss": "gpt_oss"}
MIXTRAL = "mixtral"
MISREAD = {  # architectures in the same tables whose models would be wrong
    "falcon": "llama.cpp reorders its fused attention weights, and transformers does not undo that",
    "gemma4": "its sliding and full attention layers differ in head size, and only one size is read",
}
TOKENIZERS = ("gpt2", "llama", "t5", "gemma4")  # kinds in GGUF_TOKENIZER_TYPES (transformers.integrations.gguf)
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
# Of families that are read here, the entries of config.json that a file must have, with their keys. Nothing is left to
# the defaults of the config class, which are those of one model.
_SIZES = ("num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "num_attention_heads")
_NEEDED = {name: _CONFIG_KEYS[name] for name in _SIZES}
_EXPERTS = {
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_OWN_KEYS = {
    "gpt_neox": {
        **_NEEDED,
        "layer_norm_eps": "attention.layer_norm_epsilon",
        "use_parallel_residual": "use_parallel_residual",
    },
    "mixtral": {**_NEEDED, **_EXPERTS},
    "gpt_oss": {**_NEEDED, **_EXPERTS, "sliding_window": "attention.sliding_window"},
}
_YARN = {
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
# Keys that such a file may have as well. What another one means for the model is not known, so the file is refused.
_OPTIONAL_KEYS = {
    "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "expert_feed_forward_length", "rope.dimension_count", "rope.freq_base", "tensor_data_layout",
}  # fmt: skip
_POSITIVE = {*_CONFIG_KEYS.values(), "attention.value_length", "rope.dimension_count"}
_BASE = 10_000.0  # of rotary positions, where a file does not say; as in llama.cpp
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
# Types of tensors that the gguf package dequantizes, by their numbers. NVFP4 (40) is not among them: such a matrix has
# another scale in a tensor of its own.
DEQUANTIZED = frozenset({"F32", "F16", "BF16"}) | frozenset(
    map(str, (2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20, 21, 22, 23, 29, 34, 35, 39))
)
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
        arrays: the keys of other arrays than those of the tokenizer.
    """

    values: dict[str, Any]
    tensor_names: tuple[str, ...]
    tensors: Mapping[str, int]
    elements: Mapping[str, int]
    arrays: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """The name that llama.cpp has for the family."""
        return str(self.values.get("general.architecture"))

    @property
    def family(self) -> str:
        """The family as ``model_type`` in config.json, or else the architecture."""
        if self.architecture == "llama" and self._value("expert_count"):
            return MIXTRAL
        return {**ARCHITECTURES, **READ_HERE}.get(self.architecture, self.architecture)

    @property
    def is_read_here(self) -> bool:
        """Whether ``gguf_weights.py`` reads the weights, and not transformers."""
        return self.family in _OWN_KEYS

    def _value(self, key: str) -> Any:
        """The value of a key of the architecture. None if the file does not have it."""
        return self.values.get(f"{self.architecture}.{key}")

    def config(self) -> dict[str, Any]:
        """Returns the config.json entries that determine sizes and limits, plus ``has_chat_template``.

        Of a file that is read here, these are all entries of config.json.

        llama.cpp's converter writes 0 for what a model does not have, such as a sliding window. transformers would
        take 0 for the size of the window.
        """
        config = {name: self._value(key) for name, key in _CONFIG_KEYS.items()}
        config["vocab_size"] = config["vocab_size"] or self.values.get("tokenizer.ggml.tokens")
        sizes = {name: value for name, value in config.items() if value}
        return {
            **(self._own_config(sizes) if self.is_read_here else sizes),
            "model_type": self.family,
            "tie_word_embeddings": "output.weight" not in self.tensor_names,
            "has_chat_template": "tokenizer.chat_template" in self.values,
        }

    def _own_config(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the entries that determine what a model computes whose file is read here.

        Args:
            sizes: what the file says of the entries in ``_CONFIG_KEYS``.
        """
        config = {name: self._value(key) for name, key in _OWN_KEYS[self.family].items()}
        config |= {name: self.values.get(f"tokenizer.ggml.{key}") for name, key in _TOKENS.items()}
        config |= {"vocab_size": sizes.get("vocab_size"), "rope_parameters": self._own_rotary()}
        heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
        if self.family == "gpt_neox":
            config["attention_bias"] = "blk.0.attn_qkv.bias" in self.tensor_names
        elif heads and hidden:
            config["num_key_value_heads"] = sizes.get("num_key_value_heads", heads)
            config["head_dim"] = sizes.get("head_dim", hidden // heads)
        if self.family == "gpt_oss":
            config["attention_bias"] = "blk.0.attn_q.bias" in self.tensor_names
        return {name: value for name, value in config.items() if value is not None}

    def _own_rotary(self) -> dict[str, Any]:
        """Returns ``rope_parameters`` of a model whose file is read here.

        Whether YaRN rounds the bounds of its ramp is not in the file. The models that were published as gpt_oss do not.
        """
        rope = {"rope_type": "default", "rope_theta": _BASE, **self.rotary}
        if self.family != "gpt_neox":
            rope.pop("partial_rotary_factor", None)  # 1, as checked
        if self.family == "gpt_oss" and self._value("rope.scaling.type") == "yarn":
            stated = {name: self._value(key) for name, key in _YARN.items()}
            rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
            rope |= {name: value for name, value in stated.items() if value is not None}
        return rope

    @property
    def rotary(self) -> dict[str, float]:
        """What the file says about rotary positions, as entries of ``rope_parameters``."""
        base, rotated = self._value("rope.freq_base"), self._value("rope.dimension_count")
        heads, hidden = self._value("attention.head_count"), self._value("embedding_length")
        stated = {} if base is None else {"rope_theta": base}
        if rotated is not None and heads:
            stated["partial_rotary_factor"] = rotated / (self._value("attention.key_length") or hidden // heads)
        return stated

    def check(self, where: object) -> None:
        """Checks that everything is read that determines what the model computes.

        Raises:
            UserError: it is not.
        """
        if (rule := self._fault()) is not None:
            remedy = "Use the model's safetensors, for example from the Hugging Face Hub."
            raise UserError(setting="model.gguf_file", value=where, rule=rule, remedy=remedy)

    def _fault(self) -> str | None:
        """Returns what is not read. None if everything is."""
        architecture = self.architecture
        if architecture in MISREAD:
            return f"files of the architecture {architecture} are not supported: {MISREAD[architecture]}"
        if not self.is_read_here and architecture not in ARCHITECTURES:
            return f"transformers does not read GGUF files of the architecture {architecture}"
        if packed := sorted(set(self.tensors) - DEQUANTIZED):
            return f"it has tensors of the type {packed[0]} of GGML, which is not dequantized"
        if scaled := sorted(set(SCALED_ROTATION) & set(self.tensor_names)):
            return f"it scales rotary positions ({scaled[0]}), which is not read"
        if (kind := self.values.get("tokenizer.ggml.model", "gpt2")) not in TOKENIZERS:
            return f"it has a tokenizer of the kind {kind}, which transformers does not read"
        if self.is_read_here:
            return self._fault_of_keys()
        if (factor := self._value("rope.scaling.factor")) not in (None, 1.0):
            return f"it scales rotary positions (rope.scaling.factor {factor:g}), which is not read"
        return None

    def _fault_of_keys(self) -> str | None:
        """Returns what is not understood about the metadata of a file that is read here. None if everything is."""
        needed = {*_OWN_KEYS[self.family].values()}
        is_scaled = self.family == "gpt_oss" and self._value("rope.scaling.type") == "yarn"
        yarn = set(_YARN.values()) if is_scaled else set()
        needed |= {_YARN["factor"], _YARN["original_max_position_embeddings"]} & yarn
        prefix = f"{self.architecture}."
        keys = {key.removeprefix(prefix) for key in (*self.values, *self.arrays) if key.startswith(prefix)}
        if lacking := sorted(needed - keys):
            return f"it has no {prefix}{lacking[0]}, on which the model depends"
        for key in sorted(_POSITIVE & keys):
            if type(value := self._value(key)) is not int or value < 1:
                return f"its {prefix}{key} is {'an array' if value is None else value}, not a positive integer"
        if unknown := sorted(keys - needed - yarn - _OPTIONAL_KEYS):
            return f"it has {prefix}{unknown[0]}, and what this changes in a {self.family} model is not known"
        if self.family != "gpt_neox" and self.rotary.get("partial_rotary_factor", 1.0) != 1.0:
            return f"{prefix}rope.dimension_count is not the size of a head, but {self.family} rotates all dimensions"
        return None


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
            values, arrays = {}, []
            for _ in range(entries):
                key, kind = _string(stream), _number(stream, "I")
                value = _value(stream, kind)
                if kind != _ARRAY or key.startswith("tokenizer."):
                    values[key] = value
                else:
                    arrays.append(key)
            names, number_of, elements = [], Counter[str](), Counter[str]()
            for _ in range(tensors):
                name, type_, count = _tensor(stream)
                names.append(name)
                number_of[type_] += 1
                elements[type_] += count
            return Metadata(values, tuple(names), number_of, elements, tuple(arrays))
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
