"""Which directories are accepted as models, and how the others are rejected."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from pipeline.errors import UserError
from pipeline.models.source import resolve
from pipeline.models.weight_files import find_weights, read_header, read_headers
from tests.plain_settings import model_at


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def test_headers_are_read_like_the_safetensors_library_does(tiny_llama_dir: Path) -> None:
    (path,) = find_weights(tiny_llama_dir)
    entries, _ = read_header(path)
    with safe_open(path, framework="pt") as library:
        assert set(entries) == set(library.keys())
        for name, entry in entries.items():
            assert entry.shape == tuple(library.get_slice(name).get_shape())
            assert entry.dtype == library.get_slice(name).get_dtype()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_rejected_with_the_conversion_to_run(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(UserError, match=r"pickle files.*save_pretrained\(NEW_PATH\).*model.path=NEW_PATH"):
        find_weights(model)


def test_a_directory_without_a_config_is_rejected(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(UserError, match=r"needs a config\.json"):
        find_weights(model)


def test_a_directory_without_weights_is_rejected(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        find_weights(model)


def test_an_adapter_is_rejected(model: Path) -> None:
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter, not a model.*merge_and_unload"):
        find_weights(model)


def test_an_index_that_names_a_missing_shard_is_rejected(model: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"names model-00002-of-00002\.safetensors, which does not exist"):
        find_weights(model)


def test_a_truncated_file_is_rejected(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        read_header(path)


def _entry(begin: int, end: int, dtype: str = "F32", shape: object = None) -> dict[str, object]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FAULTY_HEADERS: dict[str, tuple[object, str]] = {
    "overlap": ({"a": _entry(0, 8), "b": _entry(4, 12)}, "a and b overlap"),
    "gap": ({"a": _entry(0, 4), "b": _entry(8, 12)}, "a and b leave a gap"),
    "too long": ({"a": _entry(0, 4), "b": _entry(4, 16)}, "truncated"),
    "too short": ({"a": _entry(0, 4)}, "8 bytes after its last tensor"),
    "reversed": ({"a": _entry(12, 0)}, "entry of a"),
    "negative": ({"a": _entry(0, 12, shape=[-3])}, "entry of a"),
    "not a number": ({"a": _entry(0, 12, shape=["3"])}, "entry of a"),
    "boolean": ({"a": _entry(0, 12, shape=[True, 3])}, "entry of a"),
    "bytes of another dtype": ({"a": _entry(0, 12, dtype="F64")}, "a has 12 bytes, but its dtype F64"),
    "huge shape": ({"a": _entry(0, 12, shape=[10**12, 10**12])}, "a has 12 bytes"),
    "no entry": ({"a": 3}, "entry of a"),
    "list": ([1], "cannot be read"),
    "metadata": ({"__metadata__": {"format": 1}, "a": _entry(0, 12)}, "__metadata__"),
    "twice": ('{"a": {}, "a": {}}', "a occurs twice"),
    "negative zero": ('{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}', "entry of a"),
    "product that overflows before it is 0": ({"a": _entry(0, 0, shape=[2**32, 2**32, 0])}, "a has 0 bytes"),
    "number beyond 64 bits": ({"a": _entry(0, 0, shape=[0, 2**64])}, "entry of a"),
    "lone surrogate": ({"\ud800": _entry(0, 12)}, "surrogates not allowed"),
    "lone surrogate twice": ('{"\\ud800": {}, "\\ud800": {}}', r"\\ud800 occurs twice"),
    "NaN in another field": ({"a": {**_entry(0, 12), "x": float("nan")}}, "NaN"),
    "nested": ("[" * 100_000, "cannot be read"),
}


@pytest.mark.parametrize("case", FAULTY_HEADERS)
def test_a_header_that_the_safetensors_library_rejects_is_rejected(tmp_path: Path, case: str) -> None:
    header, rule = FAULTY_HEADERS[case]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(SafetensorError):
        safe_open(path, framework="pt").__enter__()
    with pytest.raises(UserError, match=rf"model.path = {path}.*{rule}"):
        read_header(path)


def test_a_header_longer_than_the_file_is_rejected_without_reading_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((90_000_000).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="it has 10 bytes, its header alone 90000000"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/hostname", "sub/model.safetensors", "..", 3])
def test_an_index_may_name_only_files_of_its_directory(model: Path, name: object) -> None:
    (model / "model.safetensors").rename(model / "model-1-of-1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"not a file of this directory|cannot be read"):
        find_weights(model)


def test_a_tensor_without_a_name_in_an_index_must_exist_too(model: Path) -> None:
    index = {"weight_map": {"": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which does not contain it"):
        read_headers(model)


def test_a_file_and_an_index_of_others_are_ambiguous(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    assert read_headers(model)
    shutil.copy(model / "model.safetensors", model / "model-1-of-1.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1-of-1.safetensors"}}))
    with pytest.raises(UserError, match="both model.safetensors and model.safetensors.index.json"):
        find_weights(model)


def test_a_tensor_in_two_files_is_ambiguous(model: Path) -> None:
    (model / "model.safetensors").rename(model / "one.safetensors")
    shutil.copy(model / "one.safetensors", model / "two.safetensors")
    files = {"model.norm.weight": "one.safetensors", "model.embed_tokens.weight": "two.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match="both contain"):
        read_headers(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_the_directory_and_pipes_are_rejected(model: Path, tmp_path: Path, name: str) -> None:
    moved = (model / name).rename(tmp_path / name)
    (model / name).symlink_to(moved)
    with pytest.raises(UserError, match=f"{name} is a link to .* outside"):
        resolve(model_at(model))
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        resolve(model_at(model))


def test_links_within_the_hub_cache_and_to_a_directory_are_followed(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--organization--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "link").symlink_to(snapshot)
    assert resolve(model_at(snapshot)).files
    assert resolve(model_at(tmp_path / "link")).files


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x08" + b"\0" * 7 + b"no json!"]
)
def test_a_file_of_another_format_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="safetensors"):
        read_header(tmp_path / "model.safetensors")
