"""The table of families.

A new family is a new row. Most rows are Llama's layer with a few names more; what a row can say beyond that:

- ``silent`` on the tensors that write a block's output. Families that normalise that output (Gemma 2 and 3, OLMo 2)
  have it on the output norm's scale instead: projections at zero would keep the logits too, but the norm of zero
  multiplies their gradient by about a thousand.
- ``Fused`` for projections or experts that are stored as one tensor (``pipeline/architecture/family.py``).

Mixture of experts: an expert is paired with the expert of the same index in other layers, and each of its matrices
is made as a dense MLP's are. Where a method promises the base's logits, the outputs of all experts, shared ones
too, are silent. The router, and the gate of shared experts, has a kind of its own, since it means nothing without the
experts it chooses among: copied where layers are copied, and averaged where they are averaged, as experts are; in
OpT-DeUS its inputs are transported and its outputs, the experts, stay in their order; in LESA, whose authors found
no way to predict one, it is that of the lower neighbour.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.errors import UserError
from pipeline.models.families.family import Architecture, Fused
from pipeline.models.families.tensors import Block, Role, Side

Roles = dict[str, Role]


def _linear(module: str, name: str, block: Block, side: Side) -> Roles:
    """A linear map's matrix and its bias, where the config gives it one."""
    silent = 0.0 if side == "output" else None
    after = (block, side) == ("mlp", "input")
    return {
        f"{module}.weight": Role(name, "matrix", block, side, silent, after_attention=after),
        f"{module}.bias": Role(name, "bias", block, side, silent, after_attention=after),
    }


def _norm(module: str, name: str, block: Block, side: Side, offset: float = 0.0) -> Roles:
    """A norm's scale, and a layer norm's shift; silent where it normalises a block's output."""
    silent = 0.0 if side == "output" else None
    after = (block, side) == ("mlp", "input")
    scale = Role(name, "norm", block, side, None if silent is None else silent - offset, offset, after)
    return {f"{module}.weight": scale, f"{module}.bias": Role(name, "norm", block, side, silent, 0.0, after)}


def _router(module: str, name: str) -> Roles:
    role = Role(name, "router", "mlp", "input", after_attention=True)
    return {f"{module}.weight": role, f"{module}.bias": role}


def _gated_mlp(module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Roles:
    return {
        **_linear(f"{module}.{gate}", "gate", "mlp", "input"),
        **_linear(f"{module}.{up}", "up", "mlp", "input"),
        **_linear(f"{module}.{down}", "down", "mlp", "output"),
    }


def _loud(roles: Roles) -> Roles:
    """Roles of blocks whose output norm is silenced in their stead."""
    return {name: replace(role, silent=None) for name, role in roles.items()}


def _weights(roles: Roles) -> Roles:
    return {name: role for name, role in roles.items() if name.endswith(".weight")}


def _biases(roles: Roles) -> Roles:
    return {name: role for name, role in roles.items() if name.endswith(".bias")}


# ------------------------------------------------------------------------------------- dense layers

_QUERY_KEY_VALUE: Roles = {
    **_linear("self_attn.q_proj", "q", "attention", "input"),
    **_linear("self_attn.k_proj", "k", "attention", "input"),
    **_linear("self_attn.v_proj", "v", "attention", "input"),
}
_ATTENTION: Roles = {**_QUERY_KEY_VALUE, **_linear("self_attn.o_proj", "o", "attention", "output")}
_QUERY_KEY_NORMS: Roles = {
    **_norm("self_attn.q_norm", "q_norm", "attention", "inner"),
    **_norm("self_attn.k_norm", "k_norm", "attention", "inner"),
}
_INPUT_NORMS: Roles = {
    **_norm("input_layernorm", "input_norm", "attention", "input"),
    **_norm("post_attention_layernorm", "post_attention_norm", "mlp", "input"),
}
_MLP = _gated_mlp("mlp")
_LLAMA: Roles = {**_INPUT_NORMS, **_ATTENTION, **_MLP}
_GEMMA2: Roles = {
    **_loud({**_ATTENTION, **_MLP}),
    **_norm("input_layernorm", "input_norm", "attention", "input", offset=1.0),
    **_norm("post_attention_layernorm", "attention_output_norm", "attention", "output", offset=1.0),
    **_norm("pre_feedforward_layernorm", "post_attention_norm", "mlp", "input", offset=1.0),
    **_norm("post_feedforward_layernorm", "mlp_output_norm", "mlp", "output", offset=1.0),
}
_GEMMA3: Roles = {
    **_GEMMA2,
    **_norm("self_attn.q_norm", "q_norm", "attention", "inner", offset=1.0),
    **_norm("self_attn.k_norm", "k_norm", "attention", "inner", offset=1.0),
}
_OLMO2: Roles = {
    **_loud({**_ATTENTION, **_MLP}),
    **_QUERY_KEY_NORMS,
    **_norm("post_attention_layernorm", "attention_output_norm", "attention", "output"),
    **_norm("post_feedforward_layernorm", "mlp_output_norm", "mlp", "output"),
}
_PHI3: dict[str, Role | Fused] = {
    **_LLAMA,
    "self_attn.qkv_proj.weight": Fused(
        _weights(_QUERY_KEY_VALUE), shares=("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
    ),
    "mlp.gate_up_proj.weight": Fused({name: _MLP[name] for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight")}),
}
_NEOX_QUERY_KEY_VALUE: Roles = {
    **_linear("attention.query", "q", "attention", "input"),
    **_linear("attention.key", "k", "attention", "input"),
    **_linear("attention.value", "v", "attention", "input"),
}
_NEOX: dict[str, Role | Fused] = {  # each head's query, key and value lie together
    **_INPUT_NORMS,
    "attention.query_key_value.weight": Fused(_weights(_NEOX_QUERY_KEY_VALUE), groups="num_attention_heads"),
    "attention.query_key_value.bias": Fused(_biases(_NEOX_QUERY_KEY_VALUE), groups="num_attention_heads"),
    **_linear("attention.dense", "o", "attention", "output"),
    **_linear("mlp.dense_h_to_4h", "up", "mlp", "input"),
    **_linear("mlp.dense_4h_to_h", "down", "mlp", "output"),
}
_STARCODER2: Roles = {
    **_INPUT_NORMS,
    **_ATTENTION,
    **_linear("mlp.c_fc", "up", "mlp", "input"),
    **_linear("mlp.c_proj", "down", "mlp", "output"),
}
_STABLELM: Roles = {  # norms of queries and keys, where the config asks for them, are each head's own
    **_LLAMA,
    **_norm("self_attn.q_layernorm.norms.{i}", "q_norm", "attention", "inner"),
    **_norm("self_attn.k_layernorm.norms.{i}", "k_norm", "attention", "inner"),
}

# ------------------------------------------------------------------------------- mixture of experts


def _stacked(module: str, mlp: Roles) -> dict[str, Role | Fused]:
    """Experts as transformers holds them in memory, and as it writes them with ``save_original_format=False``."""
    gate, up, down = _weights(mlp)
    return {
        f"{module}.gate_up_proj": Fused({gate: mlp[gate], up: mlp[up]}, stacked=True),
        f"{module}.down_proj": Fused({down: mlp[down]}, stacked=True),
    }


_EXPERT = _gated_mlp("mlp.experts.{i}")
_MIXTRAL_EXPERT = _gated_mlp("block_sparse_moe.experts.{i}", gate="w1", up="w3", down="w2")
_MIXTRAL: dict[str, Role | Fused] = {
    **_INPUT_NORMS,
    **_ATTENTION,
    **_MIXTRAL_EXPERT,
    **_router("block_sparse_moe.gate", "router"),
    **_router("mlp.gate", "router"),
    **_stacked("mlp.experts", _MIXTRAL_EXPERT),
}
_QWEN3_MOE: dict[str, Role | Fused] = {
    **_INPUT_NORMS,
    **_ATTENTION,
    **_QUERY_KEY_NORMS,
    **_EXPERT,
    **_router("mlp.gate", "router"),
    **_stacked("mlp.experts", _EXPERT),
}
_QWEN2_MOE: dict[str, Role | Fused] = {
    **_QWEN3_MOE,
    **_gated_mlp("mlp.shared_expert"),
    **_router("mlp.shared_expert_gate", "shared_expert_gate"),
}
_GPT_OSS_GATE_UP: Roles = {
    **_linear("mlp.experts.{i}.gate_proj", "gate", "mlp", "input"),
    **_linear("mlp.experts.{i}.up_proj", "up", "mlp", "input"),
}
_GPT_OSS_DOWN = _linear("mlp.experts.{i}.down_proj", "down", "mlp", "output")
_GPT_OSS: dict[str, Role | Fused] = {  # experts are stored [in, out], their gate's and up's outputs alternating
    **_INPUT_NORMS,
    **_ATTENTION,
    "self_attn.sinks": Role("sinks", "sink", "attention", "inner"),
    **_router("mlp.router", "router"),
    "mlp.experts.gate_up_proj": Fused(
        _weights(_GPT_OSS_GATE_UP), groups="intermediate_size", stacked=True, transposed=True
    ),
    "mlp.experts.gate_up_proj_bias": Fused(_biases(_GPT_OSS_GATE_UP), groups="intermediate_size", stacked=True),
    "mlp.experts.down_proj": Fused(_weights(_GPT_OSS_DOWN), stacked=True, transposed=True),
    "mlp.experts.down_proj_bias": Fused(_biases(_GPT_OSS_DOWN), stacked=True),
}

# -------------------------------------------------------------------------------------------- table

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_LLAMA),
    "mistral": Architecture(_LLAMA),
    "qwen2": Architecture(_LLAMA),
    "qwen3": Architecture({**_LLAMA, **_QUERY_KEY_NORMS}),
    "gemma2": Architecture(_GEMMA2),
    "gemma3_text": Architecture(_GEMMA3),
    "phi3": Architecture(_PHI3),
    "olmo2": Architecture(_OLMO2),
    "smollm3": Architecture(_LLAMA),
    "gpt_neox": Architecture(
        _NEOX,
        layer_prefix="gpt_neox.layers.{layer}.",
        embeddings="gpt_neox.embed_in.weight",
        final_norm="gpt_neox.final_layer_norm.weight",
        lm_head="embed_out.weight",
        derived=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
        parallel=True,
    ),
    "granite": Architecture(_LLAMA),
    "starcoder2": Architecture(_STARCODER2),
    "stablelm": Architecture(_STABLELM),
    "mixtral": Architecture(_MIXTRAL),
    "qwen2_moe": Architecture(_QWEN2_MOE),
    "qwen3_moe": Architecture(_QWEN3_MOE),
    "olmoe": Architecture(_QWEN3_MOE),
    "gpt_oss": Architecture(_GPT_OSS),
}


def architecture_of(model_type: str) -> Architecture:
    """The family's row.

    Args:
        model_type: as in config.json.

    Raises:
        UserError: the family has no row.
    """
    if model_type not in ARCHITECTURES:
        raise UserError(
            setting="model.path",
            value=f"a model of the family {model_type!r}",
            rule=f"only families of the architecture table can be expanded: {', '.join(ARCHITECTURES)}",
            remedy="Add a row that gives each tensor of a layer its role to ARCHITECTURES in "
            "pipeline/architecture/table.py.",
        )
    return ARCHITECTURES[model_type]
