"""The entries of a config.json that speak of single layers, rebuilt for a model with other layers.

A family may leave them out and have the config class work them out from rules such as "every sixth layer", which
would give inserted layers, and all above them, the wrong kind. So they are first spelled out for the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from pipeline.files import read_json

Config = dict[str, Any]

INDEX_LISTS = (  # lists of layer indices
    "attn_layer_indices", "full_attn_idxs", "local_layer_ids", "mlp_only_layers", "moe_layers", "rope_scaling_layers",
)  # fmt: skip
THRESHOLDS = ("max_window_layers", "first_k_dense_replace")  # the layers below this index are of one kind
NOT_BY_LAYER = ("architectures",)  # lists that have as many entries as there are layers only by chance


def spelled_out_config(directory: Path) -> Config:
    """The directory's config.json, with the per-layer lists that its config class works out put in."""
    config: Config = read_json(directory / "config.json")
    worked_out = AutoConfig.from_pretrained(directory).to_dict()
    layers = config["num_hidden_layers"]
    missing = {
        name: value
        for name, value in worked_out.items()
        if config.get(name) is None and (_is_by_layer(name, value, layers) or (name in INDEX_LISTS and value))
    }
    return {**config, **missing}


def _is_by_layer(name: str, value: object, num_layers: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == num_layers
        and name not in (*INDEX_LISTS, *NOT_BY_LAYER)
        and not name.endswith(("_token_id", "_token_ids"))
    )


def rebuild_config(config: Config, sources: Sequence[int]) -> Config:
    """The config of a model whose layer i has the kind of the old model's layer ``sources[i]``.

    Args:
        config: of the old model, per-layer lists spelled out.
    """
    old_layers = config["num_hidden_layers"]
    rebuilt = dict(config)
    for name, value in config.items():
        if _is_by_layer(name, value, old_layers):
            rebuilt[name] = [value[source] for source in sources]
        elif name in INDEX_LISTS and value is not None:
            rebuilt[name] = [layer for layer, source in enumerate(sources) if source in value]
        elif name in THRESHOLDS and value is not None:
            beyond = max(0, value - old_layers)
            rebuilt[name] = sum(source < value for source in sources) + beyond
    rebuilt["num_hidden_layers"] = len(sources)
    return rebuilt
