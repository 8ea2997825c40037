"""Weight files and their index are refused by name, or read as safetensors and transformers read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils.hub import get_checkpoint_shard_files

from pipeline.errors import UserError
from pipeline.models.reading import ModelDirectory
from pipeline.models.weight_files import INDEX, find_weights, read_headers
from tests.fuzz.limits import examples, outcome
from tests.fuzz.strategies import damaged, encoded, literals, object_text, texts

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "U16": 2, "F64": 8}
OTHER_DTYPES = ("F4", "F6_E2M3", "F8_E8M0", "C64", "f32", "X9", "")
NAMES = ("a", "b", "model.norm.weight", "", "__metadata__", "\ud800", "größe", "a\0b", "😀")
ODD_NUMBERS = (
    "-0",
    "1.0",
    "1e0",
    "18446744073709551616",
    "18446744073709551615",
    "-1",
    "true",
    '"1"',
    "null",
    "4294967296",
)


@st.composite
def _file(draw: st.DrawFn) -> bytes:
    """A safetensors file, most often with a faulty header."""
    entries: list[tuple[str, str]] = []
    at = 0
    for name in draw(st.lists(st.sampled_from(NAMES) | texts, min_size=1, max_size=4)):
        dtype = draw(st.sampled_from([*BYTES] * 3 + [*OTHER_DTYPES]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = BYTES.get(dtype, draw(st.integers(0, 2)))
        for length in shape:
            size *= length
        fields = {"dtype": json.dumps(dtype), "shape": json.dumps(shape), "data_offsets": f"[{at}, {at + size}]"}
        at += size
        entries.append((name, object_text(_odd_entry(draw, fields, at, size))))
    if draw(st.booleans()):
        entries.insert(
            draw(st.integers(0, len(entries))), ("__metadata__", draw(literals() | st.just('{"format": "pt"}')))
        )
    if draw(st.integers(0, 4)) == 0:
        entries = draw(st.permutations(entries))
    text = encoded(object_text(entries)) if draw(st.integers(0, 9)) else encoded(draw(literals()))
    padding = draw(st.sampled_from([b"", b"", b" ", b"   ", b"\n", b"\t", b"\0"]))
    header = (padding if draw(st.integers(0, 9)) == 0 else b"") + text + padding
    length = len(header) + draw(st.sampled_from([0] * 8 + [1, -1, 8, 2**31, 2**63 - len(header)]))
    body = bytes(value % 2 for value in range(at + draw(st.sampled_from([0] * 8 + [1, -1, 8]))))
    return draw(damaged(length.to_bytes(8, "little") + header + body))


def _odd_entry(draw: st.DrawFn, fields: dict[str, str], at: int, size: int) -> list[tuple[str, str]]:
    pairs = list(fields.items())
    match draw(st.sampled_from(["right"] * 9 + ["number", "field", "repeat", "remove", "extra", "zero", "reverse"])):
        case "number":
            number, other = draw(st.sampled_from(ODD_NUMBERS)), draw(st.sampled_from(["", ", 0", ", 1"]))
            name = draw(st.sampled_from(["shape", "data_offsets"]))
            pairs = [(key, f"[{number}{other}]" if key == name else value) for key, value in pairs]
        case "zero":  # a product that does not fit 64 bits, but is zero
            sizes = f"[4294967296, 4294967296, {draw(st.sampled_from(['0', '4294967296']))}]"
            pairs = [("dtype", fields["dtype"]), ("shape", sizes), ("data_offsets", f"[{at}, {at}]")]
        case "reverse":
            pairs = [("dtype", fields["dtype"]), ("shape", fields["shape"]), ("data_offsets", f"[{at}, {at - size}]")]
        case "field":
            name = draw(st.sampled_from([*fields]))
            pairs = [(key, draw(literals()) if key == name else value) for key, value in pairs]
        case "repeat":
            pairs.append(draw(st.sampled_from(pairs)))
        case "remove":
            pairs.remove(draw(st.sampled_from(pairs)))
        case "extra":
            pairs.append((draw(texts), draw(literals())))
    return pairs


def _read(path: Path) -> dict[str, Any]:
    directory = ModelDirectory(path.parent, [path])
    read = {}
    for name, spec in directory.specs.items():
        tensor = directory.read(name)
        place = directory.place(name)
        content = place.file.read_bytes()[place.offset : place.offset + spec.bytes]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
        read[name] = (spec.dtype, spec.shape, content)
    return read


def _read_by_library(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as library:
        tensors = {name: library.get_tensor(name) for name in library.keys()}  # noqa: SIM118 (it is not a dictionary)
    return {
        name: (
            tensor.dtype,
            tuple(tensor.shape),
            bytes(tensor.flatten().view(torch.uint8).tolist()) if tensor.numel() else b"",
        )
        for name, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@examples(150)
@given(_file())
def test_safetensors_files(place: Path, content: bytes) -> None:
    path = place / "model.safetensors"
    path.unlink(missing_ok=True)  # a file that is still mapped must not change
    path.write_bytes(content)
    read = outcome(lambda: _read(path))
    if isinstance(read, UserError):
        assert str(place) in str(read.value)
    else:
        event("read")
        assert read == _read_by_library(path)


# ------------------------------------------------------------------------------------------------ index

SHARDS = {"one.safetensors": ("a", "b"), "two.safetensors": ("c",)}
FILES = (*SHARDS, "three.safetensors", "../one.safetensors", "", ".", "..", "/etc/hostname", "one.safetensors\0",
    "x" * 300,
         "\ud800", "config.json", "sub", "ONE.safetensors", "./one.safetensors", INDEX)  # fmt: skip


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    shutil.copy(tiny_llama_dir / "config.json", directory)
    (directory / "sub").mkdir()
    for shard, names in SHARDS.items():
        save_file({name: torch.zeros(2) for name in names}, directory / shard)
    return directory


@st.composite
def _index(draw: st.DrawFn) -> bytes:
    weights = [(name, json.dumps(shard)) for shard, names in SHARDS.items() for name in names]
    for _ in range(draw(st.integers(0, 2))):
        value = draw(st.sampled_from([json.dumps(name) for name in FILES]) | literals())
        name = draw(st.sampled_from(["a", "b", "c", "d", "", "__metadata__"]) | texts)
        if draw(st.booleans()):
            weights = [pair for pair in weights if pair[0] != name]
        weights.insert(draw(st.integers(0, len(weights))), (name, value))
    pairs = [("metadata", draw(literals())), ("weight_map", object_text(weights))]
    if draw(st.integers(0, 4)) == 0:
        pairs.insert(draw(st.integers(0, 2)), (draw(st.sampled_from(["weight_map", "metadata"])), draw(literals())))
    return draw(damaged(encoded(object_text(pairs))))


@examples(80)
@given(_index())
def test_an_index(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    found = outcome(lambda: (find_weights(sharded), read_headers(sharded)))
    if isinstance(found, UserError):
        assert str(sharded) in str(found.value)
        return
    event("read")
    files, headers = found
    index = json.loads(content)
    if isinstance(index.get("metadata"), dict):  # otherwise transformers fails, and the pipeline does not need it
        assert sorted(map(str, files)) == sorted(get_checkpoint_shard_files(str(sharded), str(sharded / INDEX))[0])
    assert {path.name for path in files} == {path.name for path in headers} == set(index["weight_map"].values())
    for name, shard in index["weight_map"].items():
        with safe_open(sharded / shard, framework="pt") as library:
            assert name in library.keys()  # noqa: SIM118 (it is not a dictionary)
