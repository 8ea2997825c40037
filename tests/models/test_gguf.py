"""The metadata of GGUF files that the gguf package wrote."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from pipeline.errors import UserError
from pipeline.models.gguf import read_metadata
from tests.tiny_gguf import write_gguf


@pytest.fixture(scope="module")
def gguf_file(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_llama_dir, path, gguf.GGMLQuantizationType.Q8_0)
    return path


def test_metadata_agrees_with_the_reader_of_the_gguf_package(gguf_file: Path) -> None:
    metadata, reader = read_metadata(gguf_file), gguf.GGUFReader(gguf_file)
    assert list(metadata.tensor_names) == [tensor.name for tensor in reader.tensors]
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):  # added by the reader for its counts
            value = field.contents()
            assert metadata.values[name] == (len(value) if isinstance(value, list) else value), name


def test_the_config_has_the_entries_that_sizes_follow_from(gguf_file: Path) -> None:
    assert read_metadata(gguf_file).config() == {
        "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 384,
        "tie_word_embeddings": True, "has_chat_template": True,
    }  # fmt: skip


def test_entries_with_one_value_per_layer_and_zeros_are_left_out_of_the_config(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "lfm2")
    writer.add_block_count(4)
    writer.add_head_count_kv([0, 0, 2, 0])
    writer.add_sliding_window(0)
    writer.add_token_list(["a", "b", "c"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    config = read_metadata(tmp_path / "model.gguf").config()
    assert (config["num_hidden_layers"], config["vocab_size"]) == (4, 3)
    assert not {"num_key_value_heads", "sliding_window"} & set(config)


def test_damaged_files_are_rejected_without_allocating(gguf_file: Path, tmp_path: Path) -> None:
    content = gguf_file.read_bytes()
    huge = (2**62).to_bytes(8, "little")
    for offset in (8, 16, 24):  # numbers of tensors and entries, and the length of the first key
        (tmp_path / "huge.gguf").write_bytes(content[:offset] + huge + content[offset + 8 :])
        with pytest.raises(UserError, match="truncated or damaged"):
            read_metadata(tmp_path / "huge.gguf")


@pytest.mark.parametrize("size", [0, 3, 20, 500, 2000])
def test_truncated_files_are_rejected(gguf_file: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "short.gguf").write_bytes(gguf_file.read_bytes()[:size])
    with pytest.raises(UserError, match="model.gguf_file"):
        read_metadata(tmp_path / "short.gguf")
