"""The dtype that a checkpoint stores its weights in, for ``model.dtype=auto``.

Does not import torch or read weights. It is read from the file headers or reported by the Hub.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

from pipeline.config import Model
from pipeline.errors import UserError
from pipeline.models import hub
from pipeline.models.gguf import read_metadata
from pipeline.models.source import ModelSource
from pipeline.models.weight_files import INDEX, SINGLE, read_headers

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # in settings, by those in files
# Weights in fewer than 16 bits have no dtype that they can be written in. Models are published in bfloat16.
_DEQUANTIZED = "bfloat16"


def resolve_dtype(model: Model, source: ModelSource, downloaded: Path | None = None) -> Model:
    """Returns the settings with ``model.dtype=auto`` replaced by the dtype of most of the checkpoint's weights.

    No file is read if ``model.dtype`` is given. ``auto`` remains for a GGUF file on the Hub, unless ``downloaded`` is
    given: the key of an artifact must not depend on what is in the Hub's cache.

    Args:
        model: the settings.
        source: the checkpoint.
        downloaded: the directory of its files, once all of them are on this machine.

    Raises:
        UserError: no model can be written in the checkpoint's dtype, or its dtype cannot be read.
    """
    if model.dtype != "auto":
        return model
    if downloaded is not None:
        elements = _stored_elements(downloaded, source.gguf_file)
    elif source.repo is not None and source.gguf_file is not None:
        return model
    elif source.directory is not None:
        elements = _stored_elements(source.directory, source.gguf_file)
    else:
        elements = source.elements or _elements_on_hub(source)
    return model.model_copy(update={"dtype": dtype_to_write(elements)})


def dtype_to_write(elements: Mapping[str, int]) -> str:
    """Returns the dtype, as in settings, to write a checkpoint in.

    Args:
        elements: the number of elements of its weights by dtype, in the names of the file formats.

    Raises:
        UserError: no model can be written in its dtype.
    """
    stored = max(elements, key=elements.__getitem__, default="none")
    if stored == "F64":
        raise _unusable("the weights are stored in float64, which is not supported", "Set model.dtype=float32.")
    return _NAMES.get(stored, _DEQUANTIZED)


def _stored_elements(directory: Path, gguf_file: str | None) -> Mapping[str, int]:
    """Returns the number of elements by dtype of files on this machine.

    Raises:
        UserError: the weight files are invalid.
    """
    return elements_in(directory) if gguf_file is None else read_metadata(directory / gguf_file).elements


def elements_in(directory: Path) -> Mapping[str, int]:
    """Returns the number of elements by dtype of safetensors on this machine, from the headers of the files.

    Raises:
        UserError: the weight files are invalid.
    """
    elements: Counter[str] = Counter()
    for entries, _ in read_headers(directory).values():
        for entry in entries.values():
            elements[entry.dtype] += prod(entry.shape)
    return elements


def _elements_on_hub(source: ModelSource) -> Mapping[str, int]:
    """Returns the number of elements by dtype of safetensors on the Hub, from the headers of the files.

    Raises:
        UserError: they cannot be read.
    """
    assert source.repo is not None and source.commit is not None
    try:
        files = {SINGLE}
        if INDEX in source.names:
            files = set(json.loads(hub.read_file(source.repo, source.commit, INDEX))["weight_map"].values())
        return hub.read_elements(source.repo, source.commit, files)
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = error.rule if isinstance(error, UserError) else "the index or a header is invalid"
        raise _unusable(
            f"the Hub does not report the dtype of {source.repo}, and its safetensors headers cannot be read ({why})",
            "Set model.dtype=bfloat16, model.dtype=float16 or model.dtype=float32.",
        ) from error


def _unusable(rule: str, remedy: str) -> UserError:
    return UserError(setting="model.dtype", value="auto", rule=rule, remedy=remedy)
