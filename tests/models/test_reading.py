"""Model directories are read one tensor at a time, and their side files are copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.models.reading import ModelDirectory, copy_side_files


def test_packed_weights_are_rejected(tmp_path: Path) -> None:
    save_file({"packed": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {})
    with pytest.raises(UserError, match="F8_E4M3.*unquantized model"):
        ModelDirectory(tmp_path)


def test_side_files_are_copied_byte_for_byte(tiny_llama_dir: Path, tmp_path: Path) -> None:
    copy_side_files(tiny_llama_dir, tmp_path)
    copied = {path.name for path in tmp_path.iterdir()}
    assert copied == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert all((tmp_path / name).read_bytes() == (tiny_llama_dir / name).read_bytes() for name in copied)
