"""A tuned model has the chat template and stops at the end of a turn, wherever the base model stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.data.blocks import BlockWriter
from pipeline.models.loading import IncompleteModelError
from pipeline.training.final_model import check_export, checked_ids, copy_chat_files, token_losses
from pipeline.training.loss import SummedLoss


def test_an_export_that_computes_something_else_is_rejected(tiny_llama_dir: Path, tmp_path: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    losses = token_losses(SummedLoss(trained), ids, torch.device("cpu"))
    export = Path(shutil.copytree(tiny_llama_dir, tmp_path / "export"))
    check_export(export, ids, losses, "float32")
    weights = load_file(export / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, export / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteModelError, match="differs from that of the trained model by"):
        check_export(export, ids, losses, "float32")
    # The old head of a tied model: transformers then no longer ties it.
    weights = load_file(tiny_llama_dir / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1e-6
    save_file(weights, export / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteModelError, match="not tied"):
        check_export(export, ids, losses, "float32")


@pytest.mark.parametrize(("tokens", "targets"), [(2, [1]), (5, [4, 3, 2, 1]), (32, [31, 24, 17, 10])])
def test_an_export_is_compared_on_tokens_of_the_training_data(
    tokens: int, targets: list[int], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    rows = np.arange(5 * tokens, dtype=np.uint32).reshape(5, tokens) % 64
    with BlockWriter(tmp_path, "train", tokens) as writer:
        writer.append(rows, np.zeros_like(rows), np.ones_like(rows, dtype=np.uint8))
    ids = checked_ids(tmp_path)
    assert ids.tolist() == [rows[0].tolist()]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    probabilities = model(ids).logits[0].detach().log_softmax(-1)
    expected = [-probabilities[target - 1, ids[0, target]].item() for target in targets]
    losses = token_losses(SummedLoss(model), ids, torch.device("cpu"))
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("generation", "config", "end", "expected"),
    [
        ({"eos_token_id": 0, "top_p": 0.9}, {}, 7, {"eos_token_id": [0, 7], "top_p": 0.9}),
        ({"eos_token_id": [0, 7]}, {}, 7, {"eos_token_id": [0, 7]}),
        ({"eos_token_id": 7}, {}, 7, {"eos_token_id": 7}),
        (None, {"eos_token_id": 0}, 7, {"eos_token_id": [0, 7]}),
        (None, {}, 7, {"eos_token_id": [7]}),
        ({"eos_token_id": 0}, {}, None, {"eos_token_id": 0}),
    ],
)
def test_the_end_of_turn_is_added_to_the_stop_tokens(
    generation: Any, config: Any, end: int | None, expected: Any, tmp_path: Path
) -> None:
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    model.mkdir()
    (data / "dataset.json").write_text(json.dumps({"end_of_turn": end}))
    (model / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))
    copy_chat_files(data, model)
    assert json.loads((model / "generation_config.json").read_text()) == expected


def test_the_chat_template_is_copied(tmp_path: Path) -> None:
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    model.mkdir()
    (data / "dataset.json").write_text("{}")
    copy_chat_files(data, model)
    assert not list(model.iterdir())
    (data / "chat_template.jinja").write_text("template")
    copy_chat_files(data, model)
    assert (model / "chat_template.jinja").read_text() == "template"
