"""The table of model families: one row describes everything that depends on a family.

A new family is a new row in ``FAMILIES``. Its layer is a mapping from tensor names to roles and dimensions, built from
the functions in ``parts.py``. A row can also have:

- ``Fused`` for projections or experts that are stored as one tensor.
- ``dense`` and ``sparse`` for families in which only some layers have experts.
- ``defaults`` for entries that config.json may leave out, as the family's config class fills them in.

``Family`` documents all columns. The tests compare every row with the model that transformers builds from the family's
config in ``tests/tiny_families.py``.

Mixture of experts: an expert is paired with the expert of the same index in other layers, and each of its matrices is
made like those of a dense MLP. Where a method preserves the base's logits, the outputs of all experts, shared ones
included, are silent. The router and the gate of shared experts are of the kind ``router``, because they mean nothing
without the experts that they choose among: they are copied where layers are copied, and averaged where layers are
averaged, as the experts are. OpT-DeUS transports their inputs and keeps their outputs, the experts, in order. LESA,
whose authors found no way to predict a router, takes that of the lower neighbor.
"""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.models.families.family import Family
from pipeline.models.families.parameters import Fused, Parameter, Parameters
from pipeline.models.families.parts import (
    attention,
    experts,
    gated_mlp,
    linear,
    norm,
    plain_mlp,
    pre_norms,
    query_key_norms,
    query_key_value,
    router,
    select_tensors,
)  # fmt: skip
from pipeline.models.families.tensors import Role

# ------------------------------------------------------------------------------- layers of several rows

LLAMA = {**pre_norms(), **attention(), **gated_mlp(bias="mlp_bias")}
QWEN3_ATTENTION = {**pre_norms(), **attention(), **query_key_norms()}
GEMMA2 = {
    **norm("input_layernorm", "input_norm", "attention", "input", offset=1.0),
    **attention(),
    **norm("post_attention_layernorm", "attention_output_norm", "attention", "output", offset=1.0),
    **norm("pre_feedforward_layernorm", "post_attention_norm", "mlp", "input", offset=1.0),
    **gated_mlp(),
    **norm("post_feedforward_layernorm", "mlp_output_norm", "mlp", "output", offset=1.0),
}

# ------------------------------------------------------------------------------------ layers of one row

OLMO2 = {
    **attention(),
    **query_key_norms("query_size", "key_size"),
    **norm("post_attention_layernorm", "attention_output_norm", "attention", "output"),
    **gated_mlp(),
    **norm("post_feedforward_layernorm", "mlp_output_norm", "mlp", "output"),
}
PHI3: Parameters = {
    **pre_norms(),
    "self_attn.qkv_proj.weight": Fused(query_key_value(bias=False)),
    **linear("self_attn.o_proj", "o", "attention", "output", "hidden_size", "query_size"),
    "mlp.gate_up_proj.weight": Fused(select_tensors(gated_mlp(), "gate", "up")),
    **linear("mlp.down_proj", "down", "mlp", "output", "hidden_size", "intermediate_size"),
}
NEOX_QUERY_KEY_VALUE = {
    **linear("attention.query", "q", "attention", "input", "hidden_size", "hidden_size", "attention_bias"),
    **linear("attention.key", "k", "attention", "input", "hidden_size", "hidden_size", "attention_bias"),
    **linear("attention.value", "v", "attention", "input", "hidden_size", "hidden_size", "attention_bias"),
}
NEOX: Parameters = {
    **pre_norms(bias=True),
    # The query, key and value rows of one head are contiguous.
    "attention.query_key_value.weight": Fused(select_tensors(NEOX_QUERY_KEY_VALUE), groups="num_attention_heads"),
    "attention.query_key_value.bias": Fused(
        select_tensors(NEOX_QUERY_KEY_VALUE, kind="bias"), groups="num_attention_heads"
    ),
    **linear("attention.dense", "o", "attention", "output", "hidden_size", "hidden_size", "attention_bias"),
    **plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias=True),
}
STABLELM = {
    **norm("input_layernorm", "input_norm", "attention", "input", bias=True),
    **norm(
        "post_attention_layernorm", "post_attention_norm", "mlp", "input", bias=True, unless="use_parallel_residual"
    ),
    **attention("use_qkv_bias", output_bias=False),
    # Every head has its own norm.
    **norm(
        "self_attn.q_layernorm.norms.{i}", "q_norm", "attention", "inner", "head_dim", when="qk_layernorm",
        copies="num_attention_heads",
    ),
    **norm(
        "self_attn.k_layernorm.norms.{i}", "k_norm", "attention", "inner", "head_dim", when="qk_layernorm",
        copies="num_key_value_heads",
    ),
    **gated_mlp(),
}  # fmt: skip
MIXTRAL_EXPERT = gated_mlp("block_sparse_moe.experts.{i}", names=("w1", "w3", "w2"))
GPT_OSS_EXPERT = gated_mlp("mlp.experts.{i}", bias=True)
GPT_OSS: Parameters = {
    **pre_norms(),
    **attention(),
    "self_attn.sinks": Parameter(Role("sinks", "sink", "attention", "inner"), ("num_attention_heads",)),
    **router("mlp.router", bias=True),
    # Experts are stored [in, out], and the outputs of gate and up alternate.
    "mlp.experts.gate_up_proj": Fused(
        select_tensors(GPT_OSS_EXPERT, "gate", "up"), groups="intermediate_size", stacked=True, transposed=True
    ),
    "mlp.experts.gate_up_proj_bias": Fused(
        select_tensors(GPT_OSS_EXPERT, "gate", "up", kind="bias"), groups="intermediate_size", stacked=True
    ),
    "mlp.experts.down_proj": Fused(select_tensors(GPT_OSS_EXPERT, "down"), stacked=True, transposed=True),
    "mlp.experts.down_proj_bias": Fused(select_tensors(GPT_OSS_EXPERT, "down", kind="bias"), stacked=True),
}

# ------------------------------------------------------------------------------------------------ table

TIED = {"tie_word_embeddings": True}
NO_WINDOW = {"use_sliding_window": False}

# Published configs of models with images leave all of these out.
GEMMA3_DEFAULTS = {
    **TIED, "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208,
    "max_position_embeddings": 131_072, "sliding_window": 4096,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA),
    "mistral": Family(LLAMA, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "granite": Family(LLAMA),
    "smollm3": Family(LLAMA, defaults={**TIED, **NO_WINDOW, "num_key_value_heads": 4}),
    "arcee": Family({**pre_norms(), **attention(), **plain_mlp("mlp.up_proj", "mlp.down_proj", "mlp_bias")}),
    "qwen2": Family(
        {**pre_norms(), **attention(bias=True, output_bias=False), **gated_mlp()},
        defaults={**NO_WINDOW, "num_key_value_heads": 32},
    ),
    "qwen3": Family(
        {**QWEN3_ATTENTION, **gated_mlp()}, defaults={**NO_WINDOW, "head_dim": 128, "num_key_value_heads": 32}
    ),
    "gemma": Family(
        {**pre_norms(offset=1.0), **attention(), **gated_mlp()},
        defaults={**TIED, "head_dim": 256, "num_key_value_heads": 16},
    ),
    "gemma2": Family(
        GEMMA2,
        defaults={
            **TIED,
            "head_dim": 256,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
        },
    ),
    "gemma3_text": Family({**GEMMA2, **query_key_norms(offset=1.0)}, defaults=GEMMA3_DEFAULTS),
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
        {
            **pre_norms(bias=True),
            **attention("use_bias", "use_bias"),
            **plain_mlp("mlp.c_fc", "mlp.c_proj", "use_bias"),
        },
        defaults={**TIED, "use_bias": True, "num_key_value_heads": 2},
        norm_bias=True,
    ),
    "stablelm": Family(STABLELM, defaults={"num_key_value_heads": 32}, norm_bias=True),
    "mixtral": Family(
        {**pre_norms(), **attention(), **experts("intermediate_size", MIXTRAL_EXPERT)},
        defaults={"num_key_value_heads": 8},
        stored_names={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
    ),
    "qwen2_moe": Family(
        {**pre_norms(), **attention("qkv_bias", output_bias=False)},
        dense=gated_mlp(),
        sparse={
            **experts("moe_intermediate_size"),
            **gated_mlp("mlp.shared_expert", "shared_expert_intermediate_size"),
            **router("mlp.shared_expert_gate", rows=1, role="shared_expert_gate"),
        },
        defaults={**NO_WINDOW, "qkv_bias": True, "num_key_value_heads": 16},
    ),
    "qwen3_moe": Family(
        QWEN3_ATTENTION,
        dense=gated_mlp(),
        sparse=experts("moe_intermediate_size"),
        defaults={**NO_WINDOW, "num_key_value_heads": 4},
    ),
    "olmoe": Family(
        {
            **pre_norms(),
            **attention(),
            **query_key_norms("query_size", "key_size"),
            **experts("intermediate_size"),
        }
    ),
    "gpt_oss": Family(
        GPT_OSS,
        defaults={"attention_bias": True, "head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128},
    ),
}


def family_of(model_type: str | None) -> Family:
    """The row of a model's family.

    Args:
        model_type: as in config.json. None if it is missing there.

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
