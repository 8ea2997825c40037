"""Which safetensors files make up a model directory, and what their headers say. No torch, no weights read.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes:
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
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header describes it."""

    dtype: str  # the format's name: BF16, F32, ...
    shape: tuple[int, ...]
    begin: int  # bytes, from the end of the header
    end: int


@dataclass(frozen=True)
class StoredBytes:
    """Where a tensor's bytes begin in a file."""

    file: Path
    offset: int


def find_weights(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a model directory, in the order of their names.

    Raises:
        UserError: it is no model directory, holds no safetensors weights, or its index names a missing file.
    """
    return tuple(sorted({directory / name for name in _read_index(directory).values()}))


def read_headers(directory: Path) -> dict[Path, tuple[dict[str, TensorEntry], int]]:
    """The tensors of every file of a model directory by name, and where in the file their bytes begin.

    Raises:
        UserError: a file is missing or cut short, or the index names a tensor that its file does not hold.
    """
    headers = {path: read_header(path) for path in find_weights(directory)}
    if (directory / INDEX).is_file():
        for tensor, name in _read_index(directory).items():
            if tensor not in headers[directory / name][0]:
                rule = f"{INDEX} says that {tensor} is in {name}, which does not hold it"
                raise _refuse(directory, rule, "Fetch the index and all files that it names again, of one revision.")
    return headers


def _read_index(directory: Path) -> dict[str, str]:
    """File name by tensor name; a single file stands under a name of its own."""
    if not directory.is_dir():
        raise _refuse(directory, "there is no such directory", "Check the path.")
    check_names([path.name for path in directory.iterdir()], directory)
    if not (directory / INDEX).is_file():
        return {"": SINGLE}
    try:
        files: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise _refuse(directory / INDEX, "the index of the weights cannot be read", "Fetch it again.") from error
    for name in sorted(set(files.values())):
        if not (directory / name).is_file():
            raise _refuse(directory, f"{INDEX} names {name}, which is not there", f"Fetch {name} again.")
    return files


def refuse_quantised(config: Mapping[str, Any], where: object) -> None:
    """Refuses a model whose config.json says that its weights are packed.

    Raises:
        UserError: it does.
    """
    if config.get("quantization_config"):
        raise _refuse(
            where,
            "its weights are quantised, and new layers are made from plain ones",
            "Give the model as it was before quantisation; of the quantised formats, GGUF can be unpacked.",
        )


def check_names(names: Collection[str], where: object) -> None:
    """Whether files with these names can be a model directory.

    Raises:
        UserError: they cannot.
    """
    if "config.json" not in names:
        raise _refuse(where, "a model directory needs a config.json", _gguf_remedy(names))
    if INDEX in names or SINGLE in names:
        return
    if "adapter_config.json" in names:
        raise _refuse(
            where,
            "it holds an adapter, not a model",
            "Merge it into its base first: peft's merge_and_unload(), then save_pretrained.",
        )
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        raise _refuse(
            where,
            "its weights are pickle files, which can run code when read and are never opened here",
            "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH) "
            "writes safetensors; then say model.path=NEW_PATH.",
        )
    raise _refuse(where, f"it has neither {SINGLE} nor {INDEX}", _gguf_remedy(names))


def _gguf_remedy(names: Collection[str]) -> str:
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        return f"Say model.gguf_file={gguf[0]} to read the GGUF file that is there."
    return "Give a directory as save_pretrained writes it, or a model's id on the Hugging Face hub."


def read_header(path: Path) -> tuple[dict[str, TensorEntry], int]:
    """The tensors of one file by name, and where in the file their bytes begin.

    Raises:
        UserError: it is not a whole safetensors file.
    """
    header, header_bytes = _parse_header(path)
    entries = {
        name: TensorEntry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    expected = 8 + header_bytes + max((entry.end for entry in entries.values()), default=0)
    if path.stat().st_size < expected:
        raise _refuse(path, f"the file is cut short: {path.stat().st_size} of {expected} bytes", "Fetch it again.")
    return entries, 8 + header_bytes


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 2 <= size <= MAX_HEADER_BYTES:
            remedy = "Fetch it again; a few lines of text in its place are a Git LFS pointer: run git lfs pull."
            raise _refuse(path, "this is not a safetensors file", remedy)
        text = stream.read(size)
    try:
        return json.loads(text), size
    except ValueError as error:
        raise _refuse(path, "its safetensors header cannot be read", "Fetch it again.") from error


def _refuse(where: object, rule: str, remedy: str) -> UserError:
    return UserError(setting="model.path", value=where, rule=rule, remedy=remedy)
