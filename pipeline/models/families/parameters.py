"""The entries of a family's row: tensors with their roles and dimensions, and how several are stored as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from math import gcd
from typing import Any

from pipeline.models.families.tensors import Place, Role

Config = Mapping[str, Any]  # the content of config.json


EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
LATENT_HEADS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # of multi-head latent attention (DeepSeek)
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")


def num_experts(config: Config) -> int:
    """Experts per layer, not counting shared ones. 0 for a dense model."""
    return next((config[name] for name in EXPERT_COUNTS if type(config.get(name)) is int and config[name]), 0)


def expert_share(config: Config) -> Fraction:
    """The fraction of a layer's experts that a token is routed to. 1 for a dense model."""
    experts = num_experts(config)
    if not experts:
        return Fraction(1)
    name = next((name for name in EXPERTS_PER_TOKEN if config.get(name)), EXPERTS_PER_TOKEN[0])
    return Fraction(config[name], experts)


def head_size(config: Config, head_dim: int) -> int:
    """The size of a head's query, key and value: the mean of key and value where they differ, as in latent attention.

    Args:
        config: with the family's defaults.
        head_dim: the size in other families. In those with latent attention it is that of the rotated part.
    """
    unrotated, rotated, value = (config.get(name) for name in LATENT_HEADS)
    key = unrotated + rotated if unrotated and rotated else head_dim
    return int(key + (value or key)) // 2


def dimension(config: Config, name: str | int) -> int:
    """The size of a dimension: an entry of config.json, or one of the sizes below that follow from several entries."""
    match name:
        case int():
            return name
        case "num_experts":
            # A row with experts needs their number, so a missing entry is an error rather than 0.
            return num_experts(config) or int(config["num_experts"])
        case "head_dim":
            return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
        case "num_key_value_heads":
            return int(config.get("num_key_value_heads") or config["num_attention_heads"])
        case "query_size":  # rows of q_proj
            return int(config["num_attention_heads"]) * dimension(config, "head_dim")
        case "key_size":  # rows of k_proj and of v_proj
            return dimension(config, "num_key_value_heads") * dimension(config, "head_dim")
        case _:
            return int(config[name])


@dataclass(frozen=True)
class LinearMap:
    """The matrix of a linear map, ``[rows, columns]``, or as many matrices as there are experts."""

    role: str
    rows: int
    columns: int
    count: int = 1

    @property
    def entries(self) -> int:
        """The number of elements."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class Parameter:
    """One tensor of a layer.

    Attributes:
        role: what it does. ``silent`` and ``after_attention`` are left to ``Family``.
        shape: the names of its dimensions, see ``dimension``; matrices are ``[out, in]``.
        when: the config entry that decides whether a model has this tensor. Empty if every model has it.
        unless: the config entry of models that do not have this tensor.
        copies: for a name with ``{i}``, the dimension that gives the number of such tensors in a layer.
    """

    role: Role
    shape: tuple[str | int, ...]
    when: str = ""
    unless: str = ""
    copies: str = ""

    @property
    def matrix_roles(self) -> set[str]:
        """The name of its role if it is a matrix."""
        return {self.role.name} if self.role.kind == "matrix" else set()

    def linear_maps(self, config: Config) -> tuple[LinearMap, ...]:
        """The matrix of its linear map. Empty for other tensors."""
        if self.role.kind != "matrix" or len(self.shape) != 2:
            return ()
        rows, columns = (dimension(config, size) for size in self.shape)
        return (LinearMap(self.role.name, rows, columns),)

    def exists(self, config: Config) -> bool:
        """Whether a model with this config has the tensor."""
        return (not self.when or bool(config.get(self.when))) and not (self.unless and config.get(self.unless))

    def shapes(self, name: str, config: Config) -> dict[str, tuple[int, ...]]:
        """Shape by name within the layer."""
        shape = tuple(dimension(config, size) for size in self.shape)
        copies = range(dimension(config, self.copies)) if self.copies else range(1)
        return {name.format(i=index): shape for index in copies}


@dataclass(frozen=True)
class Fused:
    """Several parameters of a layer that are stored as one tensor, along their rows.

    Attributes:
        parts: parameters by name within a layer, in the order of their rows. Names of experts contain ``{i}``.
        groups: the dimension that gives the number of times the sequence of parts repeats. None if each part is
            contiguous.
        stacked: whether the first dimension is the expert.
        transposed: whether matrices are stored ``[in, out]``.
    """

    parts: Mapping[str, Parameter]
    groups: str | int | None = None
    stacked: bool = False
    transposed: bool = False

    @property
    def matrix_roles(self) -> set[str]:
        """The names of the roles of its matrices."""
        return {role for part in self.parts.values() for role in part.matrix_roles}

    def linear_maps(self, config: Config) -> tuple[LinearMap, ...]:
        """The matrices of its parts."""
        count = dimension(config, "num_experts") if self.stacked else 1
        return tuple(replace(each, count=count) for part in self.parts.values() for each in part.linear_maps(config))

    def exists(self, config: Config) -> bool:
        """Whether a model with this config has the tensor."""
        return next(iter(self.parts.values())).exists(config)

    def shapes(self, name: str, config: Config) -> dict[str, tuple[int, ...]]:
        """Shape of the stored tensor, by its name within the layer."""
        parts = [tuple(dimension(config, size) for size in part.shape) for part in self.parts.values()]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        if self.transposed:
            shape = shape[::-1]
        return {name: (dimension(config, "num_experts"), *shape) if self.stacked else shape}

    def places(self, stored: str, config: Config) -> Iterator[tuple[str, Role, Place]]:
        """Name, role and place of every part of the stored tensor with this name, expert by expert."""
        rows = [part.shape[0] for part in self.parts.values()]
        # Parts of equal size are equal shares, whatever their size is.
        shares = [1] * len(rows) if len(set(rows)) == 1 else [dimension(config, size) for size in rows]
        common = gcd(*shares)
        shares = [share // common for share in shares]
        bounds = list(pairwise(accumulate(shares, initial=0)))
        groups = dimension(config, self.groups) if self.groups else 1
        for expert in range(num_experts(config)) if self.stacked else (None,):
            for (name, part), (begin, end) in zip(self.parts.items(), bounds, strict=True):
                place = Place(stored, expert, self.transposed, groups, begin, end, sum(shares))
                yield name.format(i=expert), part.role, place


Parameters = Mapping[str, Parameter | Fused]  # by name within a layer, ``{i}`` standing for any number
