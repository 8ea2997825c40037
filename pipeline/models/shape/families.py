"""One function a family: what a layer of it holds. Tests compare them with the models that transformers builds.

An entry that config.json leaves out is taken as the family's config class takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from pipeline.errors import UserError
from pipeline.models.shape.model import Layer, Shape
from pipeline.models.shape.parts import Config, Tensors, attention, experts, gated_mlp, linear, norms, query_key_norms

PRE_NORMS = ("input_layernorm", "post_attention_layernorm")


def _llama(config: Config, layer: int) -> Tensors:
    bias = config.get("attention_bias", False)
    mlp = gated_mlp(config, config["intermediate_size"], config.get("mlp_bias", False))
    return {**norms(config, *PRE_NORMS), **attention(config, bias, bias), **mlp}


def _qwen2(config: Config, layer: int) -> Tensors:
    return {**_llama(config, layer), **attention(config, qkv_bias=True, o_bias=False)}


def _qwen3(config: Config, layer: int) -> Tensors:
    return {**_llama(config, layer), **query_key_norms(config.head_size, config.head_size)}


def _gemma2(config: Config, layer: int) -> Tensors:
    return {**_llama(config, layer), **norms(config, "pre_feedforward_layernorm", "post_feedforward_layernorm")}


def _gemma3(config: Config, layer: int) -> Tensors:
    return {**_gemma2(config, layer), **query_key_norms(config.head_size, config.head_size)}


def _phi3(config: Config, layer: int) -> Tensors:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    return {
        **norms(config, *PRE_NORMS),
        **linear("self_attn.qkv_proj", config.queries + 2 * config.keys, hidden),
        **linear("self_attn.o_proj", hidden, config.queries),
        **linear("mlp.gate_up_proj", 2 * width, hidden),
        **linear("mlp.down_proj", hidden, width),
    }


def _olmo2(config: Config, layer: int) -> Tensors:
    made = _llama(config, layer) | norms(config, "post_feedforward_layernorm")
    del made["input_layernorm.weight"]
    return made | query_key_norms(config.queries, config.keys)


def _gpt_neox(config: Config, layer: int) -> Tensors:
    hidden, width, bias = config["hidden_size"], config["intermediate_size"], config.get("attention_bias", True)
    return {
        **norms(config, *PRE_NORMS, bias=True),
        **linear("attention.query_key_value", 3 * hidden, hidden, bias),
        **linear("attention.dense", hidden, hidden, bias),
        **linear("mlp.dense_h_to_4h", width, hidden, bias=True),
        **linear("mlp.dense_4h_to_h", hidden, width, bias=True),
    }


def _starcoder2(config: Config, layer: int) -> Tensors:
    hidden, width, bias = config["hidden_size"], config["intermediate_size"], config.get("use_bias", True)
    mlp = {**linear("mlp.c_fc", width, hidden, bias), **linear("mlp.c_proj", hidden, width, bias)}
    return {**norms(config, *PRE_NORMS, bias=True), **attention(config, bias, bias), **mlp}


def _stablelm(config: Config, layer: int) -> Tensors:
    pre_norms = PRE_NORMS[:1] if config.get("use_parallel_residual", False) else PRE_NORMS
    mixing = attention(config, config.get("use_qkv_bias", False), o_bias=False)
    if config.get("qk_layernorm", False):
        groups = {"q": config["num_attention_heads"], "k": config.keys // config.head_size}
        mixing |= {
            f"self_attn.{name}_layernorm.norms.{head}.weight": (config.head_size,)
            for name, heads in groups.items()
            for head in range(heads)
        }
    return {**norms(config, *pre_norms, bias=True), **mixing, **gated_mlp(config, config["intermediate_size"])}


def _mixtral(config: Config, layer: int) -> Tensors:
    mixing = attention(config, qkv_bias=False, o_bias=False)
    return {**norms(config, *PRE_NORMS), **mixing, **experts(config, config["intermediate_size"])}


def _is_sparse(config: Config, layer: int) -> bool:
    """Qwen's rule for the layers that have experts."""
    step = config.get("decoder_sparse_step", 1)
    return config.experts > 0 and layer not in config.get("mlp_only_layers", []) and (layer + 1) % step == 0


def _qwen2_moe(config: Config, layer: int) -> Tensors:
    if not _is_sparse(config, layer):
        return _qwen2(config, layer)
    shared = gated_mlp(config, config["shared_expert_intermediate_size"], module="mlp.shared_expert")
    return {
        **norms(config, *PRE_NORMS),
        **attention(config, qkv_bias=config.get("qkv_bias", True), o_bias=False),
        **experts(config, config["moe_intermediate_size"]),
        **shared,
        **linear("mlp.shared_expert_gate", 1, config["hidden_size"]),
    }


def _qwen3_moe(config: Config, layer: int) -> Tensors:
    dense = _qwen3(config, layer)
    if not _is_sparse(config, layer):
        return dense
    mixing = {name: shape for name, shape in dense.items() if not name.startswith("mlp.")}
    return {**mixing, **experts(config, config["moe_intermediate_size"])}


def _olmoe(config: Config, layer: int) -> Tensors:
    bias = config.get("attention_bias", False)
    scales = {**norms(config, *PRE_NORMS), **query_key_norms(config.queries, config.keys)}
    return {**scales, **attention(config, bias, bias), **experts(config, config["intermediate_size"])}


def _gpt_oss(config: Config, layer: int) -> Tensors:
    count, hidden, width = config.experts, config["hidden_size"], config["intermediate_size"]
    bias = config.get("attention_bias", True)
    return {
        **norms(config, *PRE_NORMS),
        **attention(config, bias, bias),
        "self_attn.sinks": (config["num_attention_heads"],),
        **linear("mlp.router", count, hidden, bias=True),
        "mlp.experts.gate_up_proj": (count, hidden, 2 * width),
        "mlp.experts.gate_up_proj_bias": (count, 2 * width),
        "mlp.experts.down_proj": (count, width, hidden),
        "mlp.experts.down_proj_bias": (count, hidden),
    }


@dataclass(frozen=True)
class Family:
    """One row: a layer's tensors, what its config class fills in, and the names outside of the layers."""

    layer: Callable[[Config, int], Tensors]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm_bias: bool = False
    layer_prefix: str = "model.layers.{layer}."
    embeddings: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head.weight"


TIED = {"tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama),
    "mistral": Family(_llama),
    "granite": Family(_llama),
    "smollm3": Family(_llama, TIED),
    "gemma": Family(_llama, {**TIED, "head_dim": 256}),
    "gemma2": Family(_gemma2, {**TIED, "head_dim": 256}),
    "gemma3_text": Family(_gemma3, {**TIED, "head_dim": 256}),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3, {"head_dim": 128}),
    "phi3": Family(_phi3),
    "olmo2": Family(_olmo2),
    "gpt_neox": Family(
        _gpt_neox, norm_bias=True, layer_prefix="gpt_neox.layers.{layer}.", embeddings="gpt_neox.embed_in.weight",
        final_norm="gpt_neox.final_layer_norm",
    ),
    "starcoder2": Family(_starcoder2, TIED, norm_bias=True),
    "stablelm": Family(_stablelm, norm_bias=True),
    "mixtral": Family(_mixtral),
    "qwen2_moe": Family(_qwen2_moe),
    "qwen3_moe": Family(_qwen3_moe),
    "olmoe": Family(_olmoe),
    "gpt_oss": Family(_gpt_oss, {"head_dim": 64}),
}  # fmt: skip


def shape_of(values: Mapping[str, Any]) -> Shape:
    """The model that a config.json describes.

    Raises:
        UserError: a family that has no row, or an entry is missing that its sizes follow from.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
        raise _refuse(f"a model of the family {name!r}", f"sizes are known of these families: {', '.join(FAMILIES)}")
    try:
        return _shape(FAMILIES[name], values)
    except KeyError as error:
        raise _refuse(f"a config without {error.args[0]}", "the model's size follows from that entry") from error


def _shape(family: Family, values: Mapping[str, Any]) -> Shape:
    config = Config({**family.defaults, **values})
    share = Fraction(config["num_experts_per_tok"], config.experts) if config.experts else Fraction(1)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    final_norm = {f"{family.final_norm}.{part}": (hidden,) for part in ("weight", "bias")[: 1 + family.norm_bias]}
    head = {} if config.get("tie_word_embeddings", False) else {family.lm_head: (vocabulary, hidden)}
    return Shape(
        layers=tuple(Layer(family.layer(config, index), share) for index in range(config["num_hidden_layers"])),
        before={family.embeddings: (vocabulary, hidden)},
        after={**final_norm, **head},
        layer_prefix=family.layer_prefix,
        hidden_size=hidden,
        heads=config["num_attention_heads"],
        head_size=config.head_size,
        key_size=config.keys,
        vocab_size=vocabulary,
    )


def _refuse(value: str, rule: str) -> UserError:
    remedy = "Add the family to FAMILIES in pipeline/shape/families.py, or give the model's whole config."
    return UserError(setting="model.path", value=value, rule=rule, remedy=remedy)
