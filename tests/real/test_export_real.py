"""llama.cpp's converter on the real small model, whose tokenizer it knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.__main__ import main
from pipeline.errors import EXIT_DONE
from pipeline.export.gguf import INSTALLED


@pytest.mark.skipif(
    not INSTALLED.is_file(), reason="llama.cpp's converter is not installed; see docs/chat_and_export.md"
)
def test_a_gguf_file_holds_the_same_model_and_no_path(smollm2_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.gguf"
    command = ["+experiment=quickstart", "action=export", "export.format=gguf", f"target={smollm2_dir}"]
    assert main([*command, f"export.path={out}", "export.outtype=f32"]) == EXIT_DONE
    ids = torch.arange(5, 25)[None]
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32)
    assert torch.equal(model(ids).logits, again(ids).logits)
    header = out.read_bytes()[:8_000_000]  # the metadata, with the tokenizer
    assert b"general.name" in header and str(tmp_path).encode() not in header and b"/export-" not in header
