"""Infers what a row of the family table says, for one config, from the model that transformers builds.

Shapes come from the model of the config on the meta device. Roles come from a small random model of the same structure,
in which it is verified that the silent values make every layer the identity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import one_line
from pipeline.models.cache_check import CACHE_TOLERANCE, cache_difference, difference
from pipeline.models.families.family import Family, InferredLayers
from pipeline.models.families.parameters import (
    EXPERT_COUNTS,
    EXPERTS_PER_TOKEN,
    LATENT_HEADS,
    Fused,
    Parameter,
    Parameters,
    num_experts,
)
from pipeline.models.families.tensors import Role
from pipeline.models.family_inference.decoder import (
    Decoder,
    LayerCall,
    NotUnderstoodError,
    call_layers,
    decoder_of,
    filled,
)
from pipeline.models.family_inference.layout import EXPERT_INDEX, Layout, layout_of
from pipeline.models.family_inference.roles import NAMES, LayerParts
from pipeline.models.family_inference.silence import silence
from pipeline.models.family_inference.small import NoSmallModelError, randomized, small_model, tokens_for
from pipeline.models.family_inference.splits import Division, split_attention, split_mlp
from pipeline.models.forward import LogitTransform, packed_mask
from pipeline.models.layer_config import rebuild_config

PACKING_TOLERANCE = 1e-3  # relative to the largest hidden state or logit
Signature = tuple[tuple[str, tuple[int, ...]], ...]


def infer_family(values: Mapping[str, Any]) -> Family:
    """Infers the family of the model of a config.json.

    Raises:
        NotUnderstoodError: it cannot be inferred, or the verification fails.
    """
    config, real = _build(values)
    parameters = sum(parameter.numel() for parameter in real.parameters())
    try:
        model = small_model(config, parameters)
    except NoSmallModelError as error:
        raise NotUnderstoodError(f"no small model of its structure can be built and run ({error})") from error
    return _infer(decoder_of(real), decoder_of(model))


def _build(values: Mapping[str, Any]) -> tuple[Any, PreTrainedModel]:
    try:
        with TemporaryDirectory() as directory:  # reading the file undoes what JSON cannot express
            (Path(directory) / "config.json").write_text(json.dumps(dict(values)))
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            return config, AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise NotUnderstoodError(
            f"transformers cannot build a model from its config ({type(error).__name__}: {one_line(error)})"
        ) from error


def _infer(real: Decoder, small: Decoder) -> Family:
    _check_causal(small.model)
    _check_cache(small.model)
    not_trained = why_not_trained(small.model)
    calls = call_layers(small)
    first: dict[Signature, int] = {}
    kind_of: list[int] = []
    representatives: list[int] = []
    for layer in range(len(real.layers)):
        signature = tuple((name, tuple(tensor.shape)) for name, tensor in real.inside(layer).items())
        if signature not in first:
            first[signature] = len(representatives)
            representatives.append(layer)
        kind_of.append(first[signature])
    parts, faults = [], ""
    for layer in representatives:
        made, fault = _parts_of(small, calls[layer], layer)
        parts.append(made)
        faults = faults or fault
    if faults:  # an expanded model is a mixture of all kinds
        parts = [replace(made, silence=None) for made in parts]
    for layer, kind in enumerate(kind_of):
        _check_silent(small, calls[layer], layer, parts[kind])
    depends_on_depth = not faults and bool(faults := _depth_fault(small, [parts[kind] for kind in kind_of]))
    if depends_on_depth:
        parts = [replace(made, silence=None) for made in parts]
    splits = [_splits(made) for made in parts]
    layout = layout_of(small, representatives)  # overwrites the small model's weights
    sizes = _Sizes(small.model.config, real.model.config)
    kinds = tuple(
        _entries(made, split, layout, real.inside(layer), sizes)
        for made, split, layer in zip(parts, splits, representatives, strict=True)
    )
    family = _family(real, layout, kinds, tuple(kind_of))
    assert family.inference is not None
    found = replace(family.inference, not_silenced=faults, not_trained=not_trained, depends_on_depth=depends_on_depth)
    return replace(family, inference=found)


def _parts_of(small: Decoder, call: LayerCall, layer: int) -> tuple[LayerParts, str]:
    steps = call.trace()
    hidden, experts = call.hidden.shape[-1], num_experts(small.model.config.to_dict())
    try:
        found, fault = silence(call, steps), ""
    except NotUnderstoodError as error:
        found, fault = None, str(error)
    return LayerParts(call, steps, small.inside(layer), found, hidden, experts), fault


@torch.no_grad()
def _check_causal(model: PreTrainedModel) -> None:
    tokens = tokens_for(model)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 80
    before, after = (model(each, use_cache=False).logits[:, :-1] for each in (tokens, changed))
    if not torch.allclose(before, after, atol=1e-4):
        raise NotUnderstoodError("the model attends to later tokens, so it is not a decoder")


def _check_cache(model: PreTrainedModel) -> None:
    """Checks that decoding with a cache equals decoding without one, as the expanded model must."""
    try:
        found = cache_difference(model, tokens_for(model))
    except Exception as error:
        raise NotUnderstoodError(
            f"its model does not decode with a cache ({type(error).__name__}: {one_line(error)})"
        ) from error
    if not found <= CACHE_TOLERANCE:
        raise NotUnderstoodError(
            f"in a small model of its structure, decoding with a cache differs from decoding without by {found:.2g}"
        )


@torch.no_grad()
def why_not_trained(model: PreTrainedModel) -> str:
    """Returns why the training stages cannot train a model; empty if they can.

    They compute the logits from the last hidden state, the head's matrix and its bias, and pack several documents into
    a block, with positions that restart at every document.
    """
    head = model.get_output_embeddings()
    if head is None:
        return "it has no head"
    tokens = tokens_for(model)
    half = tokens.shape[1] // 2
    positions = torch.arange(half)[None]
    body: Any = model.base_model
    try:
        both = positions.repeat(1, 2)
        mask = packed_mask(model, both)
        packed = body(input_ids=tokens, position_ids=both, attention_mask=mask, use_cache=False)
        alone = body(input_ids=tokens[:, half:], position_ids=positions, attention_mask=None, use_cache=False)
    except Exception as error:  # noqa: BLE001 - the modules of any family run here
        return f"it does not take positions of packed documents ({type(error).__name__}: {one_line(error)})"
    if "last_hidden_state" not in alone:
        return f"{type(body).__name__} is not divided into hidden states and a head"
    if difference(alone.last_hidden_state, packed.last_hidden_state[:, half:]) > PACKING_TOLERANCE:
        return "documents that are packed into one block would not be separated"
    transform = LogitTransform.from_config(model.config)
    logits = transform.scale * linear(alone.last_hidden_state, head.weight, getattr(head, "bias", None))
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    expected = model(tokens[:, half:], position_ids=positions, use_cache=False).logits
    return "" if difference(expected, logits) <= PACKING_TOLERANCE else "its logits are not its head's output"


def _check_silent(small: Decoder, call: LayerCall, layer: int, parts: LayerParts) -> None:
    """Checks that the values which silence one layer of a kind silence another."""
    if parts.silence is None:
        return
    with filled(parts.silence.values, dict(small.layers[layer].named_parameters())):
        if not call.is_identity():
            raise NotUnderstoodError(
                f"{', '.join(parts.silence.values)} silence another layer with the same tensors, but not layer {layer}"
            )


@torch.no_grad()
def _depth_fault(small: Decoder, parts: list[LayerParts]) -> str:
    """Returns why a model with a silent copy of every layer has other logits; empty if it has the same.

    In some families a layer depends on its index, or on the number of layers.
    """
    config = small.model.config
    sources = [layer for layer in range(len(parts)) for _ in range(2)]
    try:
        values = json.loads(config.to_json_string(use_diff=False))
        deeper = decoder_of(randomized(type(config).from_dict(rebuild_config(values, sources))))
        outside = {name: value for name, value in small.model.state_dict().items() if small.split(name) is None}
        deeper.model.load_state_dict(outside, strict=False)
        for index, source in enumerate(sources):
            deeper.layers[index].load_state_dict(small.layers[source].state_dict())
            silent = parts[source].silence
            if index % 2 and silent is not None:
                for name, value in silent.values.items():
                    deeper.layers[index].get_parameter(name).fill_(value)
    except Exception:  # noqa: BLE001 - its config cannot express twice as many layers
        return ""
    tokens = tokens_for(small.model)
    found = difference(small.model(tokens, use_cache=False).logits, deeper.model(tokens, use_cache=False).logits)
    if found <= CACHE_TOLERANCE:
        return ""
    return f"its layers depend on their index or on the number of layers, which changes the logits by {found:.2g}"


# -------------------------------------------------------------------------------------------- fused projections


def _splits(parts: LayerParts) -> dict[str, Division]:
    """Finds the divisions of fused projections, by the name of their weight."""
    inputs: dict[str, list[str]] = {}
    for name, role in parts.roles.items():
        if role.kind == "matrix" and role.side == "input":
            group = role.block if role.block == "attention" else EXPERT_INDEX.sub(".", name).rpartition(".")[0]
            group = name.rpartition(".")[0].rpartition(".")[0] if parts.tensors[name].dim() == 2 else group
            inputs.setdefault(f"{role.block} {group}", []).append(name)
    found = {}
    for names in inputs.values():
        if len(names) == 1 and (split := _split(parts, names[0])) is not None:
            found[names[0]] = split
    return found


def _split(parts: LayerParts, name: str) -> Division | None:
    role, tensor = parts.roles[name], parts.tensors[name]
    if role.block == "attention":
        step = parts.step_of.get(name.rpartition(".")[0])
        around = parts.step_of.get(name.rpartition(".")[0].rpartition(".")[0])
        return None if step is None or around is None or not around.name else split_attention(step, around)
    units = {
        parts.tensors[other].numel() // parts.hidden // (tensor.shape[0] if tensor.dim() == 3 else 1)
        for other, its in parts.roles.items()
        if its.block == "mlp" and its.side == "output" and its.kind == "matrix"
        and parts.tensors[other].dim() == tensor.dim()
    }  # fmt: skip
    rows = _rows_dimension(parts, name)
    if tensor.shape[rows] // 2 not in units:
        return None
    return split_mlp(parts.call, tensor, rows)


def _rows_dimension(parts: LayerParts, name: str) -> int:
    """Returns the dimension of a matrix, or of stacked ones, whose entries are outputs."""
    return -1 if _is_transposed(parts, name) else -2


def _is_transposed(parts: LayerParts, name: str) -> bool:
    """Returns whether a matrix, or stacked ones, are stored ``[in, out]``."""
    tensor, role = parts.tensors[name], parts.roles[name]
    if tensor.dim() == 2:
        return type(parts.module(name)).__name__ == "Conv1D"
    return (
        tensor.shape[-1 if role.side == "output" else -2]
        == parts.hidden
        != tensor.shape[-2 if role.side == "output" else -1]
    )


# -------------------------------------------------------------------------------------------- entries of a row


@dataclass(frozen=True)
class _Sizes:
    """The configs of the small model and of the real one, to translate sizes."""

    small: Any
    real: Any

    def rows(self, split: Division, total: int) -> tuple[int, dict[str, int]] | None:
        """Returns groups and number of rows of every part of the real tensor with ``total`` rows."""
        counts = {role: split.groups * rows for role, rows in split.parts}
        if set(counts) == {"gate", "up"}:
            return (1 if split.groups == 1 else total // 2), dict.fromkeys(counts, total // 2)
        heads, real_heads = (_heads(config) for config in (self.small, self.real))
        keys, real_keys = (_key_heads(config) for config in (self.small, self.real))
        for kv, real_kv in ((keys, real_keys), (heads, real_heads), (1, 1)):
            size, rest = divmod(total, real_heads + 2 * real_kv)
            if counts["q"] * kv == counts["k"] * heads and counts["k"] == counts["v"] and not rest:
                groups = {1: 1, keys: real_keys, heads: real_heads}.get(split.groups)
                if groups is not None:
                    return groups, {"q": real_heads * size, "k": real_kv * size, "v": real_kv * size}
        return None


def _heads(config: Any) -> int:
    return _integer(config, "num_attention_heads") or 1


def _key_heads(config: Any) -> int:
    return _integer(config, "num_key_value_heads") or _integer(config, "num_kv_heads") or _heads(config)


def _entries(
    parts: LayerParts, splits: Mapping[str, Division], layout: Layout, real: Mapping[str, Tensor], sizes: _Sizes
) -> Parameters:
    """The parameters of one kind of layer, by name in memory, with the real shapes."""
    patterns = {EXPERT_INDEX.sub(".{i}.", name): name for name in parts.tensors}
    entries: dict[str, Parameter | Fused] = {}
    for name, tensor in real.items():
        like = name if name in parts.roles else patterns.get(EXPERT_INDEX.sub(".{i}.", name))
        if like is None:
            raise NotUnderstoodError(f"{name} is not in a small model of the same structure")
        entries[name] = _entry(parts, splits, layout, like, tuple(tensor.shape), sizes)
    return entries


def _entry(
    parts: LayerParts,
    splits: Mapping[str, Division],
    layout: Layout,
    name: str,
    shape: tuple[int, ...],
    sizes: _Sizes,
) -> Parameter | Fused:
    role = parts.roles[name]
    if name in layout.parts:
        return _published(layout, name, role, shape)
    stacked = parts.tensors[name].dim() == 3 and role.kind == "matrix" and shape[0] > 0
    matrix = _matrix_of(name, parts)
    is_stacked_bias = role.kind == "bias" and len(shape) == 2 and matrix is not None
    transposed = role.kind == "matrix" and _is_transposed(parts, name)
    single = shape[1:] if stacked or is_stacked_bias else shape
    rows_first = single[::-1] if transposed else single
    split = splits.get(name if role.kind == "matrix" else matrix or "")
    rows = None if split is None else sizes.rows(split, rows_first[0])
    base = name.removesuffix("_bias").removesuffix(".weight").removesuffix(".bias")
    base += ".{i}" if stacked or is_stacked_bias else ""
    own = "bias" if role.kind == "bias" else "weight"
    if rows is not None and split is not None:
        groups, counts = rows
        fused = {
            f"{base}.{part}.{own}": Parameter(replace(role, name=part), (counts[part], *rows_first[1:]))
            for part, _ in split.parts
        }
        return Fused(fused, None if groups == 1 else groups, stacked or is_stacked_bias, transposed)
    if stacked or is_stacked_bias or transposed:
        part = f"{base}.{'matrix' if transposed and not stacked else own}"
        return Fused({part: Parameter(role, rows_first)}, None, stacked or is_stacked_bias, transposed)
    return Parameter(role, shape)


def _matrix_of(name: str, parts: LayerParts) -> str | None:
    """The matrix that a bias belongs to."""
    for matrix in (f"{name.rpartition('.')[0]}.weight", name.removesuffix("_bias")):
        if matrix in parts.tensors and matrix != name:
            return matrix
    return None


def _published(layout: Layout, name: str, role: Role, shape: tuple[int, ...]) -> Fused:
    """A parameter that is stored in parts, such as the projections of single experts."""
    places = sorted(layout.parts[name].items(), key=lambda item: item[1].begin)
    place = places[0][1]
    single = shape if place.expert is None else shape[1:]
    rows_first = single[::-1] if place.transposed else single
    parts = {}
    for pattern, each in places:
        last = pattern.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        known = next((known for known, names in NAMES if re.fullmatch(names, last)), role.name)
        part = replace(role, name=known if role.side == "input" else role.name)
        rows = rows_first[0] * (each.end - each.begin) // each.shares
        parts[pattern] = Parameter(part, (rows, *rows_first[1:]))
    groups = None if place.groups == 1 else rows_first[0] // 2
    return Fused(parts, groups, place.expert is not None, place.transposed)


# ------------------------------------------------------------------------------------------------------- family


def _family(real: Decoder, layout: Layout, kinds: tuple[Parameters, ...], kind_of: tuple[int, ...]) -> Family:
    model = real.model
    before: dict[str, tuple[int, ...]] = {}
    after: dict[str, tuple[int, ...]] = {}
    embeddings, head = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
    saved = model.state_dict(keep_vars=True)
    name_of: dict[int, str] = {}
    place = before
    for name, tensor in saved.items():
        if real.split(name) is not None:
            place = after
        elif id(tensor) not in name_of:
            name_of[id(tensor)] = name
            place[name] = tuple(tensor.shape)
    embedding_name = name_of[id(embeddings)]
    for outside in (before, after):
        outside.pop(embedding_name, None)
    before[embedding_name] = tuple(embeddings.shape)
    output = model.get_output_embeddings()
    heads = (name for name, module in model.named_modules() if module is output)
    head_name = f"{next(heads, 'lm_head')}.weight"
    if head is not None and head is not embeddings:
        after[head_name] = after.pop(head_name, tuple(head.shape))
    base = type(model).base_model_prefix
    has_prefix = bool(base) and embedding_name.startswith(f"{base}.")
    ignored = tuple(type(model)._keys_to_ignore_on_load_unexpected or ())
    unsaved = {name for name, _ in real.layers[0].named_buffers()} - set(real.layers[0].state_dict())
    return Family(
        layer={},
        defaults=_defaults(model.config, head is embeddings),
        layer_prefix=real.prefix,
        embeddings=embedding_name,
        final_norm=next(iter(after), ""),
        lm_head=head_name,
        stored_names=dict(layout.renamed),
        derived=("self_attn.rotary_emb.inv_freq", *sorted(unsaved)),
        inference=InferredLayers(
            kinds, kind_of, before, after, f"{base}." if has_prefix else "", ignored, fixed=_fixed(real),
        ),
    )  # fmt: skip


def _fixed(real: Decoder) -> tuple[str, ...]:
    """The names, within layers or outside of them, of buffers and of parameters that are built without a gradient."""
    outside = {n: t for n, t in real.model.state_dict(keep_vars=True).items() if real.split(n) is None}
    groups = [outside, *(layer.state_dict(keep_vars=True) for layer in real.layers)]
    return tuple(sorted({name for group in groups for name, tensor in group.items() if not tensor.requires_grad}))


def _defaults(config: Any, tied: bool) -> dict[str, Any]:
    """The sizes under the names that most families use."""
    heads = _heads(config)
    hidden = int(config.hidden_size)
    values: dict[str, Any] = {
        "num_hidden_layers": config.num_hidden_layers, "hidden_size": hidden, "vocab_size": config.vocab_size,
        "num_attention_heads": heads, "num_key_value_heads": _key_heads(config), "tie_word_embeddings": tied,
        "head_dim": _integer(config, "head_dim") or hidden // heads,
    }  # fmt: skip
    values |= {name: size for name in LATENT_HEADS if (size := _integer(config, name))}
    context = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx")
    if length := next((length for name in context if (length := _integer(config, name))), 0):
        values["max_position_embeddings"] = length
    if experts := next((count for name in EXPERT_COUNTS if (count := _integer(config, name))), 0):
        values["num_experts"] = experts
        per_token = next((count for name in EXPERTS_PER_TOKEN if (count := _integer(config, name))), experts)
        values["num_experts_per_tok"] = per_token
    return values


def _integer(config: Any, name: str) -> int:
    """An entry under the name that most families use, or 0. Entries that differ between layers count as missing."""
    value = config.to_dict().get(config.attribute_map.get(name, name))
    return value if type(value) is int else 0
