"""Building blocks for rows of the family table: roles and dimensions of common modules.

Arguments called ``bias`` are True, False, or the entry of config.json that decides whether there is a bias.
"""

from __future__ import annotations

from pipeline.models.families.parameters import Fused, Parameter, Parameters
from pipeline.models.families.tensors import Block, Role, Side

Tensors = dict[str, Parameter]
Bias = bool | str  # whether there is one, or the config entry that decides


def linear(
    module: str, role: str, block: Block, side: Side, rows: str | int, columns: str | int, bias: Bias = False
) -> Tensors:
    """The ``[rows, columns]`` matrix of a linear map, and its bias."""
    tensors = {f"{module}.weight": Parameter(Role(role, "matrix", block, side), (rows, columns))}
    if bias:
        when = bias if isinstance(bias, str) else ""
        tensors[f"{module}.bias"] = Parameter(Role(role, "bias", block, side), (rows,), when)
    return tensors


def norm(
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
    """The scale of a norm, and its shift if it has one. ``Role`` and ``Parameter`` document the arguments."""
    scale = Role(role, "norm", block, side, offset=offset)
    tensors = {f"{module}.weight": Parameter(scale, (size,), when, unless, copies)}
    if bias:
        tensors[f"{module}.bias"] = Parameter(Role(role, "norm", block, side), (size,), when, unless, copies)
    return tensors


def pre_norms(bias: bool = False, offset: float = 0.0) -> Tensors:
    """Norms of the residual stream before attention and before the MLP."""
    return {
        **norm("input_layernorm", "input_norm", "attention", "input", bias=bias, offset=offset),
        **norm("post_attention_layernorm", "post_attention_norm", "mlp", "input", bias=bias, offset=offset),
    }


def query_key_value(bias: Bias) -> Tensors:
    """The input projections of attention, possibly with fewer heads for keys and values than for queries."""
    return {
        **linear("self_attn.q_proj", "q", "attention", "input", "query_size", "hidden_size", bias),
        **linear("self_attn.k_proj", "k", "attention", "input", "key_size", "hidden_size", bias),
        **linear("self_attn.v_proj", "v", "attention", "input", "key_size", "hidden_size", bias),
    }


def attention(bias: Bias = "attention_bias", output_bias: Bias = "attention_bias") -> Tensors:
    """The four projections of attention."""
    output = linear("self_attn.o_proj", "o", "attention", "output", "hidden_size", "query_size", output_bias)
    return {**query_key_value(bias), **output}


def query_key_norms(query_size: str = "head_dim", key_size: str = "head_dim", offset: float = 0.0) -> Tensors:
    """Norms of queries and keys: by default of each head, with the same scale for all heads."""
    return {
        **norm("self_attn.q_norm", "q_norm", "attention", "inner", query_size, offset=offset),
        **norm("self_attn.k_norm", "k_norm", "attention", "inner", key_size, offset=offset),
    }


def gated_mlp(
    module: str = "mlp",
    size: str = "intermediate_size",
    bias: Bias = False,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Tensors:
    """An MLP that multiplies two projections of its input.

    Args:
        module: the module that holds the projections.
        size: the dimension that the intermediate size is.
        names: of gate, up and down projection within the module.
    """
    gate, up, down = (f"{module}.{name}" for name in names)
    return {
        **linear(gate, "gate", "mlp", "input", size, "hidden_size", bias),
        **linear(up, "up", "mlp", "input", size, "hidden_size", bias),
        **linear(down, "down", "mlp", "output", "hidden_size", size, bias),
    }


def plain_mlp(up: str, down: str, bias: Bias) -> Tensors:
    """An MLP without a gate, from the names of its two projections."""
    return {
        **linear(up, "up", "mlp", "input", "intermediate_size", "hidden_size", bias),
        **linear(down, "down", "mlp", "output", "hidden_size", "intermediate_size", bias),
    }


def router(module: str, rows: str | int = "num_experts", role: str = "router", bias: bool = False) -> Tensors:
    """The linear map that chooses experts, or that weights the shared ones."""
    chooser = Role(role, "router", "mlp", "input")
    tensors = {f"{module}.weight": Parameter(chooser, (rows, "hidden_size"))}
    return {**tensors, f"{module}.bias": Parameter(chooser, (rows,))} if bias else tensors


def experts(size: str, published: Tensors | None = None) -> Parameters:
    """A router and gated experts.

    Transformers stacks the matrices of a layer's experts in memory, and writes them that way with
    ``save_original_format=False``.

    Args:
        size: the dimension that one expert's intermediate size is.
        published: the matrices of one expert as published checkpoints name them.
    """
    tensors = published or gated_mlp("mlp.experts.{i}", size)
    return {
        **router("mlp.gate"),
        "mlp.experts.gate_up_proj": Fused(select_tensors(tensors, "gate", "up"), stacked=True),
        "mlp.experts.down_proj": Fused(select_tensors(tensors, "down"), stacked=True),
    }


def select_tensors(tensors: Tensors, *roles: str, kind: str = "matrix") -> Tensors:
    """The tensors of one kind with these roles. Without roles, all of the kind."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.role.kind == kind and (not roles or tensor.role.name in roles)
    }
