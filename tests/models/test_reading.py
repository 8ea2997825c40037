"""Model directories are read one tensor at a time, and their side files are copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.models.reading import ModelDirectory, copy_side_files
from pipeline.models.source import code_files


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


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_goes_with_the_config_that_names_it(file: str, tmp_path: Path) -> None:
    """transformers would look for it in the copy, and fail."""
    model, copies = tmp_path / "model", [tmp_path / "copy", tmp_path / "plain"]
    for directory in (model, *copies):
        directory.mkdir()
    write_json(model / file, {"auto_map": {"AutoConfig": "modeling_mine.Config"}})
    for name in ("modeling_mine.py", "helpers.py"):
        (model / name).touch()
    copy_side_files(model, copies[0])
    copy_side_files(model, copies[1], with_code=False)
    assert [{path.name for path in copy.glob("*.py")} for copy in copies] == [{"modeling_mine.py", "helpers.py"}, set()]
    write_json(model / file, {})
    assert not code_files(model)
