"""The expand stage: plans the new layers, writes the deeper model, and verifies what was written."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.errors import UserError
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import Method
from pipeline.expansion.model_card import base_weights, model_card
from pipeline.expansion.ranking import Ranking, rank_layers, read_probe, remove_ranking_records
from pipeline.expansion.self_check import CheckFailedError, Outcome, check_model
from pipeline.expansion.surgery import TensorNames, remove_progress_records, scratch_in, write_weights
from pipeline.files import write_json
from pipeline.models.config_json import depth_of
from pipeline.models.families import INFERRED, family_for, shape_of
from pipeline.models.layer_config import explicit_config, rebuild_config
from pipeline.models.reading import EXPANSION_FILE, ModelDirectory, copy_side_files
from pipeline.models.vector_math import initialize_vector_math


def run(task: StageTask) -> Metrics:
    """Writes the deeper model, its ``expansion.json`` and its model card into ``task.out``.

    Raises:
        UserError: the method cannot expand this base, or the disk is full.
        CheckFailedError: the model that was written is not the one that was planned.
    """
    # The Adam moments of dead ReLU units decay to subnormal numbers, on which processors are many times slower.
    torch.set_flush_denormal(True)
    initialize_vector_math()
    method = task.settings
    assert isinstance(method, Method)
    base = ModelDirectory(task.parents["load"])
    config = explicit_config(base.path)
    family = family_for(config)
    placed, ranking = _rank(task, method, config)
    plan = placed.place(depth_of(config))
    shape = shape_of(config)
    placed.check_layers(shape)
    deeper = rebuild_config(config, plan.config_sources)
    _check_kinds(config, deeper, plan)
    names = TensorNames(base, family, plan)
    seed = task.seed if method.draws_random_numbers else None

    started = time.monotonic()
    with _no_global_draws(method.title):
        work = write_weights(names, method.new_tensors, device_of(method), task.out, seed)
    weights_seconds = time.monotonic() - started
    record = expansion_record(placed, plan) | {
        "settings": method.key_settings(),
        "seed": task.seed,
        "base": base_weights(base.path),
    }
    _write_description(task.out, base.path, deeper, record)

    outcome = _check_or_discard(task.out, base.path, deeper, method)
    remove_ranking_records(task.out)
    return {
        "num_base_layers": plan.num_base_layers,
        "num_layers": len(plan.layers),
        "new_layers": [layer.layer for layer in plan.layers if layer.new],
        "weights_seconds": round(weights_seconds, 3),
        "check": asdict(outcome),
        "warnings": [*work.warnings, *([shape.depth_warning] if shape.depth_warning and plan.new_layers else [])],
        **({} if ranking is None else {"ranking": asdict(ranking)}),
        **({} if family.inference is None else {"family": INFERRED}),
        "method": work.records,
    }


def _rank(task: StageTask, method: Method, config: dict[str, Any]) -> tuple[Method, Ranking | None]:
    """Returns the method with the gaps that a ranking of the layers gives, if its position asks for one."""
    if method.ranked_position is None:
        return method, None
    shape = shape_of(config)
    probe = read_probe(task.parents["data"], method.probe_tokens)
    device = device_of(method, uses_gpu=True)
    base, memory = task.parents["load"], method.check_memory
    ranking = rank_layers(method.ranked_position, base, probe, device, memory, task.out, scratch_in(task.out))
    count = len(method.place(len(shape.layers)).new_layers) or len(method.matched_layers(len(shape.layers)))
    return method.with_gaps(ranking.gaps(count, method.possible_gaps(shape))), ranking


def _check_kinds(config: dict[str, Any], deeper: dict[str, Any], plan: LayerPlan) -> None:
    """Checks that the deeper model's layers have the tensors of the layers that they are made from.

    Raises:
        UserError: the config has a rule for the kinds of layers, such as every second one, that has no entry for this
            sequence.
    """
    base = shape_of(config)
    if all(layer.tensors == base.layers[0].tensors for layer in base.layers):
        return
    expected = base.with_layers(plan.config_sources)
    for index, (layer, made) in enumerate(zip(expected.layers, shape_of(deeper).layers, strict=True)):
        if layer.tensors != made.tensors:
            raise UserError(
                setting="expand.position",
                value=[planned.base[0] for planned in plan.new_layers],
                rule=f"layer {index} of the deeper model would be of another kind than layer "
                f"{plan.config_sources[index]}, from which it comes: the entries of config.json that decide the kinds "
                "of layers cannot express this sequence",
                remedy="Set expand.position to gaps after which the rule of this model still holds, or choose another "
                "model.",
            )


def _write_description(out: Path, base: Path, deeper: dict[str, Any], record: dict[str, Any]) -> None:
    """Writes all files of the model but its weights: config, tokenizer, ``expansion.json`` and model card."""
    write_json(out / "config.json", deeper)
    copy_side_files(base, out)
    write_json(out / EXPANSION_FILE, record)
    (out / "README.md").write_text(model_card(record, base))


def _check_or_discard(out: Path, base: Path, deeper: dict[str, Any], method: Method) -> Outcome:
    """Checks the model that was written. Another attempt resumes its weights only if the check was interrupted.

    Raises:
        CheckFailedError: the model is not the one that was planned.
    """
    try:
        outcome = check_model(out, deeper, base if method.keeps_logits else None, method.check_memory)
    except CheckFailedError:
        remove_progress_records(out)  # otherwise another attempt would take these weights for finished ones
        raise
    remove_progress_records(out)
    return outcome


def expansion_record(method: Method, plan: LayerPlan) -> dict[str, object]:
    """Returns the content of ``expansion.json``: how the model was made, and the origin of every layer.

    Later stages read this file rather than the method's module, which may have changed by then.
    """
    matched = method.matched_layers(plan.num_base_layers)
    return {
        "method": method.method,
        "title": method.title,
        "color": method.color,
        "trains": method.trains,
        "settings": method.key_settings(),
        "source": method.source,
        "num_base_layers": plan.num_base_layers,
        "num_layers": len(plan.layers),
        "layers": plan.to_json(),
        **({"matched": list(matched)} if matched else {}),
    }


def device_of(method: Method, uses_gpu: bool | None = None) -> torch.device:
    """Returns the device on which the method computes. A method without linear algebra always uses the CPU.

    Args:
        method: the method.
        uses_gpu: whether a GPU is worth using; None: what the method says.

    Raises:
        UserError: a GPU is requested, but none is visible.
    """
    gpu = torch.cuda.is_available()
    if method.device == "cuda" and not gpu:
        raise UserError(
            setting="expand.device",
            value="cuda",
            rule="no GPU is visible to torch on this machine",
            remedy="Set expand.device=auto, or run on a machine with a GPU.",
        )
    worthwhile = method.uses_gpu if uses_gpu is None else uses_gpu
    return torch.device("cuda" if gpu and worthwhile and method.device != "cpu" else "cpu")


@contextmanager
def _no_global_draws(title: str) -> Iterator[None]:
    """Checks that a method does not use global random number generators, which are not seeded by ``task.seed``.

    Raises:
        RuntimeError: the state of one of them changed.
    """

    def states() -> list[object]:
        legacy: Any = np.random.get_state()
        on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        devices = [state.tolist() for state in (torch.get_rng_state(), *on_gpu)]
        return [random.getstate(), (legacy[1].tolist(), legacy[2]), devices]

    before = states()
    yield
    if states() != before:
        raise RuntimeError(
            f"{title} drew from a global random number generator: set draws_random_numbers = True in its class, and "
            "draw from a separate generator that is seeded with work.seed"
        )
