"""Builds and loads the models of directories with transformers, and compares their weights with what it builds.

To compare them without reading weights, the model is built on the meta device, and "loaded" from tensors on the meta
device that have the names, shapes and dtypes in the headers of the weight files. Every rule about names is therefore
transformers' own: renamed tensors, stacked experts, tied weights, and buffers that may be ignored.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from pipeline.errors import UserError, first_few, one_line
from pipeline.files import read_json
from pipeline.models.config_json import is_nested, with_language_config
from pipeline.models.families import family_for, inner_config, prefix_of
from pipeline.models.matrix_products import prefers_float32_units, use_float32_products
from pipeline.models.reading import ModelDirectory
from pipeline.models.tensors import TensorSpec

MAX_MISMATCHED = 3  # tensors in a message


class IncompleteModelError(Exception):
    """A directory that the pipeline has written does not load as it should, which is a bug of the pipeline."""


def build_on_meta(directory: Path, where: object = None) -> PreTrainedModel:
    """Builds the model of a directory's config.json on the meta device, which takes no memory for weights.

    Args:
        directory: the model directory.
        where: the model for messages, if not ``directory``.

    Raises:
        UserError: transformers rejects the config.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            built: PreTrainedModel = _auto_class(directory).from_config(config, trust_remote_code=False)
    except Exception as error:  # config classes raise whatever a wrong entry leads to
        raise UserError(
            setting="model.path",
            value=where or directory,
            rule=f"transformers cannot build a model from its config.json ({type(error).__name__}: {one_line(error)})",
            remedy="Correct its config.json, or download it again.",
        ) from error
    return built


def _auto_class(directory: Path) -> Any:
    """Returns the Auto class of a directory's model. Around a language model there may be one that reads images."""
    return AutoModelForImageTextToText if is_nested(read_json(directory / "config.json")) else AutoModelForCausalLM


def is_tied(model: PreTrainedModel) -> bool:
    """Returns whether the head of a model is its embedding matrix."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def weight_faults(built: PreTrainedModel, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Returns what is wrong with the weights of a model: tensors that are missing, unexpected or of another shape.

    Args:
        built: the model, on the meta device.
        specs: all stored tensors by name.
    """
    name = type(built).__name__
    integers = sorted(tensor for tensor, spec in specs.items() if not spec.dtype.is_floating_point)
    faults = []
    if integers:
        faults.append(f"{first_few(integers)}: the dtype {specs[integers[0]].dtype} is not a floating-point dtype")
    stored = {
        tensor: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for tensor, spec in specs.items()
        if spec.dtype.is_floating_point
    }
    try:
        with quiet_transformers():  # its report says what is returned here
            loaded: Any = type(built).from_pretrained(
                None,
                config=built.config,
                state_dict=stored,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError as error:
        return [*faults, f"tensors stored in parts, such as experts, cannot be assembled ({one_line(error)})"]
    report = loaded[1]
    if missing := sorted(set(report["missing_keys"]) - set(integers)):
        faults.append(f"the weights lack {first_few(missing)}, which {name} has")
    if unexpected := sorted(report["unexpected_keys"]):
        faults.append(f"the weights contain {first_few(unexpected)}, which {name} does not have")
    for tensor, found, expected in sorted(report["mismatched_keys"])[:MAX_MISMATCHED]:
        faults.append(f"{tensor} has the shape {list(found)}, but {list(expected)} by the config")
    faults += [" ".join(str(error).split()) for error in report["error_msgs"]]
    return faults


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without what transformers reports about a model, its progress bar, and warnings."""
    logger = transformers_logging.get_logger("transformers")
    level, had_bar = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if had_bar:
            transformers_logging.enable_progress_bar()


def load_for_inference(directory: Path, dtype: torch.dtype, device: Literal["cpu", "cuda"]) -> PreTrainedModel:
    """Loads a model that the pipeline has written, to score or generate text.

    Args:
        directory: the model directory.
        dtype: of its parameters. Products of bfloat16 are computed on a CPU's float32 units where these are faster.
        device: where it computes.

    Raises:
        IncompleteModelError: see ``load_complete``.
    """
    model: Any = load_language_model(directory, dtype)
    if device == "cpu" and dtype == torch.bfloat16 and prefers_float32_units():
        use_float32_products(model)
    moved: PreTrainedModel = model.to(device)
    return moved


def load_complete(directory: Path, dtype: Any, **placement: Any) -> PreTrainedModel:
    """Loads a model that the pipeline has written, in evaluation mode.

    Args:
        directory: the model directory.
        dtype: of its parameters.
        placement: further arguments of ``from_pretrained``.

    Raises:
        IncompleteModelError: a parameter would be random, a stored tensor is not used, or the head is not tied although
            the config ties it.
    """
    loaded: Any = _auto_class(directory).from_pretrained(
        directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **placement
    )
    return _checked(directory, loaded)


def load_language_model(directory: Path, dtype: Any, **placement: Any) -> PreTrainedModel:
    """Loads what ``load_complete`` loads, with the same arguments, but of a multimodal model only the language model.

    Raises:
        IncompleteModelError: as by ``load_complete``.
    """
    loaded = from_pretrained(directory, dtype=dtype, use_safetensors=True, output_loading_info=True, **placement)
    return _checked(directory, loaded, _outside(directory))


def from_pretrained(directory: Path, **arguments: Any) -> Any:
    """Loads the causal language model of a directory, which may be inside another model, without checks.

    Args:
        directory: the model directory.
        arguments: further ones of ``AutoModelForCausalLM.from_pretrained``.
    """
    written = read_json(directory / "config.json")
    if not is_nested(written):
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False, **arguments)
    mapping = {f"^{re.escape(prefix)}": ""} if (prefix := prefix_of(written)) else None
    with quiet_transformers():  # it would list all other tensors of a multimodal model
        return AutoModelForCausalLM.from_pretrained(
            directory,
            config=language_config_of(directory),
            key_mapping=mapping,
            trust_remote_code=False,
            **arguments,
        )


def language_config_of(directory: Path) -> PreTrainedConfig:
    """Returns the config of the model that ``from_pretrained`` loads."""
    written = read_json(directory / "config.json")
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if not is_nested(written):
        return config
    return AutoConfig.for_model(**inner_config(with_language_config(written, config.text_config.to_dict())))


def _outside(directory: Path) -> set[str]:
    """Returns the names of a multimodal model's tensors outside its language model. Empty for other models."""
    written = read_json(directory / "config.json")
    if not is_nested(written):
        return set()
    family = family_for(written)
    return {name for name in ModelDirectory(directory).specs if not family.has(name)}


def _checked(directory: Path, loaded: Any, ignored: Collection[str] = ()) -> PreTrainedModel:
    """Returns the loaded model if transformers reports no fault, apart from unused tensors that may be ignored."""
    model: PreTrainedModel
    report: dict[str, Any]
    model, report = loaded
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := set(report[fault]) - set(ignored):
            raise IncompleteModelError(f"{directory} loads with {fault} {found}")
    if getattr(model.config, "tie_word_embeddings", False) and not is_tied(model):
        raise IncompleteModelError(f"{directory}: the head is not tied to the embeddings")
    return model.eval()
