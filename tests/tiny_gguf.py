"""Writes tiny model directories as GGUF files, as the converter of llama.cpp does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


GEMMA3_NAMES = {
    **NAMES, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
METADATA = {  # keys of the architecture by entries of config.json
    "head_dim": "attention.key_length", "sliding_window": "attention.sliding_window",
    "layer_norm_eps": "attention.layer_norm_epsilon", "norm_epsilon": "attention.layer_norm_epsilon",
    "num_experts": "expert_count", "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "use_parallel_residual": "use_parallel_residual",
}  # fmt: skip
YARN = {
    "type": "rope_type", "factor": "factor", "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow",
}  # fmt: skip
ADDED_TO_ONE = ("gemma2",)


def write_gemma3_gguf(model: Path, path: Path) -> None:
    """Converts a Gemma 3 directory without quantization, with a SentencePiece vocabulary of bytes and ASCII."""
    config = json.loads((model / "config.json").read_text())
    writer = _writer(path, "gemma3", config)
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_sliding_window(config["sliding_window"])
    _add_sentencepiece(writer)
    for name, tensor in load_file(model / "model.safetensors").items():
        # llama.cpp stores 1 + w where transformers scales by 1 + w.
        writer.add_tensor(_rename(name, GEMMA3_NAMES), tensor + 1 if "norm" in name else tensor)
    _finish(writer)


def write_gguf(model: Path, path: Path, quantization: gguf.GGMLQuantizationType) -> None:
    """Converts a Llama directory with tied embeddings. Its matrices are quantized and norms stay float32."""
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    writer = _writer(path, "llama", config)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    _add_tokenizer(writer, tokenizer, (model / "chat_template.jinja").read_text())
    for name, tensor in load_file(model / "model.safetensors").items():
        gguf_name, tensor = _rename(name), _permuted(name, tensor, config)
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name, tensor)
        else:
            writer.add_tensor(gguf_name, gguf.quantize(tensor, quantization), raw_dtype=quantization)
    _finish(writer)


def write_family_gguf(
    model: Path, path: Path, architecture: str, experts: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
) -> None:
    """Converts a directory of any family, with names from the gguf package.

    Experts of a layer are stacked, scales of norms that are added to one are stored with it, and a matrix with one row
    is a vector. Only matrices of experts may be quantized.
    """
    config = json.loads((model / "config.json").read_text())
    writer = _writer(path, architecture, config)
    if architecture == "phi3":  # the converter writes 0 for a model without a window
        config["sliding_window"] = config["sliding_window"] or 0
    for name, key in METADATA.items():
        if config.get(name) is not None:
            add_value(writer, f"{architecture}.{key}", config[name])
    rope = config.get("rope_parameters", {})
    for key, name in YARN.items():
        if rope.get("rope_type") == "yarn" and name in rope:
            add_value(writer, f"{architecture}.rope.scaling.{key}", rope[name])
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    if architecture in ("gemma2", "llama"):
        _add_sentencepiece(writer)
    else:
        _add_tokenizer(writer, json.loads((model / "tokenizer.json").read_text()), "{{ messages[0].content }}")
    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    tensors: dict[str, list[np.ndarray]] = {}
    for stored, whole in sorted(load_file(model / "model.safetensors").items(), key=_natural):
        for name, tensor in _converted(stored, whole, architecture, config):
            stem, _, suffix = re.sub(r"experts\.\d+\.", "experts.", name).rpartition(".")
            tensors.setdefault(f"{names.get_name(stem)}.{suffix}", []).append(tensor)
    for name, parts in tensors.items():
        tensor = np.stack(parts) if "exps" in name and parts[0].ndim < 3 and len(parts) > 1 else parts[0]
        type_ = experts if name.endswith("exps.weight") else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor[0] if tensor.shape[0] == 1 else tensor, type_), raw_dtype=type_)
    _finish(writer)


def _converted(name: str, tensor: np.ndarray, architecture: str, config: dict) -> Iterator[tuple[str, np.ndarray]]:
    """What the converter makes of a tensor before it names it."""
    if architecture == "llama":
        yield name, _permuted(name, tensor, config)
    elif architecture in ADDED_TO_ONE and "norm" in name:
        yield name, tensor + 1
    elif "query_key_value" in name:  # head by head: query, key and value
        heads = np.split(tensor, 3 * config["num_attention_heads"])
        yield name, np.concatenate([*heads[0::3], *heads[1::3], *heads[2::3]])
    elif name.endswith("sinks"):
        yield f"{name}.weight", tensor
    elif architecture == "gpt-oss" and "experts" in name:
        name, suffix = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
        rows = tensor if suffix == "bias" else np.ascontiguousarray(tensor.swapaxes(1, 2))  # [experts, out, ...]
        if "gate_up" in name:  # their rows alternate
            yield f"{name.replace('gate_up', 'gate')}.{suffix}", np.ascontiguousarray(rows[:, 0::2])
            yield f"{name.replace('gate_up', 'up')}.{suffix}", np.ascontiguousarray(rows[:, 1::2])
        else:
            yield f"{name}.{suffix}", rows
    else:
        yield name, tensor


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds an entry of the type that its value has in Python."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    {**add, list: writer.add_array}[type(value)](key, value)


def _natural(item: tuple[str, np.ndarray]) -> list[str | int]:
    """A key to sort names by, with their numbers as numbers."""
    return [int(part) if part.isdigit() else part for part in item[0].split(".")]


def _writer(path: Path, architecture: str, config: dict) -> gguf.GGUFWriter:
    """Returns a writer with the sizes that all architectures have."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    if "num_key_value_heads" in config:
        writer.add_head_count_kv(config["num_key_value_heads"])
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    return writer


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, template: str) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<|im_start|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|im_end|>"])
    writer.add_chat_template(template)


def _add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """A SentencePiece vocabulary of bytes and ASCII."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([3] * len(special) + [6] * 256 + [1] * (len(tokens) - len(special) - 256))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)


def _rename(name: str, names: dict[str, str] = NAMES) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    layer, _, module = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{layer}.{names[module]}.weight"


def _permuted(name: str, tensor: np.ndarray, config: dict) -> np.ndarray:
    """Reorders rotary dimensions: llama.cpp pairs adjacent ones, transformers pairs the two halves of a head."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for module, count in heads.items():
        if module in name:
            return tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor
