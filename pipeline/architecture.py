"""One table row a model family: which tensor of a layer plays which role.

Everything that depends on a family stands in this table. Methods see a layer as tensors with roles and never ask
for a family's name. A new family is a new row; what a row can say beyond the ones below: a fused projection is one
matrix (``qkv_proj``), an output norm is a norm on the ``output`` side that carries ``silent``, and the matrices of
mixture-of-experts layers are patterns with ``{expert}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import UserError

Kind = Literal["matrix", "bias", "norm"]
Block = Literal["attention", "mlp"]
Side = Literal["input", "inner", "output"]


@dataclass(frozen=True)
class Role:
    """What a tensor does.

    Attributes:
        name: q, k, v, o, gate, up, down, input_norm, post_attention_norm, ...
        kind: a linear map's ``[out, in]`` matrix, its ``[out]`` bias, or a norm's scale.
        block: which of the layer's two residual blocks it belongs to.
        side: ``input`` reads the block's input, ``output`` writes what is added to the residual stream,
            ``inner`` sees neither.
        silent: the value that, filled into all of the block's tensors that have one, makes the block add
            exactly zero; None for tensors that are left alone.
    """

    name: str
    kind: Kind
    block: Block
    side: Side
    silent: float | None = None


@dataclass(frozen=True)
class LayerTensor:
    """One tensor of every layer: its name within a layer, such as ``self_attn.q_proj.weight``, and its role."""

    name: str
    role: Role

    @property
    def module(self) -> str:
        """The name without ``.weight`` or ``.bias``: a matrix and its bias share it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Architecture:
    """One model family's names. ``layer`` maps a tensor's name within a layer to its role."""

    layer: Mapping[str, Role] = field(repr=False)
    layer_prefix: str = "model.layers.{layer}."
    embeddings: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    derived: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)  # buffers in old checkpoints, made anew from config

    def layer_of(self, tensor_name: str) -> int | None:
        """The layer that a tensor belongs to; None outside the layers."""
        split = self.split(tensor_name)
        return None if split is None else split[0]

    def split(self, tensor_name: str) -> tuple[int, str] | None:
        """A full name as layer and name within the layer; None outside the layers."""
        before, after = self.layer_prefix.split("{layer}")
        match = re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after) + "(.+)", tensor_name)
        return None if match is None else (int(match[1]), match[2])

    def tensor_name(self, layer: int, name: str) -> str:
        """The full name of a layer's tensor; the inverse of ``split``."""
        return self.layer_prefix.format(layer=layer) + name

    def is_derived(self, tensor_name: str) -> bool:
        """Whether a tensor holds nothing that was learnt, so that it need not be kept."""
        split = self.split(tensor_name)
        return split is not None and split[1] in self.derived

    def layer_tensors(self, tensor_names: Iterable[str], num_layers: int) -> list[LayerTensor]:
        """The tensors that every layer has, in the order of layer 0's names.

        Raises:
            UserError: the model's layers are not named as the family's, differ in what they hold, or hold a tensor
                that has no role here.
        """
        held: list[list[str]] = [[] for _ in range(num_layers)]
        for layer, name in filter(None, map(self.split, tensor_names)):
            if layer >= num_layers:
                raise _refuse(self.tensor_name(layer, name), f"config.json speaks of {num_layers} layers only")
            if name not in self.derived:
                held[layer].append(name)
        for layer, names in enumerate(held):
            if not names:
                raise _refuse(self.tensor_name(layer, "*"), "the model has no tensors of that name")
            if set(names) != set(held[0]):
                differing = ", ".join(sorted(set(names) ^ set(held[0])))
                raise _refuse(f"layers 0 and {layer}", f"they differ in {differing}, and new layers need like ones")
        return [LayerTensor(name, self._role_of(name)) for name in held[0]]

    def _role_of(self, name: str) -> Role:
        role = self.layer.get(name) or self.layer.get(re.sub(r"\.\d+\.", ".{expert}.", name))
        if role is None:
            raise UserError(
                setting="model.path",
                value=name,
                rule="this tensor of a layer has no role in the family's row of the architecture table",
                remedy="Add its name and role to the family's row in pipeline/architecture.py.",
            )
        return role


def _refuse(value: str, rule: str) -> UserError:
    remedy = "Choose a model whose layers are all alike and named as its family's are by save_pretrained."
    return UserError(setting="model.path", value=value, rule=rule, remedy=remedy)


def _linear(module: str, name: str, block: Block, side: Side) -> dict[str, Role]:
    """A linear map's matrix and its bias, where the config gives it one."""
    silent = 0.0 if side == "output" else None
    return {
        f"{module}.weight": Role(name, "matrix", block, side, silent),
        f"{module}.bias": Role(name, "bias", block, side, silent),
    }


def _norm(module: str, name: str, block: Block, side: Side) -> dict[str, Role]:
    return {f"{module}.weight": Role(name, "norm", block, side)}


_LLAMA_LAYER: dict[str, Role] = {
    **_norm("input_layernorm", "input_norm", "attention", "input"),
    **_linear("self_attn.q_proj", "q", "attention", "input"),
    **_linear("self_attn.k_proj", "k", "attention", "input"),
    **_linear("self_attn.v_proj", "v", "attention", "input"),
    **_linear("self_attn.o_proj", "o", "attention", "output"),
    **_norm("post_attention_layernorm", "post_attention_norm", "mlp", "input"),
    **_linear("mlp.gate_proj", "gate", "mlp", "input"),
    **_linear("mlp.up_proj", "up", "mlp", "input"),
    **_linear("mlp.down_proj", "down", "mlp", "output"),
}
_QWEN3_LAYER: dict[str, Role] = {
    **_LLAMA_LAYER,
    **_norm("self_attn.q_norm", "q_norm", "attention", "inner"),
    **_norm("self_attn.k_norm", "k_norm", "attention", "inner"),
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_LLAMA_LAYER),
    "mistral": Architecture(_LLAMA_LAYER),
    "qwen2": Architecture(_LLAMA_LAYER),
    "qwen3": Architecture(_QWEN3_LAYER),
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
            remedy="Add a row that gives each tensor of a layer its role to ARCHITECTURES in pipeline/architecture.py.",
        )
    return ARCHITECTURES[model_type]
