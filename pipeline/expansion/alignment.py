"""Permutes the heads and neurons of one layer to match those of another.

The neurons of an MLP and the heads of attention have no order of their own: permuting the rows that compute them and
the columns that read them leaves what the layer computes as it is. Of all such permutations, those are chosen that
maximize the sum of the products of all weights of the two layers, which minimizes their distance (weight matching, Git
Re-Basin, arXiv 2209.04836, section 3.2). Each is an assignment problem, solved exactly.

- Neurons of an MLP, or of each expert: rows of gate and up, columns of down.
- Key-value heads, each with its group of query heads, which are permuted among themselves.
- Dimensions of a head's values: rows of v, columns of o. Those of queries and keys stay in place, because rotary
  embeddings rotate every pair of them at its own frequency, and norms of heads scale each of them on its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pipeline.expansion.method import LayerWeights
from pipeline.models.families import LayerTensor


@dataclass(frozen=True)
class Heads:
    """The heads of an attention block: ``queries // keys`` query heads share one head of keys and values."""

    queries: int
    keys: int

    @classmethod
    def of(cls, layer: LayerWeights, queries: int) -> Heads:
        """Counts the heads of keys and values, which are as large as the ``queries`` heads of queries."""
        rows = {tensor.role.name: len(value) for tensor, value in layer.items() if tensor.role.kind == "matrix"}
        return cls(queries, rows["k"] * queries // rows["q"])


@dataclass(frozen=True)
class HeadOrder:
    """Which head or dimension of the other layer comes at each place.

    Attributes:
        queries: ``[query heads]``
        keys: ``[key-value heads]``
        values: ``[key-value heads, value dimensions]``, within the head that comes there.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor


def align(layer: LayerWeights, like: LayerWeights, heads: int) -> tuple[dict[LayerTensor, Tensor], dict[str, int]]:
    """Permutes the heads and neurons of ``layer`` so that they resemble those of ``like``, float32.

    Args:
        layer: the layer to permute.
        like: the layer that it is to resemble.
        heads: the number of query heads.

    Returns:
        The permuted tensors, which compute the same function, and how many heads and neurons have moved.
    """
    aligned = {tensor: value.float() for tensor, value in layer.items()}
    target = {tensor: value.float() for tensor, value in like.items()}
    order = _head_order(target, aligned, Heads.of(aligned, heads))
    moved = {"query_heads_moved": _moved(order.queries), "key_value_heads_moved": _moved(order.keys)}
    moved["neurons_moved"] = 0
    aligned |= _with_heads_in(order, aligned)
    for part in _mlps(aligned):
        neurons = best_order(_neurons(target, part), _neurons(aligned, part))
        moved["neurons_moved"] += _moved(neurons)
        for tensor in part:
            aligned[tensor] = aligned[tensor][neurons] if tensor.role.side == "input" else aligned[tensor][:, neurons]
    return aligned, moved


def best_order(like: Tensor, rows: Tensor) -> Tensor:
    """Returns the order of ``rows [n, d]`` with the largest sum of products with ``like [n, d]``."""
    return _assignment(like @ rows.T)[1]


def _assignment(similarity: Tensor) -> tuple[float, Tensor]:
    """Returns the largest sum of entries, one from each row and column, and the column of each row's entry."""
    entries = similarity.double().cpu().numpy()
    rows, columns = linear_sum_assignment(entries, maximize=True)
    return float(entries[rows, columns].sum()), torch.from_numpy(columns).to(similarity.device)


def _moved(order: Tensor) -> int:
    return int((order != torch.arange(len(order), device=order.device)).sum())


# ------------------------------------------------------------------------------------------ neurons


def _mlps(layer: LayerWeights) -> list[list[LayerTensor]]:
    """Returns the tensors that are permuted together: matrices and input biases of the MLP, or of each expert."""
    parts: dict[str, list[LayerTensor]] = {}
    for tensor in layer:
        role = tensor.role
        if role.block == "mlp" and (role.kind == "matrix" or (role.kind == "bias" and role.side == "input")):
            parts.setdefault(tensor.module.rpartition(".")[0], []).append(tensor)
    return [*parts.values()]


def _neurons(layer: LayerWeights, part: Iterable[LayerTensor]) -> Tensor:
    """Returns all weights of every neuron ``[neurons, weights]``."""
    return torch.cat([_rows(layer[tensor] if tensor.role.side == "input" else layer[tensor].T) for tensor in part], 1)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor[:, None]  # a bias is one weight of each neuron


# -------------------------------------------------------------------------------------------- heads


def _head_order(like: LayerWeights, layer: LayerWeights, heads: Heads) -> HeadOrder:
    one, other = (_Attention(weights, heads) for weights in (like, layer))
    group = heads.queries // heads.keys
    # The best order of query heads for every pair of key-value heads, and then the best pairs.
    queries = (one.queries.flatten(1) @ other.queries.flatten(1).T).unflatten(1, (-1, group)).unflatten(0, (-1, group))
    pairs = one.keys_values.flatten(1) @ other.keys_values.flatten(1).T
    within: dict[tuple[int, int], Tensor] = {}
    for a in range(heads.keys):
        for b in range(heads.keys):
            score, within[a, b] = _assignment(queries[a, :, b])
            pairs[a, b] += score
    _, keys = _assignment(pairs)
    query_order = torch.cat([int(b) * group + within[a, int(b)] for a, b in enumerate(keys)])
    values = [
        best_order(one.value_weights(a, range(a * group, (a + 1) * group)),
                   other.value_weights(int(b), query_order[a * group : (a + 1) * group].tolist()))
        for a, b in enumerate(keys)
    ]  # fmt: skip
    return HeadOrder(query_order, keys, torch.stack(values))


class _Attention:
    """The weights of an attention block, head by head.

    Attributes:
        queries: ``[query heads, weights]`` of q and o.
        keys_values: ``[key-value heads, weights]`` of k and v.
    """

    def __init__(self, layer: LayerWeights, heads: Heads) -> None:
        parts: dict[str, list[Tensor]] = {}
        for tensor, value in layer.items():
            role = tensor.role
            if role.block == "attention" and role.kind in ("matrix", "bias") and (role.side, role.kind) != _OUTPUT_BIAS:
                parts.setdefault(role.name, []).append(_rows(value))
        outputs = parts["o"][0].T.unflatten(0, (heads.queries, -1))  # [query heads, value size, hidden]
        values = torch.cat(parts["v"], 1).unflatten(0, (heads.keys, -1))
        queries, keys = (
            torch.cat(parts[name], 1).unflatten(0, (count, -1)).flatten(1)
            for name, count in (("q", heads.queries), ("k", heads.keys))
        )
        self._outputs, self._values = outputs, values
        self.queries = torch.cat([queries, outputs.flatten(1)], 1)
        self.keys_values = torch.cat([keys, values.flatten(1)], 1)

    def value_weights(self, head: int, queries: Iterable[int]) -> Tensor:
        """Returns the weights of every dimension of a head's values ``[value size, weights]``, in v and in o."""
        return torch.cat([self._values[head], *(self._outputs[query] for query in queries)], 1)


_OUTPUT_BIAS = ("output", "bias")


def _with_heads_in(order: HeadOrder, layer: LayerWeights) -> dict[LayerTensor, Tensor]:
    """Returns the tensors of attention that depend on the order of heads, in the given order."""
    group = len(order.queries) // len(order.keys)
    size = order.values.shape[1]
    value_rows = (order.keys[:, None] * size + order.values).flatten()
    # Queries of a group read the values of one head, in the order of its dimensions.
    output_columns = (order.queries[:, None] * size + order.values.repeat_interleave(group, 0)).flatten()
    permuted: dict[LayerTensor, Tensor] = {}
    for tensor, value in layer.items():
        role = tensor.role
        if role.block != "attention" or (role.side, role.kind) == _OUTPUT_BIAS:
            continue
        match role.name:
            case "o":
                permuted[tensor] = value[:, output_columns]
            case "v":
                permuted[tensor] = value[value_rows]
            case "q" | "sinks":
                permuted[tensor] = _heads_of(value, order.queries)
            case "k":
                permuted[tensor] = _heads_of(value, order.keys)
    return permuted | _permuted_norms(order, layer)


def _heads_of(value: Tensor, order: Tensor) -> Tensor:
    """Returns the rows of all heads in another order of heads."""
    return value.unflatten(0, (len(order), -1))[order].flatten(0, 1)


def _permuted_norms(order: HeadOrder, layer: LayerWeights) -> dict[LayerTensor, Tensor]:
    """Permutes norms of queries and keys with a scale per head. A scale that all heads share stays as it is."""
    permuted: dict[LayerTensor, Tensor] = {}
    for name, heads, rows_of in (("q_norm", order.queries, "q"), ("k_norm", order.keys, "k")):
        norms = sorted((tensor for tensor in layer if tensor.role.name == name), key=_number)
        rows = next(len(value) for tensor, value in layer.items() if tensor.role.name == rows_of)
        if len(norms) == len(heads) > 1:  # one tensor per head
            permuted |= {tensor: layer[norms[int(head)]] for tensor, head in zip(norms, heads, strict=True)}
        elif norms and len(layer[norms[0]]) == rows:
            permuted |= {tensor: _heads_of(layer[tensor], heads) for tensor in norms}
    return permuted


def _number(tensor: LayerTensor) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", tensor.name)))
