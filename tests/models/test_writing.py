"""Weight files written one tensor at a time, in any order, over interruptions."""

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
from pipeline.models.writing import KEPT, ShardWriter

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


def test_one_file_is_what_the_library_reads(tmp_path: Path) -> None:
    _write(tmp_path, TENSORS)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(TENSORS)
    assert all(read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_many_files_hold_no_more_than_they_may_and_read_as_one(tmp_path: Path) -> None:
    tensors = {f"tensor_{index}": torch.full((10,), float(index)) for index in range(7)}  # 40 bytes each
    _write(tmp_path, tensors, max_shard_bytes=100)
    names = sorted(path.name for path in tmp_path.glob("model*"))
    assert names == [*(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)), "model.safetensors.index.json"]
    assert [len(load_file(tmp_path / name)) for name in names[:4]] == [2, 2, 2, 1]
    model = ModelDirectory(tmp_path)
    assert model.specs == _specs(tensors)
    assert all(torch.equal(model.read(name), tensor) for name, tensor in tensors.items())


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3).T
    _write(tmp_path, {"view": matrix})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["view"], matrix)


def test_files_get_their_names_only_when_all_is_written(tmp_path: Path) -> None:
    specs = _specs({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(AssertionError, match="not written: b"), ShardWriter(tmp_path, specs) as writer:
        writer.write("a", torch.ones(1))
    assert not list(tmp_path.glob("model*"))


def test_what_an_earlier_attempt_left_is_removed(tmp_path: Path) -> None:
    _write(tmp_path, {f"old_{index}": torch.ones(10) for index in range(4)}, max_shard_bytes=50)
    (tmp_path / ".model-7.partial").write_bytes(b"half")
    _write(tmp_path, {"new": torch.ones(1)})
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2).double()], ids=["shape", "dtype"])
def test_a_tensor_that_is_not_as_announced(tmp_path: Path, wrong: Tensor) -> None:
    writer = ShardWriter(tmp_path, _specs({"a": torch.ones(2)}))
    with pytest.raises(AssertionError, match="not as announced"):
        writer.write("a", wrong)


def test_a_tensor_is_copied_from_another_file_to_the_bit(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir(), out.mkdir()
    _write(base, TENSORS)
    stored = ModelDirectory(base)
    with ShardWriter(out, _specs(TENSORS), max_shard_bytes=50) as writer:
        for name in TENSORS:
            writer.copy(name, stored.place(name))
    write_json(out / "config.json", {})
    assert all(torch.equal(ModelDirectory(out).read(name), tensor) for name, tensor in TENSORS.items())


def test_a_tensor_that_comes_in_parts_is_written_when_all_have_come(tmp_path: Path) -> None:
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
    """Writes the first two, keeps them, writes the third, and ends there."""
    writer = ShardWriter(directory, _specs(tensors), max_shard_bytes=50)
    first, second, third, *_ = tensors
    writer.write(first, tensors[first])
    writer.write(second, tensors[second])
    writer.keep()
    writer.write(third, tensors[third])


def test_what_was_kept_need_not_be_written_again(tmp_path: Path) -> None:
    _interrupted(tmp_path, TENSORS)
    with ShardWriter(tmp_path, _specs(TENSORS), max_shard_bytes=50) as writer:
        assert writer.written == {"matrix", "rounded"}
        for name in TENSORS.keys() - writer.written:
            writer.write(name, TENSORS[name])
    write_json(tmp_path / "config.json", {})
    assert all(torch.equal(ModelDirectory(tmp_path).read(name), tensor) for name, tensor in TENSORS.items())
    assert not list(tmp_path.glob(".model*"))


def test_other_tensors_are_not_taken_for_kept_ones(tmp_path: Path) -> None:
    _interrupted(tmp_path, TENSORS)
    others = {**TENSORS, "matrix": TENSORS["matrix"].double()}
    assert ShardWriter(tmp_path, _specs(others), max_shard_bytes=50).written == set()


def test_a_line_that_was_cut_short_is_not_kept(tmp_path: Path) -> None:
    _interrupted(tmp_path, TENSORS)
    with open(tmp_path / KEPT, "a") as journal:
        journal.write("hal")
    assert ShardWriter(tmp_path, _specs(TENSORS), max_shard_bytes=50).written == {"matrix", "rounded"}
