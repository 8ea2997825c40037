"""Finds the safetensors files of a model directory and reads their headers, without torch and without the weights.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the bytes of the tensors:
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from typing import Any

from pipeline.errors import bad_model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
AGAIN = "Download all weight files and their index again, from the same revision."
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER_BYTES = 100_000_000  # the limit of the format
MAX_INTEGER = 2**64 - 1  # of the safetensors library
ELEMENT_BYTES = {  # bytes per element; the format's other dtypes are packed
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


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


Headers = Mapping[Path, tuple[Mapping[str, TensorEntry], int]]  # of files: tensors, and offset of the first one


def find_weights(directory: Path) -> tuple[Path, ...]:
    """Returns the safetensors files of a model directory, sorted by name.

    Raises:
        UserError: it is not a model directory, has no safetensors weights, or has files that are not its own (see
            ``check_file``); or its index is invalid or names a missing file.
    """
    return tuple(sorted({directory / name for name in _read_index(directory).values()}))


def read_headers(directory: Path) -> dict[Path, tuple[dict[str, TensorEntry], int]]:
    """Reads the headers of all weight files of a model directory.

    Returns:
        For every file, its tensors by name and the offset of the first tensor's bytes.

    Raises:
        UserError: a file is missing or invalid, or lacks a tensor that the index maps to it; or two files contain the
            same tensor.
    """
    headers = {path: read_header(path) for path in find_weights(directory)}
    file_of: dict[str, str] = {}
    for path, (entries, _) in headers.items():
        for tensor in entries:
            if (first := file_of.setdefault(tensor, path.name)) != path.name:
                raise bad_model(directory, f"{first} and {path.name} both contain {tensor}", AGAIN)
    for mapped, name in _read_index(directory).items():
        if mapped is not None and file_of.get(mapped) != name:
            raise bad_model(directory, f"{INDEX} maps {mapped} to {name}, which does not contain it", AGAIN)
    return headers


def read_header(path: Path) -> tuple[dict[str, TensorEntry], int]:
    """Reads the header of one safetensors file, and checks it as strictly as the safetensors library does.

    Returns:
        Its tensors by name, and the offset of the first tensor's bytes.

    Raises:
        UserError: it is not a complete safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 2 <= header_bytes <= MAX_HEADER_BYTES:
            remedy = "Download it again. If it is a few lines of text, it is a Git LFS pointer: run git lfs pull."
            raise bad_model(path, "this is not a safetensors file", remedy)
        if 8 + header_bytes > size:
            raise bad_model(path, f"the file is truncated: it has {size} bytes, its header alone {header_bytes}", AGAIN)
        text = stream.read(header_bytes)
    try:
        header = json.loads(
            text.decode(),
            object_pairs_hook=_without_duplicates,
            parse_constant=reject_constant,
            parse_int=_parse_integer,
        )
        metadata = header.pop("__metadata__", {})
        if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
            raise ValueError("__metadata__ must map names to strings")
        "".join((*header, *metadata, *metadata.values())).encode()  # raises an error for a lone surrogate
        entries = {name: _parse_entry(name, entry) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        rule = f"its safetensors header cannot be read ({error})"
        raise bad_model(path, rule, "Download it again.") from error
    _check_ranges(path, entries, size - 8 - header_bytes)
    return entries, 8 + header_bytes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object whose names must differ, for ``json.loads``."""
    names = [name for name, _ in pairs]
    if duplicates := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise ValueError(f"{duplicates[0]} occurs twice")
    return dict(pairs)


def reject_constant(name: str) -> None:
    """Rejects NaN and infinities, for ``json.loads``."""
    raise ValueError(f"{name} is not a number in JSON")


def _parse_integer(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)  # not an integer for the safetensors library


def _parse_entry(name: str, entry: Any) -> TensorEntry:
    """Converts one entry of a header.

    Raises:
        ValueError: it is malformed, or its dtype and shape disagree with its number of bytes.
    """
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = (*shape, begin, end, end - begin)
        is_valid = isinstance(dtype, str) and all(type(n) is int and 0 <= n <= MAX_INTEGER for n in sizes)
    except (KeyError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"the entry of {name} must be a dtype, a shape and two increasing data_offsets")
    # The library multiplies the number of elements up in 64 bits, even if one of the factors is 0.
    is_countable = all(product <= MAX_INTEGER for product in accumulate(shape, mul))
    if dtype in ELEMENT_BYTES and not (is_countable and prod(shape) * ELEMENT_BYTES[dtype] == end - begin):
        raise ValueError(f"{name} has {end - begin} bytes, but its dtype {dtype} and shape {shape} need another number")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _check_ranges(path: Path, entries: Mapping[str, TensorEntry], available: int) -> None:
    """Checks that the tensors fill the file without gaps or overlaps."""
    end, previous = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            fault = "overlap" if entry.begin < end else "leave a gap"
            raise bad_model(path, f"its safetensors header is wrong: {previous} and {name} {fault}", AGAIN)
        end, previous = entry.end, name
    if available < end:
        raise bad_model(path, f"the file is truncated: it has {available} of {end} bytes after its header", AGAIN)
    if available > end:
        raise bad_model(path, f"the file has {available - end} bytes after its last tensor", AGAIN)


def _read_index(directory: Path) -> Mapping[str | None, str]:
    """Returns the file name by tensor name. For a model without an index, the key of its only file is None."""
    if not directory.is_dir():
        raise bad_model(directory, "there is no such directory", "Check the path.")
    names = [path.name for path in directory.iterdir()]
    check_names(names, directory)
    check_file(directory, "config.json")
    if INDEX not in names:
        check_file(directory, SINGLE)
        return {None: SINGLE}
    check_file(directory, INDEX)
    try:
        files: dict[str | None, str] = json.loads((directory / INDEX).read_bytes().decode())["weight_map"]
        wanted = sorted(set(files.values()))
        if not wanted or any(not isinstance(name, str) for name in wanted):
            raise ValueError("weight_map must map tensors to files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        rule = "the index of the weights cannot be read"
        raise bad_model(directory / INDEX, rule, "Download it again.") from error
    if SINGLE in names and wanted != [SINGLE]:
        rule = f"it has both {SINGLE} and {INDEX}, which may be two different models"
        raise bad_model(directory, rule, "Remove the one that you do not want to use, with the files that it names.")
    for name in wanted:
        if Path(name).name != name or name == "..":
            raise bad_model(directory, f"{INDEX} names {name}, which is not a file of this directory", AGAIN)
        if not os.path.lexists(directory / name):
            raise bad_model(directory, f"{INDEX} names {name}, which does not exist", f"Download {name} again.")
        check_file(directory, name)
    return files


def check_file(directory: Path, name: str) -> None:
    """Checks that an entry of a model directory is a regular file of that directory.

    Reading a named pipe would never end, and a link to another place would copy a file that is not part of the model.
    The links of the Hugging Face Hub's cache, from ``snapshots/<commit>/`` to ``blobs/`` of the same repository, are
    followed.

    Raises:
        UserError: it is not.
    """
    try:
        root, path = directory.resolve(), (directory / name).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise bad_model(directory, f"{name} is a broken symbolic link", "Download it again.") from error
    places = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(map(path.is_relative_to, places)):
        rule = f"{name} is a link to {path}, which is outside the model's directory"
        raise bad_model(directory, rule, f"Copy that file to {directory}.")
    if not path.is_file():
        raise bad_model(directory, f"{name} is not a regular file", "Download it again.")
    if not os.access(path, os.R_OK):
        raise bad_model(directory, f"{name} may not be read by this user", f"Run: chmod u+r {path}")


def check_names(names: Collection[str], where: object) -> None:
    """Checks from its file names that a directory or repository holds a safetensors model.

    Args:
        names: names of all files.
        where: the directory or repository, for the message.

    Raises:
        UserError: it does not.
    """
    if "config.json" not in names:
        raise bad_model(where, "a model directory needs a config.json", _gguf_remedy(names))
    if INDEX in names or SINGLE in names:
        return
    if "adapter_config.json" in names:
        raise bad_model(
            where,
            "it holds an adapter, not a model",
            "Merge the adapter into its base with peft's merge_and_unload() and save_pretrained.",
        )
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        raise bad_model(
            where,
            "its weights are pickle files, which can run code when they are read and are never opened here",
            "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH) "
            "writes safetensors. Then set model.path=NEW_PATH.",
        )
    raise bad_model(where, f"it has neither {SINGLE} nor {INDEX}", _gguf_remedy(names))


def _gguf_remedy(names: Collection[str]) -> str:
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        return f"Set model.gguf_file={gguf[0]} to read the existing GGUF file."
    return "Set model.path to a directory written by save_pretrained, or to the ID of a model on the Hugging Face Hub."
