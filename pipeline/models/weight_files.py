"""Finds the safetensors files of a model directory and reads their headers, without torch and without the weights.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the bytes of the tensors:
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER_BYTES = 100_000_000  # the limit of the format


@dataclass(frozen=True)
class TensorEntry:
    """One tensor, as described by a header."""

    dtype: str  # in the names of the format: BF16, F32, ...
    shape: tuple[int, ...]
    begin: int  # bytes after the end of the header
    end: int


@dataclass(frozen=True)
class StoredBytes:
    """Where the bytes of a tensor begin in a file."""

    file: Path
    offset: int


def find_weights(directory: Path) -> tuple[Path, ...]:
    """Returns the safetensors files of a model directory, sorted by name.

    Raises:
        UserError: it is not a model directory, has no safetensors weights, or its index names a missing file.
    """
    return tuple(sorted({directory / name for name in _read_index(directory).values()}))


def read_headers(directory: Path) -> dict[Path, tuple[dict[str, TensorEntry], int]]:
    """Reads the headers of all weight files of a model directory.

    Returns:
        For every file, its tensors by name and the offset of the first tensor's bytes.

    Raises:
        UserError: a file is missing or truncated, or lacks a tensor that the index maps to it.
    """
    headers = {path: read_header(path) for path in find_weights(directory)}
    if (directory / INDEX).is_file():
        for tensor, name in _read_index(directory).items():
            if tensor not in headers[directory / name][0]:
                rule = f"{INDEX} maps {tensor} to {name}, which does not contain it"
                remedy = "Download the index and all files that it names again, from the same revision."
                raise _invalid(directory, rule, remedy)
    return headers


def read_header(path: Path) -> tuple[dict[str, TensorEntry], int]:
    """Reads the header of one safetensors file.

    Returns:
        Its tensors by name, and the offset of the first tensor's bytes.

    Raises:
        UserError: it is not a complete safetensors file.
    """
    with open(path, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 2 <= header_bytes <= MAX_HEADER_BYTES:
            remedy = "Download it again. If it is a few lines of text, it is a Git LFS pointer: run git lfs pull."
            raise _invalid(path, "this is not a safetensors file", remedy)
        text = stream.read(header_bytes)
    try:
        header: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise _invalid(path, "its safetensors header cannot be read", "Download it again.") from error
    entries = {
        name: TensorEntry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    expected = 8 + header_bytes + max((entry.end for entry in entries.values()), default=0)
    if path.stat().st_size < expected:
        rule = f"the file is truncated: it has {path.stat().st_size} of {expected} bytes"
        raise _invalid(path, rule, "Download it again.")
    return entries, 8 + header_bytes


def _read_index(directory: Path) -> dict[str, str]:
    """Returns the file name by tensor name. For a model without an index, the key of its only file is ``""``."""
    if not directory.is_dir():
        raise _invalid(directory, "there is no such directory", "Check the path.")
    check_names([path.name for path in directory.iterdir()], directory)
    if not (directory / INDEX).is_file():
        return {"": SINGLE}
    try:
        files: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        rule = "the index of the weights cannot be read"
        raise _invalid(directory / INDEX, rule, "Download it again.") from error
    for name in sorted(set(files.values())):
        if not (directory / name).is_file():
            raise _invalid(directory, f"{INDEX} names {name}, which does not exist", f"Download {name} again.")
    return files


def check_names(names: Collection[str], where: object) -> None:
    """Checks from its file names that a directory or repository holds a safetensors model.

    Args:
        names: names of all files.
        where: the directory or repository, for the message.

    Raises:
        UserError: it does not.
    """
    if "config.json" not in names:
        raise _invalid(where, "a model directory needs a config.json", _gguf_remedy(names))
    if INDEX in names or SINGLE in names:
        return
    if "adapter_config.json" in names:
        raise _invalid(
            where,
            "it holds an adapter, not a model",
            "Merge the adapter into its base with peft's merge_and_unload() and save_pretrained.",
        )
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        raise _invalid(
            where,
            "its weights are pickle files, which can run code when they are read and are never opened here",
            "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH) "
            "writes safetensors. Then set model.path=NEW_PATH.",
        )
    raise _invalid(where, f"it has neither {SINGLE} nor {INDEX}", _gguf_remedy(names))


def _gguf_remedy(names: Collection[str]) -> str:
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        return f"Set model.gguf_file={gguf[0]} to read the existing GGUF file."
    return "Set model.path to a directory written by save_pretrained, or to the ID of a model on the Hugging Face Hub."


def refuse_quantized(config: Mapping[str, Any], where: object) -> None:
    """Checks that the weights of a model are not quantized.

    Args:
        config: the content of its config.json.
        where: the model, for the message.

    Raises:
        UserError: they are.
    """
    if config.get("quantization_config"):
        raise _invalid(
            where,
            "its weights are quantized, and new layers can only be made from unquantized ones",
            "Set model.path to the unquantized model. GGUF is the only quantized format that can be dequantized here.",
        )


def _invalid(where: object, rule: str, remedy: str) -> UserError:
    return UserError(setting="model.path", value=where, rule=rule, remedy=remedy)
