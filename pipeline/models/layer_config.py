"""Rebuilds the per-layer entries of a config.json for a model with a different sequence of layers.

A family may omit these entries and let its config class derive them from a rule such as "every sixth layer". In a
deeper model that rule would assign the wrong kind to inserted layers and to all layers above them. The entries of the
base are therefore written out first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from pipeline.files import read_json
from pipeline.models.config_json import DEPTH_NAMES, depth_of, is_nested, language_config, with_language_config

INDEX_LISTS = (  # lists of layer indices
    "attn_layer_indices", "full_attn_idxs", "local_layer_ids", "mlp_only_layers", "moe_layers", "rope_scaling_layers",
)  # fmt: skip
# Layers below this index are of one kind.
THRESHOLDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
LAST_INDICES = ("moe_layer_end_index",)  # layers up to this index are of one kind; negative for all
NOT_PER_LAYER = ("architectures",)  # lists that have one entry per layer only by coincidence


def explicit_config(directory: Path) -> dict[str, Any]:
    """Returns the config.json of a model directory, including the per-layer entries that its config class derives."""
    config, derived = _written_and_derived(directory)
    language, layers = language_config(config), depth_of(config)
    missing = {
        name: value
        for name, value in derived.items()
        if language.get(name) is None and (_is_per_layer(name, value, layers) or (name in INDEX_LISTS and value))
    }
    return with_language_config(config, {**language, **missing})


def complete_config(directory: Path) -> dict[str, Any]:
    """Returns the config of the language model in a directory with the defaults of its config class."""
    config, derived = _written_and_derived(directory)
    return {**derived, **language_config(config)}


def _written_and_derived(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the content of config.json, and what the config class makes of that of the language model."""
    written = read_json(directory / "config.json")
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return written, (config.text_config if is_nested(written) else config).to_dict()


def _is_per_layer(name: str, value: object, num_layers: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == num_layers
        and name not in (*INDEX_LISTS, *NOT_PER_LAYER)
        # Lists of special tokens may happen to have as many entries as there are layers.
        and not name.endswith(("_token_id", "_token_ids"))
    )


def rebuild_config(config: dict[str, Any], sources: Sequence[int]) -> dict[str, Any]:
    """Returns the config of a model whose layer i is of the same kind as layer ``sources[i]`` of another model.

    Args:
        config: of the other model, with its per-layer entries written out. It is not modified.
        sources: one layer of the other model per layer of the new one.
    """
    if is_nested(config):
        return with_language_config(config, rebuild_config(language_config(config), sources))
    old_layers = depth_of(config)
    rebuilt = dict(config)
    for name, value in config.items():
        if _is_per_layer(name, value, old_layers):
            rebuilt[name] = [value[source] for source in sources]
        elif name in INDEX_LISTS and value is not None:
            rebuilt[name] = [layer for layer, source in enumerate(sources) if source in value]
        elif name in THRESHOLDS and value is not None:
            # A threshold above the last layer keeps its distance from it.
            beyond = max(0, value - old_layers)
            rebuilt[name] = sum(source < value for source in sources) + beyond
        elif name in LAST_INDICES and value is not None and value >= 0:
            rebuilt[name] = sum(source <= value for source in sources) - 1
    rebuilt |= _sparse_layers(config, rebuilt, sources)
    if "attention_types" in config and "attention_layers" in rebuilt:  # GPT-Neo derives one from the other
        rebuilt["attention_types"] = [[[kind], 1] for kind in rebuilt["attention_layers"]]
    rebuilt |= {name: len(sources) for name in DEPTH_NAMES if config.get(name) == old_layers}
    return rebuilt


def _sparse_layers(config: dict[str, Any], rebuilt: dict[str, Any], sources: Sequence[int]) -> dict[str, Any]:
    """Returns the entries of mixtures of Qwen in which every nth layer has experts, if that rule no longer holds.

    All dense layers are then listed, as in configs in which every other layer has experts.
    """
    step = config.get("decoder_sparse_step") or 1
    if step == 1:
        return {}
    listed, listed_before = rebuilt.get("mlp_only_layers") or (), config.get("mlp_only_layers") or ()
    dense = [layer for layer, source in enumerate(sources) if (source + 1) % step or source in listed_before]
    if dense == [layer for layer in range(len(sources)) if (layer + 1) % step or layer in listed]:
        return {}
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}
