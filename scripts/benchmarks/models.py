"""The expanded models that are trained: ``python -m scripts.benchmarks.models SHAPE NEW_LAYERS POSITION OUT``.

SmolLM2 is the real model from its package, read and expanded by the stages themselves with LLaMA Pro's method. The
Llama shapes have random weights and that method's plan: speed does not depend on weights, and nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from pipeline.artifact import write_json
from pipeline.config import AnyExpand, Launch, Model, Tracking
from pipeline.stage import StageTask, TrackingTarget

CONF = Path(__file__).resolve().parents[2] / "conf"
# hidden size, intermediate size, layers, heads, key and value heads, head size, vocabulary, tied head
LLAMA = {
    "tiny": (64, 128, 4, 4, 2, 16, 49152, True),  # to see that the program runs
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
        launch=Launch(device="auto", processes=1, threads="auto", nodes=1, utilization=0.4),
        tracking=TrackingTarget(tracking, "benchmark", name, "benchmark", out / "wandb"),
    )


def make(shape: str, new_layers: int, position: str, out: Path) -> None:
    """Writes the expanded model into ``out``; SmolLM2's base goes beside it unless it is there."""
    values = yaml.safe_load((CONF / "expand" / "llama_pro.yaml").read_text())
    changed = json.dumps({**values, "new_layers": new_layers, "position": position})
    settings: Any = TypeAdapter(AnyExpand).validate_json(changed)
    out.mkdir(parents=True, exist_ok=True)
    if shape == "smollm2":
        _expand_smollm2(settings, out)
    else:
        _write_random(shape, settings, out)


def _expand_smollm2(settings: Any, out: Path) -> None:
    from pipeline.stages import expand, load

    base = out.parent / "base"
    if not (base / "config.json").exists():
        base.mkdir()
        model = yaml.safe_load((CONF / "model" / "smollm2.yaml").read_text())
        load.run(stage_task("load", Model.model_validate_json(json.dumps(model)), {}, base))
    expand.run(stage_task("expand", settings, {"load": base}, out))


def _write_random(shape: str, settings: Any, out: Path) -> None:
    """A model of the deeper shape at once, in bfloat16, and the plan that says which of its layers are new."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pipeline.expansion.layer_plan import make_plan
    from pipeline.model_dir import EXPANSION_FILE
    from pipeline.stages.expand import describe

    hidden, intermediate, layers, heads, key_value_heads, head_dim, vocabulary, tied = LLAMA[shape]
    plan = make_plan(settings, layers)
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
    write_json(out / EXPANSION_FILE, describe(settings, plan))


if __name__ == "__main__":
    shape, new_layers, position, out = sys.argv[1:]
    make(shape, int(new_layers), position, Path(out))
