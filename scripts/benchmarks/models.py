"""The expanded models that are trained: ``python -m scripts.benchmarks.models SHAPE NEW_LAYERS POSITION DTYPE OUT``.

SmolLM2 is the real model from its package, read by the load stage. The Llama shapes have random weights: speed does
not depend on them, and nothing has to be downloaded. All are expanded by the expand stage with LLaMA Pro's method.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from pipeline.config import AnyExpand, Launch, Model, Tracking
from pipeline.stage import StageTask, TrackingTarget

CONF = Path(__file__).resolve().parents[2] / "conf"
# hidden size, intermediate size, layers, heads, key and value heads, head size, vocabulary, tied head
LLAMA = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
}
SHAPES = ("smollm2", *LLAMA)


def stage_task(name: str, settings: Any, parents: dict[str, Path], out: Path) -> StageTask:
    """A task outside of any run: no tracking, this machine as it is."""
    tracking = Tracking(wandb="disabled", project="benchmark", entity=None)
    return StageTask(
        name=name,
        settings=settings,
        parents=parents,
        out=out,
        seed=0,
        launch=Launch(device="auto", processes=1, threads="auto"),
        tracking=TrackingTarget(tracking, "benchmark", name, "benchmark", out / "wandb"),
    )


def make(shape: str, new_layers: int, position: str, dtype: str, out: Path) -> None:
    """Writes the base beside ``out`` unless it is there, and the expanded model into ``out``."""
    from pipeline.stages import expand

    base = out.parent / f"base-{shape}-{dtype}"
    if not (base / "config.json").exists():
        base.mkdir(parents=True, exist_ok=True)
        _write_base(shape, dtype, base)
    values = yaml.safe_load((CONF / "expand" / "llama_pro.yaml").read_text())
    settings: Any = TypeAdapter(AnyExpand).validate_json(
        json.dumps({**values, "new_layers": new_layers, "position": position})
    )
    out.mkdir(parents=True, exist_ok=True)
    expand.run(stage_task("expand", settings, {"load": base}, out))


def _write_base(shape: str, dtype: str, out: Path) -> None:
    if shape == "smollm2":
        from pipeline.stages import load

        values = yaml.safe_load((CONF / "model" / "smollm2.yaml").read_text())
        settings = Model.model_validate_json(json.dumps({**values, "dtype": dtype}))
        load.run(stage_task("load", settings, {}, out))
        return
    _write_random(shape, dtype, out)


def _write_random(shape: str, dtype: str, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, intermediate, layers, heads, key_value_heads, head_dim, vocabulary, tied = LLAMA[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, head_dim=head_dim, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(out)


if __name__ == "__main__":
    shape, new_layers, position, dtype, out = sys.argv[1:]
    make(shape, int(new_layers), position, dtype, Path(out))
