"""Completes expanded weights to model directories, and scores them."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.data import python_docs
from pipeline.expansion.surgery import TensorNames
from pipeline.files import write_json
from pipeline.models.layer_config import explicit_config, rebuild_config
from pipeline.models.reading import copy_side_files


def write_model(names: TensorNames, base: Path, out: Path) -> None:
    """Adds the config and tokenizer to expanded weights."""
    write_json(out / "config.json", rebuild_config(explicit_config(base), names.plan.config_sources))
    copy_side_files(base, out)


@torch.inference_mode()
def held_out_perplexity(model: Path, blocks: int = 8, block_size: int = 512) -> float:
    """Returns the perplexity per token of the embedded corpus's held-out documents, packed into blocks, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    end = tokenizer.eos_token or ""
    ids = tokenizer(end.join(python_docs.documents(held_out=True)), return_tensors="pt")["input_ids"][0]
    batch = ids[: blocks * block_size].view(blocks, block_size)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses = [network(block[None], labels=block[None]).loss for block in batch]
    return float(torch.stack(losses).mean().exp())
