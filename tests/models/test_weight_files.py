"""Which directories are accepted as models, and how the others are rejected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from pipeline.errors import UserError
from pipeline.models.weight_files import find_weights, read_header


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


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x08" + b"\0" * 7 + b"no json!"]
)
def test_a_file_of_another_format_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="safetensors"):
        read_header(tmp_path / "model.safetensors")
