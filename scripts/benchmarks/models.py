"""Writes the expanded models for training: ``python -m scripts.benchmarks.models SHAPE NEW_LAYERS POSITION OUT``.

SmolLM2 is the real model from its package, loaded by the load stage and expanded by the expand stage with LLaMA Pro's
method. The Llama shapes have random weights and that method's layer plan, because speed does not depend on the weights
and nothing has to be downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.config import AnyExpand
from pipeline.expansion.method import method_of
from pipeline.files import write_json
from pipeline.models.reading import EXPANSION_FILE
from pipeline.stages import expand
from pipeline.stages.expand import expansion_record
from scripts.benchmarks.shapes import LLAMA
from scripts.benchmarks.tasks import expand_settings, expand_task, load_smollm2


def make(shape: str, new_layers: int, position: str, out: Path) -> None:
    """Writes the expanded model to ``out``, and SmolLM2's base model to a directory beside it unless it exists."""
    settings = expand_settings("llama_pro", new_layers=new_layers, position=position)
    out.mkdir(parents=True, exist_ok=True)
    if shape == "smollm2":
        expand.run(expand_task(settings, load_smollm2(out.parent / "base"), out))
    else:
        _write_random(shape, settings, out)


def _write_random(shape: str, settings: AnyExpand, out: Path) -> None:
    """Writes a random model with the expanded depth in bfloat16, and the plan that says which of its layers are new."""
    hidden, intermediate, layers, heads, key_value_heads, head_dim, vocabulary, tied = LLAMA[shape]
    method = method_of(settings)
    plan = method.place(layers)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=len(plan.layers),
        num_attention_heads=heads, num_key_value_heads=key_value_heads, head_dim=head_dim, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    write_json(out / EXPANSION_FILE, expansion_record(method, plan))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=["smollm2", *LLAMA])
    parser.add_argument("new_layers", type=int)
    parser.add_argument("position")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    make(options.shape, options.new_layers, options.position, options.out)
