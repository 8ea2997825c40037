"""Aligned averaging against a search through all permutations, and what a permuted layer computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.config import AnyExpand
from pipeline.expansion.alignment import align
from pipeline.expansion.method import Workspace, method_of
from pipeline.models.families import LayerTensor, family_of
from pipeline.models.reading import ModelDirectory
from tests.tiny_families import TINY_CONFIGS, layer_tensors, layers_by_role, save_tiny

HEADS, KEYS, SIZE, HIDDEN, NEURONS = 4, 2, 3, 5, 6
GROUP = HEADS // KEYS
CONFIG = {"num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": SIZE, "hidden_size": HIDDEN}
ROWS = {"q": HEADS * SIZE, "k": KEYS * SIZE, "v": KEYS * SIZE, "gate": NEURONS, "up": NEURONS}
Named = dict[str, Tensor]  # by the name of the role, biases as "q.bias"


def _layer(seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    matrices = {name: draw(rows, HIDDEN) for name, rows in ROWS.items()}
    biases = {f"{name}.bias": draw(rows) for name, rows in ROWS.items()}
    outputs = {"o": draw(HIDDEN, HEADS * SIZE), "down": draw(HIDDEN, NEURONS), "o.bias": draw(HIDDEN)}
    return {**matrices, **biases, **outputs, "down.bias": draw(HIDDEN), "input_norm": draw(HIDDEN)}


def _as_tensors(layer: Named) -> dict[LayerTensor, Tensor]:
    roles = family_of("llama").roles
    found = {}
    for name, role in roles.items():
        key = f"{role.name}.bias" if role.kind == "bias" else role.name
        if key in layer:
            found[LayerTensor(name, role)] = layer[key]
    assert len(found) == len(layer)
    return found


def _by_role(layer: dict[LayerTensor, Tensor]) -> Named:
    return {f"{t.role.name}.bias" if t.role.kind == "bias" else t.role.name: value for t, value in layer.items()}


def _with_heads(layer: Named, queries: list[int], keys: tuple[int, ...], values: list[tuple[int, ...]]) -> Named:
    """Permutes row by row: query head h becomes head ``queries[h]`` of the layer, and likewise for keys and values."""
    q = [SIZE * head + d for head in queries for d in range(SIZE)]
    k = [SIZE * head + d for head in keys for d in range(SIZE)]
    v = [SIZE * head + d for head, dims in zip(keys, values, strict=True) for d in dims]
    o = [SIZE * head + d for place, head in enumerate(queries) for d in values[place // GROUP]]
    return {
        **layer,
        **{f"{name}{end}": layer[f"{name}{end}"][rows] for name, rows in (("q", q), ("k", k), ("v", v))
           for end in ("", ".bias")},
        "o": layer["o"][:, o],
    }  # fmt: skip


def _head_permutations(layer: Named, values: Iterable[tuple[int, ...]]) -> Iterator[tuple[Named, Any]]:
    for keys in permutations(range(KEYS)):
        for inner in product(permutations(range(GROUP)), repeat=KEYS):
            queries = [key * GROUP + g for key, order in zip(keys, inner, strict=True) for g in order]
            yield _with_heads(layer, queries, keys, [*values]), (queries, keys)


def _agreement(one: Named, other: Named, names: tuple[str, ...]) -> float:
    return sum(float((one[n].double() * other[n].double()).sum()) for n in names)


def _naive(lower: Named, upper: Named) -> Named:
    """The best permutation of heads, then of the dimensions of each head's values, then of neurons: all are tried."""
    attention = ("q", "k", "v", "o", "q.bias", "k.bias", "v.bias")
    same = [tuple(range(SIZE))] * KEYS
    tried = ((_agreement(lower, made, attention), order) for made, order in _head_permutations(upper, same))
    _, (queries, keys) = max(tried, key=lambda item: item[0])
    values = list(same)
    for head in range(KEYS):
        options = []
        for order in permutations(range(SIZE)):
            trial = [*values[:head], order, *values[head + 1 :]]
            options.append((_agreement(lower, _with_heads(upper, queries, keys, trial), attention), order))
        values[head] = max(options)[1]
    made = _with_heads(upper, queries, keys, values)
    options = []
    for neurons in permutations(range(NEURONS)):
        rows = {n: upper[n][list(neurons)] for n in ("gate", "up", "gate.bias", "up.bias")}
        trial_layer = {**made, **rows, "down": upper["down"][:, list(neurons)]}
        options.append((_agreement(lower, trial_layer, ("gate", "up", "gate.bias", "up.bias", "down")), trial_layer))
    return max(options, key=lambda item: item[0])[1]


@pytest.mark.parametrize("seed", range(3))
def test_the_new_layer_is_the_mean_with_the_best_of_all_permutations(
    expand_settings: Callable[..., AnyExpand], seed: int
) -> None:
    lower, upper = _layer(seed), _layer(seed + 100)
    method = method_of(expand_settings("aligned_average", new_layers=1, position=[0]))
    work = Workspace(config=CONFIG)
    base = [_as_tensors(lower), _as_tensors(upper)]
    made = _by_role({new.tensor: new.value for new in method.new_tensors(base, method.place(2), work)})
    best = _naive(lower, upper)
    assert made.keys() == best.keys()
    for name in made:
        assert torch.equal(made[name], (lower[name] + best[name]) / 2), name
    assert work.records["layer 1"]["neurons_moved"] > 0


def test_a_permuted_copy_is_put_back_into_place() -> None:
    layer = _layer(7)
    queries, keys = [3, 2, 0, 1], (1, 0)
    permuted = _with_heads(layer, queries, keys, [(2, 0, 1), (1, 0, 2)])
    neurons = [5, 0, 3, 1, 4, 2]
    permuted |= {name: permuted[name][neurons] for name in ("gate", "up", "gate.bias", "up.bias")}
    permuted["down"] = permuted["down"][:, neurons]
    aligned, moved = align(_as_tensors(permuted), _as_tensors(layer), HEADS)
    assert all(torch.equal(value, layer[name]) for name, value in _by_role(aligned).items())
    assert moved == {"query_heads_moved": 4, "key_value_heads_moved": 2, "neurons_moved": 5}  # neuron 4 is in place


# fused projections, per-head and joint norms of queries and keys, experts, sinks, interleaved query, key and value rows
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_an_aligned_layer_computes_what_it_did(family: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base", tiny_tokenizer)
    stored = ModelDirectory(base)
    row = family_of(family)
    tensors = {tensor.name: tensor for tensor in layer_tensors(row, stored.specs, stored.config)}
    first, second, upper, _ = ({tensors[name]: v for name, v in layer.items()} for layer in layers_by_role(base))
    heads = stored.config["num_attention_heads"]
    attempts = [align(upper, other, heads) for other in (first, second)]
    aligned, moved = max(attempts, key=lambda attempt: attempt[1]["query_heads_moved"])
    assert moved["neurons_moved"] > 0 and moved["query_heads_moved"] > 0

    weights = load_file(base / "model.safetensors")
    for tensor, value in aligned.items():
        name = row.tensor_name(2, tensor.stored)
        if tensor.place is None:
            weights[name] = value.contiguous()
        else:
            tensor.place.write(weights[name], value)
    permuted = tmp_path / "permuted"
    permuted.mkdir()
    (permuted / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(weights, permuted / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits for path in (base, permuted)
        )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
