"""What papers report for the set-up at hand, never in one column with ours: their data and metrics are their own.

``published.json`` holds one entry a set-up: paper, base model, the configuration values that recognise it, the number
of layers after expansion, a note on how the numbers were made, and the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import read_json
from pipeline.comparison.run_artifacts import RunArtifacts

PUBLISHED = Path(__file__).with_name("published.json")


def matching(runs: Iterable[RunArtifacts]) -> list[dict[str, Any]]:
    """The set-ups whose base model, depth and method one of the runs shares."""
    runs = list(runs)
    return [setup for setup in read_json(PUBLISHED) if any(_is_setup_of(setup, run) for run in runs)]


def _is_setup_of(setup: Mapping[str, Any], run: RunArtifacts) -> bool:
    config, expansion = run.read("load", "config.json"), run.expansion()
    if config is None or expansion is None:
        return False
    same_base = all(_config_value(config, name) == value for name, value in setup["base_config"].items())
    same_depth = expansion["num_layers"] == setup["num_layers"] or run.method == "none"
    return same_base and same_depth and run.method in {row["method"] for row in setup["rows"]}


def _config_value(config: Mapping[str, Any], name: str) -> Any:
    """One value of a model's configuration; Llama 3 and 3.1 differ in the kind of rotary embedding alone."""
    if name == "rope_type":
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return rope.get("rope_type", "default")
    return config.get(name)
