"""expand: plan the new layers, write the deeper model, check what was written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict

import torch

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.config import AnyExpand
from pipeline.errors import UserError
from pipeline.expansion.layer_plan import LayerPlan, make_plan
from pipeline.expansion.layers import Journal, Layer, NewTensor
from pipeline.expansion.methods import METHODS, expand_function
from pipeline.expansion.model_card import base_weights, model_card
from pipeline.expansion.self_check import CheckFailedError, check_model
from pipeline.expansion.surgery import Names, forget_records, write_weights
from pipeline.files import write_json
from pipeline.models.families import family_of
from pipeline.models.layer_config import rebuild_config, spelled_out_config
from pipeline.models.reading import EXPANSION_FILE, ModelDirectory, copy_side_files
from pipeline.models.vector_math import settle_vector_math


def run(task: StageTask) -> Metrics:
    """Writes the deeper model, its ``expansion.json`` and its model card into ``task.out``.

    Raises:
        UserError: the method cannot expand this base, or the disk is too small.
        CheckFailedError: what was written is not what was meant.
    """
    # Adam's moments of silent units decay into numbers so small that processors take many times as long over them.
    torch.set_flush_denormal(True)
    settle_vector_math()
    settings: AnyExpand = task.settings  # type: ignore[assignment]  # the stage's settings are one of these
    base = ModelDirectory(task.parents["load"])
    config = spelled_out_config(base.path)
    plan = make_plan(settings, config["num_hidden_layers"])
    names = Names(base, family_of(config["model_type"]), plan)

    def method(layers: list[Layer], plan: LayerPlan, journal: Journal) -> Iterator[NewTensor]:
        return expand_function(settings.method)(layers, plan, settings, task.seed, journal)

    started = time.monotonic()
    journal = write_weights(names, method, device_of(settings), task.out)
    weights_seconds = time.monotonic() - started
    deeper = rebuild_config(config, plan.config_sources)
    write_json(task.out / "config.json", deeper)
    copy_side_files(base.path, task.out)
    description = describe(settings, plan) | {"seed": task.seed, "base": base_weights(base.path)}
    write_json(task.out / EXPANSION_FILE, description)
    (task.out / "README.md").write_text(model_card(description, base.path))

    keeps_logits = METHODS[settings.method].keeps_logits(settings)
    try:
        outcome = check_model(task.out, deeper, base.path if keeps_logits else None, settings.check_memory)
    except CheckFailedError:
        forget_records(task.out)  # so that another attempt does not take these weights for done
        raise
    forget_records(task.out)
    return {
        "num_base_layers": plan.num_base_layers,
        "num_layers": len(plan.layers),
        "new_layers": [layer.layer for layer in plan.layers if layer.new],
        "weights_seconds": round(weights_seconds, 3),
        "check": asdict(outcome),
        "warnings": journal.warnings,
        "method": journal.records,
    }


def describe(settings: AnyExpand, plan: LayerPlan) -> dict[str, object]:
    """The content of ``expansion.json``: which layers are new, and what each comes from."""
    return {
        "method": settings.method,
        "settings": settings.key_settings(),
        "source": METHODS[settings.method].source,
        "num_base_layers": plan.num_base_layers,
        "num_layers": len(plan.layers),
        "layers": plan.to_json(),
    }


def device_of(settings: AnyExpand) -> torch.device:
    """Where the method's tensors live: those of a method that only copies never leave the CPU.

    Raises:
        UserError: a GPU is asked for and none is visible.
    """
    gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not gpu:
        raise UserError(
            setting="expand.device",
            value="cuda",
            rule="no GPU is visible to torch here",
            remedy="Say expand.device=auto, or run where there is a GPU.",
        )
    computes = METHODS[settings.method].linear_algebra
    return torch.device("cuda" if gpu and computes and settings.device != "cpu" else "cpu")
