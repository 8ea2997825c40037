"""A small random model with the structure of a config: the same modules and kinds of layers, with narrow tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.errors import one_line

# The largest sizes, by a pattern that a config entry's whole name must match. Sizes that a tensor may mix differ, so
# that its dimensions can be told apart: hidden 64, queries 32, keys 16, intermediate 48, experts 20.
SIZES: tuple[tuple[str, int], ...] = (
    ("hidden_size|n_embd|d_model|embedding_dim|emb_dim|word_embed_proj_dim|embedding_size|lru_width", 64),
    ("attention_hidden_size", 128),
    (r"\w*num_attention_heads|n_head|n_heads|num_heads|attention_heads|decoder_attention_heads", 4),
    (r"\w*num_key_value_heads|num_kv_heads|kv_n_heads|num_global_key_value_heads|num_query_groups", 2),
    ("head_dim|swa_head_dim|kv_channels|dim_head|v_head_dim|qk_nope_head_dim|global_head_dim|d_head|swa_v_head_dim", 8),
    ("qk_rope_head_dim", 4),
    ("qk_head_dim", 12),
    ("q_lora_rank", 12),
    ("kv_lora_rank", 10),
    (r"intermediate_size|intermediate_size_mlp|ffn_hidden_size|ffn_dim|decoder_ffn_dim|n_inner|dim_ff|dff|d_inner", 48),
    ("dense_intermediate_size|prefix_dense_intermediate_size", 48),
    (r"moe_intermediate_size|expert_hidden_size|expert_ffn_hidden_size", 20),
    (r"\w*shared_experts?_intermediate_size|shared_intermediate_size", 24),
    ("num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts|router_num_experts", 6),
    (r"num_experts_per_tok\w*|moe_topk|moe_k|moe_top_k|top_k_experts|router_top_k", 2),
    ("n_group|topk_group|num_expert_group|o_groups", 1),
    (r"vocab_size|unpadded_vocab_size|vocab_size_per_layer_input|pad_vocab_size", 384),
    ("max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 256),
    ("sliding_window|sliding_window_size|window_size|attention_window_size|local_attention|attention_chunk_size", 8),
    ("index_head_dim|linear_head_dim|linear_key_head_dim|linear_value_head_dim|d_rel|gated_norm_rank", 8),
    ("index_n_heads|linear_num_key_heads|linear_num_heads", 2),
    ("linear_num_value_heads", 4),
    ("index_topk", 4),
    (r"rel_extent|chunk_size|mamba_chunk_size|block_size", 8),
    ("mamba_d_state|state_size|ssm_state_size", 8),
    ("mamba_d_ssm", 128),
    ("mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    ("mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    ("n_groups|mamba_n_groups", 2),
    ("mamba_dt_rank|time_step_rank", 4),
    ("hidden_size_per_layer_input|laurel_rank|adapter_rank|router_hidden_size|o_lora_rank|pronunciation_embed_dim", 8),
    ("rotary_dim", 4),
)  # fmt: skip
PATTERNS = [(re.compile(pattern), size) for pattern, size in SIZES]
SAME_IF_EQUAL = (
    ("num_key_value_heads", "num_attention_heads"), ("num_kv_heads", "num_attention_heads"),
    ("head_dim", "qk_rope_head_dim"), ("head_dim", "qk_head_dim"),
)  # fmt: skip
USED_TOKENS = 90
MOST_PARAMETERS = 50_000_000  # of a model that is built
WHOLE_MODEL = 20_000_000  # parameters up to which a model is used as it is if it cannot be made smaller


class NoSmallModelError(Exception):
    """No small model with the structure of a config could be built and run."""


def small_model(config: PreTrainedConfig, parameters: int) -> PreTrainedModel:
    """Builds a small random float32 model whose layers are of the same kinds as those of a config's model.

    Args:
        config: of the model.
        parameters: the number of parameters of the model.

    Raises:
        NoSmallModelError: no attempt computes finite logits.
    """
    failures = []
    for attempt in _attempts(config, parameters):
        try:
            smaller = type(config).from_dict(attempt)
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(smaller, trust_remote_code=False).num_parameters()
            if size > MOST_PARAMETERS:
                failures.append(f"it has {size} parameters")
                continue
            model = randomized(smaller)
            with torch.no_grad():
                logits = model(tokens_for(model), use_cache=False).logits
            if bool(logits.isfinite().all()):
                return model
            failures.append("its logits are not finite")
        except Exception as error:  # noqa: BLE001 - config and model classes raise whatever a wrong size leads to
            failures.append(f"{type(error).__name__}: {one_line(error)}")
    raise NoSmallModelError(failures[0])


def randomized(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a model with every parameter away from its default: scales, biases, sinks and routers included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
        randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Moves every parameter away from its default, with torch's global generator."""
    for tensor in model.parameters():
        drawn = torch.randn_like(tensor)
        if tensor.dim() > 1:
            tensor.copy_(0.2 * drawn)
        else:  # biases start at 0, scales at 0 or 1
            tensor.add_(0.2 * drawn + 0.1)


def tokens_for(model: PreTrainedModel, length: int = 12) -> torch.Tensor:
    """Returns token ids ``[1, length]`` of a model's vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(length)[None] * 7 + 3) % min(vocabulary, USED_TOKENS)


def _attempts(config: PreTrainedConfig, parameters: int) -> Iterator[dict[str, Any]]:
    values = config.to_dict()
    yield _shrunk(values)
    yield _shrunk(values, keeps_head_size=True)
    if parameters <= WHOLE_MODEL:
        yield values


def _shrunk(values: Mapping[str, Any], keeps_head_size: bool = False) -> dict[str, Any]:
    small = {name: _smaller(name, value) for name, value in values.items()}
    if keeps_head_size:
        for name in ("head_dim", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"):
            if name in values:
                small[name] = values[name]
        heads = next((name for name in ("num_attention_heads", "n_head", "n_heads") if values.get(name)), None)
        hidden = next((name for name in ("hidden_size", "n_embd", "d_model") if values.get(name)), None)
        if heads and hidden:
            small[hidden] = small[heads] * max(1, values[hidden] // values[heads])
    _relate(values, small)
    for name, value in small.items():
        if name.endswith("_token_id") and isinstance(value, int):
            small[name] = value % USED_TOKENS
        elif name.endswith("_token_id") and isinstance(value, list):
            small[name] = [token % USED_TOKENS for token in value]
    small.pop("quantization_config", None)
    return small


def _relate(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Restores relations between sizes that config classes and attention require."""
    for name, other in SAME_IF_EQUAL:
        if values.get(name) is not None and values.get(name) == values.get(other):
            small[name] = small[other]
    if "qk_head_dim" in small and "qk_nope_head_dim" in small:
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if "mamba_d_ssm" in small:
        small["mamba_d_ssm"] = small["mamba_n_heads"] * small["mamba_d_head"]
    if "num_attention_heads" not in values and "state_size" in values and "head_dim" in values:  # Mamba 2
        small["num_heads"], small["head_dim"] = 8, 16


def _smaller(name: str, value: Any) -> Any:
    """Returns a config entry with sizes that are at most those of ``SIZES``. Lists have one size per layer."""
    if isinstance(value, dict):
        return {key: _smaller(key, entry) for key, entry in value.items()}
    if isinstance(value, list) and value and all(type(entry) is int for entry in value):
        return [_smaller(name, entry) for entry in value]
    if type(value) is int:
        limit = next((size for pattern, size in PATTERNS if pattern.fullmatch(name)), value)
        return min(value, limit)
    return value
