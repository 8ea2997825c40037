"""Answers what is inferred about the model of a config, in this process or for the driver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.errors import one_line
from pipeline.models.config_json import depth_name
from pipeline.models.families.family import Family
from pipeline.models.family_inference.decoder import NotUnderstoodError
from pipeline.models.family_inference.infer import infer_family
from pipeline.models.loading import quiet_transformers


def infer_or_explain(config: Mapping[str, Any]) -> Family | str:
    """Returns the family of the model of a config, or why it cannot be inferred."""
    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "transformers has no causal language model of that type"
    if config.get("is_encoder_decoder"):
        return "it is an encoder-decoder model"
    if depth_name(config) is None:
        return "its config has no number of layers, so it is not a plain language model"
    with quiet_transformers():  # nobody uses the models that are built
        try:
            return infer_family(config)
        except NotUnderstoodError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - modules of any family run here, in ways they were not written for
            return f"its modules do not run by themselves ({type(error).__name__}: {one_line(error)})"
