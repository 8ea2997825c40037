"""The README.md of an expanded model: how it was made from which model, in enough detail to repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.store import MANIFEST
from pipeline.files import read_json, sha256_file
from pipeline.models.config_json import is_nested
from pipeline.models.source import PACKAGE_PREFIX
from pipeline.models.weight_files import find_weights


def model_card(expansion: Mapping[str, Any], base: Path) -> str:
    """Returns the text of the card.

    Args:
        expansion: the content of ``expansion.json``.
        base: the directory that was expanded. Its manifest, if it has one, names the model's source.
    """
    model = _manifest(base).get("settings", {})
    header = card_header(model, read_json(base / "config.json"), [expansion["method"]])
    return "\n".join([*header, "", *_body(expansion, model)]) + "\n"


def card_header(model: Mapping[str, Any], config: Mapping[str, Any], tags: Sequence[str]) -> list[str]:
    """Returns the metadata that the Hub reads from a card.

    Args:
        model: the settings of the base model.
        config: of the model, or of its base.
        tags: besides the one of all models of this project.
    """
    task = "image-text-to-text" if is_nested(config) else "text-generation"
    header = ["---", "library_name: transformers", f"pipeline_tag: {task}"]
    if model.get("revision"):  # otherwise it is a local directory, whose name is of no use to others
        header.append(f"base_model: {json.dumps(model['path'])}")
    return [*header, "tags:", "- depth-growth", *(f"- {tag}" for tag in tags), "---"]


def base_name(model: Mapping[str, Any]) -> str | None:
    """Returns what others can find the base model by; None for a local directory."""
    if not model.get("revision") and not str(model.get("path", "")).startswith(PACKAGE_PREFIX):
        return None
    return " ".join(str(model[part]) for part in ("path", "gguf_file", "revision") if model.get(part))


def base_weights(base: Path) -> dict[str, str]:
    """Returns the SHA-256 of the base's weight files by name."""
    files = _manifest(base).get("files", {})
    return {
        path.name: files[path.name]["sha256"] if path.name in files else sha256_file(path)
        for path in find_weights(base)
    }


def _manifest(base: Path) -> dict[str, Any]:
    return read_json(base / MANIFEST) if (base / MANIFEST).is_file() else {}


def _body(expansion: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    new = [layer for layer in expansion["layers"] if layer["new"]]
    return [
        f"# {expansion['num_base_layers']} layers grown to {expansion['num_layers']} by {expansion['method']}",
        "",
        f"- Base: {base_name(model) or 'a local model directory'}",
        f"- Method: {expansion['source']}",
        f"- New layers: {', '.join(str(layer['layer']) for layer in new) or 'none'}",
        f"- Seed: {expansion['seed']}",
        "",
        "The model has not been trained since. `expansion.json` lists where every layer comes from.",
        "",
        "## Settings",
        "",
        *_table(("setting", "value"), expansion["settings"]),
        "",
        "## Weight files of the base",
        "",
        *_table(("file", "SHA-256"), expansion["base"]),
    ]


def _table(columns: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
