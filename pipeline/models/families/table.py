"""The table of model families. One row says everything that depends on a family.

A new family is a new row in ``FAMILIES``, made from the helper functions below: ``_linear`` for a linear map, ``_norm``
for a norm, and compositions of them. A row gives every tensor of a layer its role and the names of its dimensions;
bias arguments are True, False, or the entry of config.json that decides. Beyond that a row can say:

- ``Fused`` for projections or experts that are stored as one tensor (``pipeline/models/families/family.py``).
- ``dense`` and ``sparse`` for families in which only some layers have experts.
- ``defaults`` for entries that config.json may leave out, as the family's config class fills them in.

Mixture of experts: an expert is paired with the expert of the same index in other layers, and each of its matrices is
made like those of a dense MLP. Where a method preserves the base's logits, the outputs of all experts, shared ones
included, are silent. The router and the gate of shared experts are of the kind ``router``, because they mean nothing
without the experts that they choose among: they are copied where layers are copied, and averaged where layers are
averaged, as the experts are. OpT-DeUS transports their inputs and keeps their outputs, the experts, in order. LESA,
whose authors found no way to predict a router, takes that of the lower neighbor.
"""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.models.families.family import Family, Fused, Parameter, Parameters
from pipeline.models.families.tensors import Block, Role, Side

Tensors = dict[str, Parameter]
Bias = bool | str  # whether there is one, or the config entry that decides


def _linear(
    module: str, role: str, block: Block, side: Side, rows: str | int, columns: str | int, bias: Bias = False
) -> Tensors:
    """The ``[rows, columns]`` matrix of a linear map, and its bias."""
    tensors = {f"{module}.weight": Parameter(Role(role, "matrix", block, side), (rows, columns))}
    if bias:
        when = bias if isinstance(bias, str) else ""
        tensors[f"{module}.bias"] = Parameter(Role(role, "bias", block, side), (rows,), when)
    return tensors


def _norm(
    module: str,
    role: str,
    block: Block,
    side: Side,
    size: str = "hidden_size",
    bias: bool = False,
    offset: float = 0.0,
    when: str = "",
    unless: str = "",
    copies: str = "",
) -> Tensors:
    """The scale of a norm, and the shift of a layer norm."""
    scale = Role(role, "norm", block, side, offset=offset)
    tensors = {f"{module}.weight": Parameter(scale, (size,), when, unless, copies)}
    if bias:
        tensors[f"{module}.bias"] = Parameter(Role(role, "norm", block, side), (size,), when, unless, copies)
    return tensors


def _pre_norms(bias: bool = False, offset: float = 0.0) -> Tensors:
    return {
        **_norm("input_layernorm", "input_norm", "attention", "input", bias=bias, offset=offset),
        **_norm("post_attention_layernorm", "post_attention_norm", "mlp", "input", bias=bias, offset=offset),
    }


def _query_key_value(bias: Bias) -> Tensors:
    return {
        **_linear("self_attn.q_proj", "q", "attention", "input", "query_size", "hidden_size", bias),
        **_linear("self_attn.k_proj", "k", "attention", "input", "key_size", "hidden_size", bias),
        **_linear("self_attn.v_proj", "v", "attention", "input", "key_size", "hidden_size", bias),
    }


def _attention(bias: Bias = "attention_bias", output_bias: Bias = "attention_bias") -> Tensors:
    output = _linear("self_attn.o_proj", "o", "attention", "output", "hidden_size", "query_size", output_bias)
    return {**_query_key_value(bias), **output}


def _query_key_norms(query_size: str = "head_dim", key_size: str = "head_dim", offset: float = 0.0) -> Tensors:
    return {
        **_norm("self_attn.q_norm", "q_norm", "attention", "inner", query_size, offset=offset),
        **_norm("self_attn.k_norm", "k_norm", "attention", "inner", key_size, offset=offset),
    }


def _gated_mlp(
    module: str = "mlp",
    size: str = "intermediate_size",
    bias: Bias = False,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Tensors:
    gate, up, down = (f"{module}.{name}" for name in names)
    return {
        **_linear(gate, "gate", "mlp", "input", size, "hidden_size", bias),
        **_linear(up, "up", "mlp", "input", size, "hidden_size", bias),
        **_linear(down, "down", "mlp", "output", "hidden_size", size, bias),
    }


def _mlp(up: str, down: str, bias: Bias) -> Tensors:
    """An MLP without a gate."""
    return {
        **_linear(up, "up", "mlp", "input", "intermediate_size", "hidden_size", bias),
        **_linear(down, "down", "mlp", "output", "hidden_size", "intermediate_size", bias),
    }


def _router(module: str, rows: str | int = "num_experts", role: str = "router", bias: bool = False) -> Tensors:
    router = Role(role, "router", "mlp", "input")
    tensors = {f"{module}.weight": Parameter(router, (rows, "hidden_size"))}
    return {**tensors, f"{module}.bias": Parameter(router, (rows,))} if bias else tensors


def _experts(size: str, published: Tensors | None = None) -> Parameters:
    """A router and gated experts.

    Transformers stacks the matrices of a layer's experts in memory, and writes them that way with
    ``save_original_format=False``.

    Args:
        size: the dimension that one expert's intermediate size is.
        published: the matrices of one expert as published checkpoints name them.
    """
    tensors = published or _gated_mlp("mlp.experts.{i}", size)
    return {
        **_router("mlp.gate"),
        "mlp.experts.gate_up_proj": Fused(_select(tensors, "gate", "up"), stacked=True),
        "mlp.experts.down_proj": Fused(_select(tensors, "down"), stacked=True),
    }


def _select(tensors: Tensors, *roles: str, kind: str = "matrix") -> Tensors:
    """The tensors of one kind that have one of these roles."""
    return {name: tensor for name, tensor in tensors.items() if tensor.role.kind == kind and tensor.role.name in roles}


# ------------------------------------------------------------------------------- layers of several rows

LLAMA = {**_pre_norms(), **_attention(), **_gated_mlp(bias="mlp_bias")}
QWEN3_ATTENTION = {**_pre_norms(), **_attention(), **_query_key_norms()}
GEMMA2 = {
    **_norm("input_layernorm", "input_norm", "attention", "input", offset=1.0),
    **_attention(),
    **_norm("post_attention_layernorm", "attention_output_norm", "attention", "output", offset=1.0),
    **_norm("pre_feedforward_layernorm", "post_attention_norm", "mlp", "input", offset=1.0),
    **_gated_mlp(),
    **_norm("post_feedforward_layernorm", "mlp_output_norm", "mlp", "output", offset=1.0),
}

# ------------------------------------------------------------------------------------ layers of one row

OLMO2 = {
    **_attention(),
    **_query_key_norms("query_size", "key_size"),
    **_norm("post_attention_layernorm", "attention_output_norm", "attention", "output"),
    **_gated_mlp(),
    **_norm("post_feedforward_layernorm", "mlp_output_norm", "mlp", "output"),
}
PHI3: Parameters = {
    **_pre_norms(),
    "self_attn.qkv_proj.weight": Fused(_query_key_value(bias=False)),
    **_linear("self_attn.o_proj", "o", "attention", "output", "hidden_size", "query_size"),
    "mlp.gate_up_proj.weight": Fused(_select(_gated_mlp(), "gate", "up")),
    **_linear("mlp.down_proj", "down", "mlp", "output", "hidden_size", "intermediate_size"),
}
NEOX_QUERY_KEY_VALUE = {
    **_linear("attention.query", "q", "attention", "input", "hidden_size", "hidden_size", "attention_bias"),
    **_linear("attention.key", "k", "attention", "input", "hidden_size", "hidden_size", "attention_bias"),
    **_linear("attention.value", "v", "attention", "input", "hidden_size", "hidden_size", "attention_bias"),
}
NEOX: Parameters = {
    **_pre_norms(bias=True),
    # The query, key and value rows of one head are contiguous.
    "attention.query_key_value.weight": Fused(
        _select(NEOX_QUERY_KEY_VALUE, "q", "k", "v"), groups="num_attention_heads"
    ),
    "attention.query_key_value.bias": Fused(
        _select(NEOX_QUERY_KEY_VALUE, "q", "k", "v", kind="bias"), groups="num_attention_heads"
    ),
    **_linear("attention.dense", "o", "attention", "output", "hidden_size", "hidden_size", "attention_bias"),
    **_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias=True),
}
STABLELM = {
    **_norm("input_layernorm", "input_norm", "attention", "input", bias=True),
    **_norm(
        "post_attention_layernorm", "post_attention_norm", "mlp", "input", bias=True, unless="use_parallel_residual"
    ),
    **_attention("use_qkv_bias", output_bias=False),
    # Every head has its own norm.
    **_norm(
        "self_attn.q_layernorm.norms.{i}", "q_norm", "attention", "inner", "head_dim", when="qk_layernorm",
        copies="num_attention_heads",
    ),
    **_norm(
        "self_attn.k_layernorm.norms.{i}", "k_norm", "attention", "inner", "head_dim", when="qk_layernorm",
        copies="num_key_value_heads",
    ),
    **_gated_mlp(),
}  # fmt: skip
MIXTRAL_EXPERT = _gated_mlp("block_sparse_moe.experts.{i}", names=("w1", "w3", "w2"))
GPT_OSS_EXPERT = _gated_mlp("mlp.experts.{i}", bias=True)
GPT_OSS: Parameters = {
    **_pre_norms(),
    **_attention(),
    "self_attn.sinks": Parameter(Role("sinks", "sink", "attention", "inner"), ("num_attention_heads",)),
    **_router("mlp.router", bias=True),
    # Experts are stored [in, out], and the outputs of gate and up alternate.
    "mlp.experts.gate_up_proj": Fused(
        _select(GPT_OSS_EXPERT, "gate", "up"), groups="intermediate_size", stacked=True, transposed=True
    ),
    "mlp.experts.gate_up_proj_bias": Fused(
        _select(GPT_OSS_EXPERT, "gate", "up", kind="bias"), groups="intermediate_size", stacked=True
    ),
    "mlp.experts.down_proj": Fused(_select(GPT_OSS_EXPERT, "down"), stacked=True, transposed=True),
    "mlp.experts.down_proj_bias": Fused(_select(GPT_OSS_EXPERT, "down", kind="bias"), stacked=True),
}

# ------------------------------------------------------------------------------------------------ table

TIED = {"tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA),
    "mistral": Family(LLAMA),
    "granite": Family(LLAMA),
    "smollm3": Family(LLAMA, defaults=TIED),
    "qwen2": Family({**_pre_norms(), **_attention(bias=True, output_bias=False), **_gated_mlp()}),
    "qwen3": Family({**QWEN3_ATTENTION, **_gated_mlp()}, defaults={"head_dim": 128}),
    "gemma": Family({**_pre_norms(offset=1.0), **_attention(), **_gated_mlp()}, defaults={**TIED, "head_dim": 256}),
    "gemma2": Family(GEMMA2, defaults={**TIED, "head_dim": 256}),
    "gemma3_text": Family({**GEMMA2, **_query_key_norms(offset=1.0)}, defaults={**TIED, "head_dim": 256}),
    "phi3": Family(PHI3),
    "olmo2": Family(OLMO2),
    "gpt_neox": Family(
        NEOX,
        defaults={"attention_bias": True, "use_parallel_residual": True},
        norm_bias=True,
        layer_prefix="gpt_neox.layers.{layer}.",
        embeddings="gpt_neox.embed_in.weight",
        final_norm="gpt_neox.final_layer_norm.weight",
        stored_names={"lm_head.weight": "embed_out.weight"},
        derived=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
    "starcoder2": Family(
        {**_pre_norms(bias=True), **_attention("use_bias", "use_bias"), **_mlp("mlp.c_fc", "mlp.c_proj", "use_bias")},
        defaults={**TIED, "use_bias": True},
        norm_bias=True,
    ),
    "stablelm": Family(STABLELM, norm_bias=True),
    "mixtral": Family(
        {**_pre_norms(), **_attention(), **_experts("intermediate_size", MIXTRAL_EXPERT)},
        stored_names={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
    ),
    "qwen2_moe": Family(
        {**_pre_norms(), **_attention("qkv_bias", output_bias=False)},
        dense=_gated_mlp(),
        sparse={
            **_experts("moe_intermediate_size"),
            **_gated_mlp("mlp.shared_expert", "shared_expert_intermediate_size"),
            **_router("mlp.shared_expert_gate", rows=1, role="shared_expert_gate"),
        },
        defaults={"qkv_bias": True},
    ),
    "qwen3_moe": Family(QWEN3_ATTENTION, dense=_gated_mlp(), sparse=_experts("moe_intermediate_size")),
    "olmoe": Family(
        {
            **_pre_norms(),
            **_attention(),
            **_query_key_norms("query_size", "key_size"),
            **_experts("intermediate_size"),
        }
    ),
    "gpt_oss": Family(GPT_OSS, defaults={"attention_bias": True, "head_dim": 64}),
}


def family_of(model_type: str | None) -> Family:
    """The row of a model's family.

    Args:
        model_type: as in config.json. None if it does not say.

    Raises:
        UserError: the family has no row.
    """
    if model_type is None or model_type not in FAMILIES:
        raise UserError(
            setting="model.path",
            value=f"a model of the family {model_type!r}",
            rule=f"the supported families are {', '.join(FAMILIES)}",
            remedy="Add a row for the family to FAMILIES in pipeline/models/families/table.py.",
        )
    return FAMILIES[model_type]


def role_names() -> set[str]:
    """The names of all roles that a tensor of any family can have."""
    return {role.name for family in FAMILIES.values() for role in family.roles.values()}
