"""Checks of training settings and data that need no weights, so they run before any worker starts. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Launch, Train
from pipeline.config.training import NEWTON_SCHULZ_STEPS
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.launch.environment import code_cache_faults, missing_for_compilation
from pipeline.launch.machine import Machine, place, requested_placement
from pipeline.models.families import Shape
from pipeline.models.families.parameters import Config
from pipeline.training.deepspeed_config import override_faults
from pipeline.training.precision import has_float32_units
from pipeline.training.selection import check_terms


def training_faults(
    section: str,
    train: Train,
    launch: Launch,
    context_length: int | None,
    machine: Machine,
    submitted: bool = False,
) -> Iterator[UserError]:
    """Yields everything that is wrong with the settings of one training stage.

    Args:
        section: "pretrain" or "sft", for the messages.
        train: the stage's settings.
        launch: how the workers will be started.
        context_length: the longest sequence that the model accepts, in tokens; None if its config does not specify it.
        machine: where the stage will run.
        submitted: that is another machine than this one, and the job checks what only it can know.
    """
    try:
        placement = place(launch, machine)
    except UserError as error:
        yield error
        placement = requested_placement(launch, machine)  # so that the other faults are reported as well
    yield from context_length_faults(section, train, context_length)
    unshared = list(_shared_sequences(section, train, placement.ranks))
    yield from unshared
    groups = placement.ranks // (1 if unshared else train.sequence_parallel)
    if train.global_batch % (groups * train.micro_batch):
        yield _indivisible(section, train, groups)
    yield from _schedule(section, train)
    yield from _offloading(section, train)
    yield from _second_copy(section, train, placement.processes)
    try:
        check_terms(section, train.trainable)
    except UserError as error:
        yield error
    unreadable = list(override_faults(section, train.deepspeed.overrides))
    yield from unreadable
    if not unreadable:
        yield from _partial_offload(section, train)
        yield from _quantized_weights(section, train, placement.device)
        yield from _muon(section, train)
    # A plan for GPUs that this machine does not have says nothing about the compilers of the machine that has them.
    compiles_here = not submitted and (placement.device == "cpu" or machine.gpus > 0)
    yield from _compilation(section, train, placement.device, compiles_here)
    yield from _products(section, train, placement.device)


def _schedule(section: str, train: Train) -> Iterator[UserError]:
    warmup, decay = train.warmup_fraction, train.decay_fraction
    if train.schedule == "warmup_stable_decay" and round(warmup + decay, 9) > 1.0:
        yield UserError(
            setting=f"{section}.decay_fraction",
            value=decay,
            rule=f"the decay would begin before the end of the warm-up, which takes {warmup:g} of the steps",
            remedy=f"Set {section}.decay_fraction={1.0 - warmup:g} or less, or a smaller {section}.warmup_fraction.",
        )


def _offloading(section: str, train: Train) -> Iterator[UserError]:
    stage = train.deepspeed.zero_stage
    if train.deepspeed.offload_parameters and stage != 3:
        yield UserError(
            setting=f"{section}.deepspeed.offload_parameters",
            value="true",
            rule=f"only ZeRO 3 can offload parameters, and zero_stage is {stage}",
            remedy=f"Set {section}.deepspeed.zero_stage=3 or {section}.deepspeed.offload_parameters=false.",
        )
    if train.deepspeed.offload_optimizer and stage == 0:
        yield UserError(
            setting=f"{section}.deepspeed.offload_optimizer",
            value="true",
            rule="the optimizer can only be offloaded from ZeRO 1 on, and zero_stage is 0",
            remedy=f"Set {section}.deepspeed.zero_stage=2 or {section}.deepspeed.offload_optimizer=false.",
        )


def _second_copy(section: str, train: Train, processes: int) -> Iterator[UserError]:
    size, stage = train.deepspeed.hpz_partition_size, train.deepspeed.zero_stage
    setting = f"{section}.deepspeed.hpz_partition_size"
    if size > 1 and stage != 3:
        rule = f"only ZeRO 3 partitions parameters, and zero_stage is {stage}"
        remedy = f"Set {section}.deepspeed.zero_stage=3 or {setting}=1."
        yield UserError(setting=setting, value=size, rule=rule, remedy=remedy)
    elif processes % size:
        rule = f"it must divide the number of processes per node, which is {processes}"
        yield UserError(setting=setting, value=size, rule=rule, remedy=_set_to(setting, _divisors(processes)))


def context_length_faults(section: str, train: Train, context_length: int | None) -> Iterator[UserError]:
    """Yields an error if token blocks would exceed the model's context. The tokenize stage makes this check too."""
    if context_length is not None and train.sequence_length > context_length:
        yield UserError(
            setting=f"{section}.sequence_length",
            value=train.sequence_length,
            rule=f"the model's context is limited to {context_length} tokens",
            remedy=f"Set {section}.sequence_length={context_length} or less.",
        )


def _shared_sequences(section: str, train: Train, ranks: int) -> Iterator[UserError]:
    parts, setting = train.sequence_parallel, f"{section}.sequence_parallel"
    if ranks % parts:
        rule = f"it must divide the number of processes, which is {ranks}"
    elif train.sequence_length % parts:
        rule = f"it must divide sequence_length={train.sequence_length}"
    elif parts > 1 and train.attention in ("sdpa", "eager"):
        rule = f"ranks cannot share sequences with attention={train.attention}, whose mask is as long as a sequence"
        yield UserError(setting=setting, value=parts, rule=rule, remedy=f"Set {section}.attention=auto.")
        return
    else:
        return
    possible = _divisors(math.gcd(ranks, train.sequence_length))
    yield UserError(setting=setting, value=parts, rule=rule, remedy=_set_to(setting, possible))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _set_to(setting: str, values: Iterable[int]) -> str:
    return f"Set {setting}=" + " or ".join(map(str, values)) + "."


def shared_model_faults(section: str, train: Train, shape: Shape, config: Config) -> Iterator[UserError]:
    """Yields what in a model prevents ranks from sharing its sequences.

    Args:
        section: "pretrain" or "sft", for the messages.
        train: the stage's settings.
        shape: of the model.
        config: of its language model.
    """
    if train.sequence_parallel == 1:
        return
    setting, remedy = f"{section}.sequence_parallel", f"Set {section}.sequence_parallel=1."
    # transformers chooses the frequencies by the largest position that the rank sees.
    if kinds := _rope_types(config) & {"dynamic", "longrope"}:
        rule = f"the model's rotary embeddings (rope_type {kinds.pop()}) depend on the longest document of all ranks"
        yield UserError(setting=setting, value=train.sequence_parallel, rule=rule, remedy=remedy)
    if shape.inferred:
        rule = "the model's family has no row in the table of families, so that its attention is not known"
        yield UserError(setting=setting, value=train.sequence_parallel, rule=rule, remedy=remedy)
    heads, key_heads = shape.heads, max(1, shape.key_size // shape.head_size)
    possible = [ranks for ranks in range(1, heads + 1) if _can_divide(heads, key_heads, ranks)]
    if train.sequence_parallel not in possible:
        yield UserError(
            setting=setting,
            value=train.sequence_parallel,
            rule=f"the ranks divide the model's {heads} query heads and {key_heads} key heads among them, or repeat "
            "key heads equally often",
            remedy=_set_to(setting, possible),
        )


def _can_divide(heads: int, key_heads: int, ranks: int) -> bool:
    return heads % ranks == 0 and (key_heads % ranks == 0 or ranks % key_heads == 0)


def _rope_types(config: Config) -> set[Any]:
    """Returns the kinds of rotary embeddings in a config, which may have one for each kind of layer."""
    entries = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    entries += [value for entry in entries for value in entry.values() if isinstance(value, dict)]
    return {entry.get("rope_type", entry.get("type")) for entry in entries}


def _partial_offload(section: str, train: Train) -> Iterator[UserError]:
    """DeepSpeed updates what stays on the GPU with another AdamW, which knows neither parts of tensors nor averages."""
    ratio = train.deepspeed.overrides.get("zero_optimization", {}).get("offload_optimizer", {}).get("ratio", 1.0)
    names = [name for name in ("role_learning_rates", "ema_decay") if getattr(train, name)]
    if not 0.0 <= ratio <= 1.0:
        rule = f"it is a share between 0 and 1, not {ratio}"
    elif ratio != 1.0 and train.deepspeed.zero_stage != 3:
        rule = f"only ZeRO 3 can offload a part of the optimizer, and zero_stage is {train.deepspeed.zero_stage}"
    elif ratio != 1.0 and names:
        rule = f"the part of the optimizer that it leaves on the GPU would ignore {' and '.join(names)}"
    else:
        return
    yield UserError(
        setting=f"{section}.deepspeed.overrides",
        value="zero_optimization.offload_optimizer.ratio",
        rule=rule,
        remedy="Remove the ratio, so that all of the optimizer is offloaded.",
    )


def _quantized_weights(section: str, train: Train, device: str) -> Iterator[UserError]:
    zero = train.deepspeed.overrides.get("zero_optimization", {})
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if device == "cpu" and zero.get(name):
            yield UserError(
                setting=f"{section}.deepspeed.overrides",
                value=f"zero_optimization.{name}",
                rule="DeepSpeed quantizes weights on GPUs only",
                remedy="Remove it.",
            )


def _muon(section: str, train: Train) -> Iterator[UserError]:
    if not train.uses_muon:
        if train.newton_schulz_steps != NEWTON_SCHULZ_STEPS:
            yield UserError(
                setting=f"{section}.newton_schulz_steps",
                value=train.newton_schulz_steps,
                rule=f"{train.optimizer} has no such iterations",
                remedy=f"Remove it, or set {section}.optimizer=muon or muon_new_layers.",
            )
        return
    offloads = "offload_optimizer" in train.deepspeed.overrides.get("zero_optimization", {})
    if train.deepspeed.zero_stage == 3:
        rule, remedy = "Muon needs full matrices, and ZeRO 3 partitions every parameter", "deepspeed.zero_stage=2"
    elif train.deepspeed.offload_optimizer or offloads:
        rule = "Muon runs where the model is, since matrices are orthogonalized slowly on the host"
        remedy = "deepspeed.offload_optimizer=false"
    else:
        return
    yield UserError(
        setting=f"{section}.optimizer",
        value=train.optimizer,
        rule=rule,
        remedy=f"Set {section}.{remedy} or {section}.optimizer=adamw.",
    )


def less_memory(section: str, train: Train, processes: int) -> str:
    """Suggests settings that save memory and are not used yet. None of them changes the numbers."""
    groups = train.groups_of(processes)
    smaller = [size for size in range(1, train.micro_batch) if train.global_batch % (groups * size) == 0]
    deepspeed, shards = train.deepspeed, not train.uses_muon
    wanted = {
        f"micro_batch={smaller[-1] if smaller else 1}": bool(smaller),
        "activation_checkpointing=true": not train.activation_checkpointing,
        "deepspeed.zero_stage=3": processes > 1 and deepspeed.zero_stage < 3 and train.compile is not True and shards,
        "deepspeed.offload_optimizer=true": deepspeed.zero_stage > 0 and not deepspeed.offload_optimizer and shards,
        "deepspeed.offload_parameters=true": deepspeed.zero_stage == 3 and not deepspeed.offload_parameters,
    }
    settings = [f"{section}.{setting}" for setting, helps in wanted.items() if helps]
    if not settings:
        return f"All settings that save memory are in use. Use more processes or a shorter {section}.sequence_length."
    return f"To save memory, add any of {', '.join(settings)} to the same command, which then resumes the run."


def _compilation(section: str, train: Train, device: str, compiles_here: bool) -> Iterator[UserError]:
    if not train.compiles(device):
        return
    if train.deepspeed.zero_stage == 3:
        yield UserError(
            setting=f"{section}.compile",
            value=f"{train.compile}".lower(),
            rule="ZeRO 3 gathers parameters in module hooks, which compiled layers do not run, and zero_stage is 3",
            remedy=f"Set {section}.compile=false or {section}.deepspeed.zero_stage=2.",
        )
    missing = missing_for_compilation(device, os.environ)
    if missing is not None and compiles_here:
        rule, remedy = missing
        yield UserError(
            setting=f"{section}.compile",
            value=f"{train.compile}".lower(),
            rule=rule,
            remedy=f"{remedy}, or set {section}.compile=false.",
        )
    yield from code_cache_faults(os.environ, needed=True)


def _products(section: str, train: Train, device: str) -> Iterator[UserError]:
    if train.float32_products is True and not has_float32_units(device, train.deepspeed.zero_stage):
        yield UserError(
            setting=f"{section}.float32_products",
            value="true",
            rule=f"it requires a CPU and ZeRO 1 or 2; this is {device} at ZeRO {train.deepspeed.zero_stage}",
            remedy=f"Set {section}.float32_products=false.",
        )


def _indivisible(section: str, train: Train, groups: int) -> UserError:
    per_group, rest = divmod(train.global_batch, groups)
    shared = train.sequence_parallel
    if rest == 0:
        remedy = _set_to(f"{section}.micro_batch", _divisors(per_group)[-3:])
    else:
        nearest = max(1, round(train.global_batch / groups)) * groups
        remedy = f"Set {section}.global_batch={nearest} or another launch.processes."
    return UserError(
        setting=f"{section}.global_batch",
        value=train.global_batch,
        rule=f"it must be a multiple of {groups} {'process(es)' if shared == 1 else f'group(s) of {shared} processes'} "
        f"times micro_batch={train.micro_batch}",
        remedy=remedy,
    )


def validate_data(section: str, train: Train, data_dir: Path, model_dir: Path) -> None:
    """Checks that the token blocks can train this model.

    Raises:
        UserError: a split is empty, no token is a target, or the tokenizer has more tokens than the model.
    """
    data = read_json(data_dir / "dataset.json")
    source = "data.corpus" if data["purpose"] == "corpus" else "data.instructions"
    for split, needed in (("train", True), ("held_out", bool(train.evaluate_at))):  # tokenize checks the others
        if needed and data["blocks"][split] == 0:
            raise UserError(
                setting=source,
                value=f"0 blocks of {data['sequence_length']} tokens in the {split} split",
                rule=f"{section} needs at least one block",
                remedy="Provide more data, or set data.held_out_fraction so that both splits get some.",
            )
    if data["supervised_tokens"]["train"] == 0:
        raise UserError(
            setting=source,
            value="0 supervised tokens",
            rule="the loss needs targets: documents of at least two tokens, or assistant turns",
            remedy=f"Check the data and data.chat_template. Dropped documents: {data['dropped']}.",
        )
    config = read_json(model_dir / "config.json")
    vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
    if data["vocab_size"] > vocabulary:
        raise UserError(
            setting="model.path",
            value=f"a tokenizer with {data['vocab_size']} tokens",
            rule=f"the model's vocabulary has only {vocabulary}",
            remedy="Use the tokenizer that was trained with the model.",
        )


def validate_corpus(section: str, train: Train, corpus_dir: Path) -> None:
    """Checks that the corpus that is mixed in fills at least one sequence.

    Raises:
        UserError: it does not.
    """
    data = read_json(corpus_dir / "dataset.json")
    tokens = data["blocks"]["train"] * data["sequence_length"]
    if tokens < train.sequence_length:
        raise UserError(
            setting=f"{section}.corpus_fraction",
            value=train.corpus_fraction,
            rule=f"data.corpus has {tokens} training tokens, and a sequence has {train.sequence_length}",
            remedy=f"Provide more data, or set {section}.corpus_fraction=0.0.",
        )
