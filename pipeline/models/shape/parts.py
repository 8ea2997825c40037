"""What decoder layers are put together from: each part's tensors, from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Config:
    """config.json with the defaults of its family."""

    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """An entry that every config has."""
        return self.values[name]

    def get(self, name: str, default: Any) -> Any:
        """The entry, or the default where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    @property
    def head_size(self) -> int:
        """Of one attention head."""
        return int(self.get("head_dim", self["hidden_size"] // self["num_attention_heads"]))

    @property
    def queries(self) -> int:
        """Rows of q_proj."""
        return int(self["num_attention_heads"] * self.head_size)

    @property
    def keys(self) -> int:
        """Rows of k_proj and of v_proj."""
        return int(self.get("num_key_value_heads", self["num_attention_heads"])) * self.head_size

    @property
    def experts(self) -> int:
        """Experts of a sparse layer; 0 in a dense model."""
        return int(self.get("num_local_experts", self.get("num_experts", 0)))


def linear(module: str, rows: int, columns: int, bias: bool = False) -> Tensors:
    """A linear map of ``columns`` numbers to ``rows``."""
    return {f"{module}.weight": (rows, columns), **({f"{module}.bias": (rows,)} if bias else {})}


def norms(config: Config, *names: str, bias: bool = False) -> Tensors:
    """Norms of the residual stream."""
    size = (config["hidden_size"],)
    return {f"{name}.{part}": size for name in names for part in (("weight", "bias") if bias else ("weight",))}


def attention(config: Config, qkv_bias: bool, o_bias: bool) -> Tensors:
    """Queries, keys, values and the output projection."""
    hidden = config["hidden_size"]
    rows = {"q": config.queries, "k": config.keys, "v": config.keys}
    made: Tensors = {}
    for name, size in rows.items():
        made |= linear(f"self_attn.{name}_proj", size, hidden, qkv_bias)
    return made | linear("self_attn.o_proj", hidden, config.queries, o_bias)


def query_key_norms(query: int, key: int) -> Tensors:
    """Norms of queries and keys, of one head's size or of all."""
    return {"self_attn.q_norm.weight": (query,), "self_attn.k_norm.weight": (key,)}


def gated_mlp(config: Config, width: int, bias: bool = False, module: str = "mlp") -> Tensors:
    """An MLP whose input is projected twice, to be multiplied."""
    hidden = config["hidden_size"]
    return {
        **linear(f"{module}.gate_proj", width, hidden, bias),
        **linear(f"{module}.up_proj", width, hidden, bias),
        **linear(f"{module}.down_proj", hidden, width, bias),
    }


def experts(config: Config, width: int) -> Tensors:
    """A router and gated experts, each role's matrices stacked."""
    count, hidden = config.experts, config["hidden_size"]
    return {
        "mlp.gate.weight": (count, hidden),
        "mlp.experts.gate_up_proj": (count, 2 * width, hidden),
        "mlp.experts.down_proj": (count, hidden, width),
    }
