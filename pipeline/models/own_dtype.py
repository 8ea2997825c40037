"""The dtype that a checkpoint stores its weights in, for ``model.dtype=auto``.

Does not import torch or read weights: the headers of the files say it, or the Hub.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

from pipeline.config import Model
from pipeline.errors import UserError
from pipeline.models.gguf import read_metadata
from pipeline.models.source import ModelSource
from pipeline.models.weight_files import read_headers

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # in settings, by those in files
# Weights in fewer than 16 bits have no dtype that they can be written in. Models are published in bfloat16.
_DEQUANTIZED = "bfloat16"


def with_own_dtype(model: Model, elements: Mapping[str, int] | None) -> Model:
    """Returns the settings with ``model.dtype=auto`` replaced by the dtype of most of the checkpoint's weights.

    Args:
        model: the settings.
        elements: the number of elements by dtype. If it is None, ``auto`` remains.

    Raises:
        UserError: no model can be written in the checkpoint's dtype.
    """
    if model.dtype != "auto" or elements is None:
        return model
    stored = max(elements, key=elements.__getitem__, default="none")
    if stored == "F64":
        raise UserError(
            setting="model.dtype",
            value=model.dtype,
            rule="the weights are stored in float64, which is not supported",
            remedy="Set model.dtype=float32.",
        )
    return model.model_copy(update={"dtype": _NAMES.get(stored, _DEQUANTIZED)})


def known_elements(source: ModelSource) -> Mapping[str, int] | None:
    """Returns what is known of a checkpoint's dtypes before it is downloaded: the number of elements by dtype.

    None for a GGUF file on the Hub, even if it is in the cache: artifacts must not be named after what the cache has.

    Raises:
        UserError: weight files on this machine are invalid.
    """
    if source.repo is not None and source.gguf_file is not None:
        return None
    return source.elements if source.directory is None else stored_elements(source.directory, source.gguf_file)


def stored_elements(directory: Path, gguf_file: str | None) -> Mapping[str, int]:
    """Returns the number of elements by dtype, in the names of the file formats.

    Raises:
        UserError: the weight files are invalid.
    """
    if gguf_file is not None:
        return read_metadata(directory / gguf_file).elements
    elements: Counter[str] = Counter()
    for entries, _ in read_headers(directory).values():
        for entry in entries.values():
            elements[entry.dtype] += prod(entry.shape)
    return elements
