"""The README.md of an expanded model: what was done to which model, enough to do it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts.store import MANIFEST
from pipeline.files import read_json, sha256_file
from pipeline.models.weight_files import find_weights


def model_card(expansion: Mapping[str, Any], base: Path) -> str:
    """The card's text.

    Args:
        expansion: the content of ``expansion.json``.
        base: the directory that was expanded; its manifest, where it has one, says where it came from.
    """
    model = _manifest(base).get("settings", {})
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if model.get("revision"):  # else it is a directory, whose name says nothing to others
        header.append(f"base_model: {json.dumps(model['path'])}")
    header += ["tags:", "- depth-growth", f"- {expansion['method']}", "---", ""]
    return "\n".join([*header, *_body(expansion, model)]) + "\n"


def base_weights(base: Path) -> dict[str, str]:
    """SHA-256 of the base's weight files by name."""
    files = _manifest(base).get("files", {})
    return {
        path.name: files[path.name]["sha256"] if path.name in files else sha256_file(path)
        for path in find_weights(base)
    }


def _manifest(base: Path) -> dict[str, Any]:
    return read_json(base / MANIFEST) if (base / MANIFEST).is_file() else {}


def _body(expansion: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    came_from = " ".join(str(model[part]) for part in ("path", "gguf_file", "revision") if model.get(part))
    new = [layer for layer in expansion["layers"] if layer["new"]]
    return [
        f"# {expansion['num_base_layers']} layers grown to {expansion['num_layers']} by {expansion['method']}",
        "",
        f"- Base: {came_from or 'a local model directory'}",
        f"- Method: {expansion['source']}",
        f"- New layers: {', '.join(str(layer['layer']) for layer in new) or 'none'}",
        f"- Seed: {expansion['seed']}",
        "",
        "It was not trained after that; `expansion.json` says where every layer comes from.",
        "",
        "## Settings",
        "",
        *_table(("setting", "value"), expansion["settings"]),
        "",
        "## The base's weights, as loaded",
        "",
        *_table(("file", "SHA-256"), expansion["base"]),
    ]


def _table(columns: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
