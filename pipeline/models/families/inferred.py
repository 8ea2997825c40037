"""Families without a row: what is inferred about them, and how it reaches a process that does not import torch.

A process that has imported transformers infers in place. The driver starts a process for it, which takes some seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from pipeline.errors import UserError
from pipeline.models.config_json import is_nested
from pipeline.models.families.family import Family, InferredLayers
from pipeline.models.families.nested import inner_config
from pipeline.models.families.parameters import Config, Fused, Parameter, Parameters
from pipeline.models.families.table import FAMILIES, family_of
from pipeline.models.families.tensors import Role

NOT_IN_CONFIG = ("custom_classes", "has_chat_template", "auto_map", "quantization_config")
INFERRED = "inferred"  # in logs and manifests


def family_for(config: Config) -> Family:
    """The row of a model's family, or what is inferred about the model if its family has no row.

    Args:
        config: the content of config.json.

    Raises:
        UserError: the family has no row, and cannot be inferred.
    """
    if is_nested(config):
        return family_for(inner_config(config)).inside(config)
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return family_of(model_type)
    kept = {name: value for name, value in config.items() if name not in NOT_IN_CONFIG}
    found = _inferred(json.dumps(kept, sort_keys=True))
    if isinstance(found, str):
        raise UserError(
            setting="model.path",
            value=f"a model of the family {model_type!r}",
            rule=f"the family has no row in the table of families, and cannot be inferred from its modules: {found}",
            remedy=f"Use a model of one of the families {', '.join(FAMILIES)}, or add a row for the family to FAMILIES "
            "in pipeline/models/families/table.py.",
        )
    return found


@cache
def _inferred(config: str) -> Family | str:
    """What is inferred about the model of a config, or why nothing is."""
    if "transformers" in sys.modules:
        from pipeline.models.family_inference.worker import infer_or_explain

        return infer_or_explain(json.loads(config))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.models.family_inference"], input=config, capture_output=True, text=True
    )
    if done.returncode:
        return f"the process that builds the model ended with status {done.returncode}: {done.stderr.strip()[-300:]}"
    answer = json.loads(done.stdout)
    return str(answer["fault"]) if "fault" in answer else family_from_json(answer)


# ---------------------------------------------------------------------------------------------------- as JSON


def family_to_json(family: Family) -> dict[str, Any]:
    """An inferred family as JSON values."""
    return asdict(family)


def family_from_json(values: Mapping[str, Any]) -> Family:
    """The inverse of ``family_to_json``, for an inferred family."""
    inference = dict(values["inference"])
    inference["kinds"] = tuple(_parameters(kind) for kind in inference["kinds"])
    inference |= {name: tuple(inference[name]) for name in ("kind_of", "ignored", "fixed")}
    for name in ("before", "after"):
        inference[name] = {tensor: tuple(shape) for tensor, shape in inference[name].items()}
    return Family(**{**values, "derived": tuple(values["derived"]), "inference": InferredLayers(**inference)})


def _parameters(values: Mapping[str, Any]) -> Parameters:
    return {name: _fused(entry) if "parts" in entry else _parameter(entry) for name, entry in values.items()}


def _parameter(values: Mapping[str, Any]) -> Parameter:
    return Parameter(**{**values, "role": Role(**values["role"]), "shape": tuple(values["shape"])})


def _fused(values: Mapping[str, Any]) -> Fused:
    return Fused(**{**values, "parts": {name: _parameter(part) for name, part in values["parts"].items()}})
