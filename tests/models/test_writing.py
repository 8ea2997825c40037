"""Weight files are written one tensor at a time, in any order, across interruptions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.files import write_json
from pipeline.models.reading import ModelDirectory
from pipeline.models.tensors import TensorSpec
from pipeline.models.weight_files import read_header
from pipeline.models.writing import PROGRESS_FILE, ShardWriter, safetensors_header

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "rounded": torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "half": torch.tensor([1e-7, -0.0, 65504.0], dtype=torch.float16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "counts": torch.tensor([1, -2, 3]),
    "mask": torch.tensor([True, False]),
}


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _write(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 10**9) -> None:
    with ShardWriter(directory, _specs(tensors), max_shard_bytes=max_shard_bytes) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])
    write_json(directory / "config.json", {})


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    _write(tmp_path, TENSORS)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(TENSORS)
    assert all(read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_the_header_of_a_file_is_the_same_in_all_versions() -> None:
    specs = {"half": TensorSpec(torch.float16, (3,)), "matrix": TensorSpec(torch.float32, (3, 4))}
    entries = (
        b'"half":{"dtype":"F16","shape":[3],"data_offsets":[0,6]},'
        b'"matrix":{"dtype":"F32","shape":[3,4],"data_offsets":[6,54]}}'
    )
    content = b"{" + entries + b" " * 2
    assert safetensors_header(specs) == (len(content).to_bytes(8, "little") + content, {"half": 128, "matrix": 134})
    content = b'{"__metadata__":{"format":"pt"},' + entries + b" " * 3
    with_metadata, _ = safetensors_header(specs, {"format": "pt"})
    assert with_metadata == len(content).to_bytes(8, "little") + content


@pytest.mark.parametrize("letters", range(1, 9))
def test_tensors_begin_at_a_multiple_of_8_bytes(tmp_path: Path, letters: int) -> None:
    _write(tmp_path, {"x" * letters: torch.ones(3)})
    _, offset = read_header(tmp_path / "model.safetensors")
    assert offset % 8 == 0


def test_shards_stay_within_their_limit_and_are_read_as_one_model(tmp_path: Path) -> None:
    tensors = {f"tensor_{index}": torch.full((10,), float(index)) for index in range(7)}  # 40 bytes each
    _write(tmp_path, tensors, max_shard_bytes=100)
    names = sorted(path.name for path in tmp_path.glob("model*"))
    assert names == [*(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)), "model.safetensors.index.json"]
    assert [len(load_file(tmp_path / name)) for name in names[:4]] == [2, 2, 2, 1]
    model = ModelDirectory(tmp_path)
    assert model.specs == _specs(tensors)
    assert all(torch.equal(model.read(name), tensor) for name, tensor in tensors.items())


def test_views_are_written_with_their_own_elements(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3).T
    _write(tmp_path, {"view": matrix})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["view"], matrix)


def test_files_are_named_only_after_all_tensors_are_written(tmp_path: Path) -> None:
    specs = _specs({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(AssertionError, match="not written: b"), ShardWriter(tmp_path, specs) as writer:
        writer.write("a", torch.ones(1))
    assert not list(tmp_path.glob("model*"))


def test_files_of_an_earlier_attempt_are_removed(tmp_path: Path) -> None:
    _write(tmp_path, {f"old_{index}": torch.ones(10) for index in range(4)}, max_shard_bytes=50)
    (tmp_path / ".model-7.partial").write_bytes(b"half")
    _write(tmp_path, {"new": torch.ones(1)})
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2).double()], ids=["shape", "dtype"])
def test_a_tensor_that_differs_from_its_spec_is_rejected(tmp_path: Path, wrong: Tensor) -> None:
    writer = ShardWriter(tmp_path, _specs({"a": torch.ones(2)}))
    with pytest.raises(AssertionError, match="differs from its spec"):
        writer.write("a", wrong)


def test_a_tensor_is_copied_from_another_file_bit_for_bit(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir(), out.mkdir()
    _write(base, TENSORS)
    stored = ModelDirectory(base)
    with ShardWriter(out, _specs(TENSORS), max_shard_bytes=50) as writer:
        for name in TENSORS:
            writer.copy(name, stored.place(name))
    write_json(out / "config.json", {})
    assert all(torch.equal(ModelDirectory(out).read(name), tensor) for name, tensor in TENSORS.items())


def test_a_tensor_in_parts_is_written_once_all_parts_are(tmp_path: Path) -> None:
    specs, parts = _specs({"whole": torch.ones(1), "fused": torch.ones(4, 2)}), {"fused": ["upper", "lower"]}
    unfinished = ShardWriter(tmp_path, specs, parts)
    unfinished.write("whole", torch.ones(1))
    unfinished.part("fused", "upper")[:2] = 1.0
    with pytest.raises(AssertionError, match="not written: lower"):
        unfinished.finish()
    with ShardWriter(tmp_path, specs, parts) as writer:
        writer.write("whole", torch.ones(1))
        writer.part("fused", "upper")[:2] = 1.0
        writer.part("fused", "lower")[2:] = 2.0
    assert load_file(tmp_path / "model.safetensors")["fused"].tolist() == [[1, 1], [1, 1], [2, 2], [2, 2]]


def _interrupted(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes two tensors, flushes them, writes a third, and stops."""
    writer = ShardWriter(directory, _specs(tensors), max_shard_bytes=50)
    first, second, third, *_ = tensors
    writer.write(first, tensors[first])
    writer.write(second, tensors[second])
    writer.flush()
    writer.write(third, tensors[third])


def test_flushed_tensors_need_not_be_written_again(tmp_path: Path) -> None:
    _interrupted(tmp_path, TENSORS)
    with ShardWriter(tmp_path, _specs(TENSORS), max_shard_bytes=50) as writer:
        assert writer.written == {"matrix", "rounded"}
        for name in TENSORS.keys() - writer.written:
            writer.write(name, TENSORS[name])
    write_json(tmp_path / "config.json", {})
    assert all(torch.equal(ModelDirectory(tmp_path).read(name), tensor) for name, tensor in TENSORS.items())
    assert not list(tmp_path.glob(".model*"))


@pytest.mark.parametrize("name, is_kept", [("matrix", False), ("half", True)])
def test_all_weights_are_written_again_if_a_flushed_one_is_damaged(tmp_path: Path, name: str, is_kept: bool) -> None:
    _interrupted(tmp_path, TENSORS)
    data = TENSORS[name].numpy().tobytes()
    (file,) = [path for path in tmp_path.glob(".model-*") if data in path.read_bytes()]
    content = file.read_bytes()
    file.write_bytes(content.replace(data, data[:-1] + bytes([data[-1] ^ 1])))
    writer = ShardWriter(tmp_path, _specs(TENSORS), max_shard_bytes=50)
    assert writer.written == ({"matrix", "rounded"} if is_kept else set())


def test_damage_to_a_tensor_in_parts_is_noticed_once_all_parts_are_flushed(tmp_path: Path) -> None:
    specs, parts = _specs({"fused": torch.ones(4, 2)}), {"fused": ["upper", "lower"]}
    writer = ShardWriter(tmp_path, specs, parts)
    for part, rows in (("upper", slice(0, 2)), ("lower", slice(2, 4))):
        writer.part("fused", part)[rows] = 1.0
        writer.flush()
    assert ShardWriter(tmp_path, specs, parts).written == {"upper", "lower"}
    writer._mapped["fused"][3, 1] = 1.5
    assert ShardWriter(tmp_path, specs, parts).written == set()


def test_progress_of_a_writer_of_other_tensors_is_ignored(tmp_path: Path) -> None:
    _interrupted(tmp_path, TENSORS)
    others = {**TENSORS, "matrix": TENSORS["matrix"].double()}
    assert ShardWriter(tmp_path, _specs(others), max_shard_bytes=50).written == set()


def test_a_truncated_line_of_the_progress_file_is_ignored(tmp_path: Path) -> None:
    _interrupted(tmp_path, TENSORS)
    with open(tmp_path / PROGRESS_FILE, "a") as progress:
        progress.write("hal")
    writer = ShardWriter(tmp_path, _specs(TENSORS), max_shard_bytes=50)
    assert writer.written == {"matrix", "rounded"}
    for name in ("half", "scalar"):
        writer.write(name, TENSORS[name])
    writer.flush()
    assert ShardWriter(tmp_path, _specs(TENSORS), max_shard_bytes=50).written == {"matrix", "rounded", "scalar"}
