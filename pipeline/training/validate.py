"""What can be refused before any worker starts. No torch, no weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Launch, Train
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.launch.machine import Machine, place, requested_placement
from pipeline.models.families import role_names
from pipeline.training.selection import NAMED_CHOICES, trainable_pattern


def training_faults(
    section: str, train: Train, launch: Launch, context_length: int | None, machine: Machine
) -> Iterator[UserError]:
    """Yield everything that is wrong with one training section.

    Args:
        section: "pretrain" or "sft", for the messages.
        context_length: the longest sequence that the model accepts, in tokens; None if its config does not say.
        machine: where the stage will run.
    """
    try:
        placement = place(launch, machine)
    except UserError as error:
        yield error
        placement = requested_placement(launch, machine)
    yield from context_length_faults(section, train, context_length)
    if train.global_batch % (placement.ranks * train.micro_batch):
        yield _indivisible(section, train, placement.ranks)
    if train.deepspeed.offload_parameters and train.deepspeed.zero_stage != 3:
        yield UserError(
            setting=f"{section}.deepspeed.offload_parameters",
            value="true",
            rule=f"only ZeRO 3 can offload parameters, and zero_stage is {train.deepspeed.zero_stage}",
            remedy=f"Say {section}.deepspeed.zero_stage=3, or offload_parameters=false.",
        )
    if train.deepspeed.offload_optimizer and train.deepspeed.zero_stage == 0:
        yield UserError(
            setting=f"{section}.deepspeed.offload_optimizer",
            value="true",
            rule="the optimizer can be offloaded from ZeRO 1 on, and zero_stage is 0",
            remedy=f"Say {section}.deepspeed.zero_stage=2, or offload_optimizer=false.",
        )
    if train.trainable not in NAMED_CHOICES:
        try:
            trainable_pattern(section, train.trainable)
        except UserError as error:
            yield error
    yield from _unknown_roles(section, train)
    yield from _compilation(section, train, placement.device)
    yield from _products(section, train, placement.device)


def context_length_faults(section: str, train: Train, context_length: int | None) -> Iterator[UserError]:
    """Yield an error if token blocks would be longer than the model's context, which tokenize must know too."""
    if context_length is not None and train.sequence_length > context_length:
        yield UserError(
            setting=f"{section}.sequence_length",
            value=train.sequence_length,
            rule=f"the model's context is {context_length} tokens",
            remedy=f"Say {section}.sequence_length={context_length} or less.",
        )


def _unknown_roles(section: str, train: Train) -> Iterator[UserError]:
    known = role_names()
    unknown = sorted(set(train.role_learning_rates) - known)
    if unknown:
        yield UserError(
            setting=f"{section}.role_learning_rates",
            value=", ".join(unknown),
            rule=f"roles are {', '.join(sorted(known))}",
            remedy=f"For example '{section}.role_learning_rates={{o: 2.0, down: 2.0}}', in quotes.",
        )


def less_memory(section: str, train: Train, processes: int) -> str:
    """What needs less memory and is not set yet. None of it changes the numbers."""
    smaller = [size for size in range(1, train.micro_batch) if train.global_batch % (processes * size) == 0]
    deepspeed = train.deepspeed
    wanted = {
        f"micro_batch={smaller[-1] if smaller else 1}": bool(smaller),
        "activation_checkpointing=true": not train.activation_checkpointing,
        "deepspeed.zero_stage=3": processes > 1 and deepspeed.zero_stage < 3 and not train.compile,
        "deepspeed.offload_optimizer=true": deepspeed.zero_stage > 0 and not deepspeed.offload_optimizer,
        "deepspeed.offload_parameters=true": deepspeed.zero_stage == 3 and not deepspeed.offload_parameters,
    }
    settings = [f"{section}.{setting}" for setting, helps in wanted.items() if helps]
    if not settings:
        return f"All that spares memory is set; use more processes or a shorter {section}.sequence_length."
    return f"Less is needed with {', '.join(settings)}; the same command with one of these goes on where it stood."


def _compilation(section: str, train: Train, device: str) -> Iterator[UserError]:
    if not train.compile:
        return
    if train.deepspeed.zero_stage == 3:
        yield UserError(
            setting=f"{section}.compile",
            value="true",
            rule="ZeRO 3 gathers parameters in hooks that compiled layers do not have, and zero_stage is 3",
            remedy=f"Say {section}.compile=false, or {section}.deepspeed.zero_stage=2.",
        )
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        yield UserError(
            setting=f"{section}.compile",
            value="true",
            rule=f"torch.compile needs a C++ compiler on the CPU, and {compiler} is not there",
            remedy=f"Install g++, set CXX to a compiler, or say {section}.compile=false.",
        )


def _products(section: str, train: Train, device: str) -> Iterator[UserError]:
    if train.float32_products and (device != "cpu" or train.deepspeed.zero_stage not in (1, 2)):
        yield UserError(
            setting=f"{section}.float32_products",
            value="true",
            rule=f"it is for CPUs at ZeRO 1 and 2; this is {device} at ZeRO {train.deepspeed.zero_stage}",
            remedy=f"Say {section}.float32_products=false.",
        )


def _indivisible(section: str, train: Train, processes: int) -> UserError:
    share, rest = divmod(train.global_batch, processes)
    fits = [size for size in range(1, share + 1) if share % size == 0] if rest == 0 else []
    if fits:
        remedy = f"Say {section}.micro_batch=" + " or ".join(str(size) for size in fits[-3:]) + "."
    else:
        near = max(1, round(train.global_batch / processes)) * processes
        remedy = f"Say {section}.global_batch={near}, or another launch.processes."
    return UserError(
        setting=f"{section}.global_batch",
        value=train.global_batch,
        rule=f"{processes} process(es) with micro_batch {train.micro_batch} must divide it",
        remedy=remedy,
    )


def validate_data(section: str, train: Train, data_dir: Path, model_dir: Path) -> None:
    """Refuses token blocks that cannot train this model.

    Raises:
        UserError: an empty split, nothing to learn from, or tokens that the model does not know.
    """
    data = read_json(data_dir / "dataset.json")
    source = "data.corpus" if data["purpose"] == "corpus" else "data.instructions"
    for split, needed in (("train", True), ("held_out", bool(train.evaluate_at))):
        if needed and data["blocks"][split] == 0:
            raise UserError(
                setting=source,
                value=f"0 blocks of {data['sequence_length']} tokens in the {split} split",
                rule=f"{section} needs at least one",
                remedy="Give more data, or set data.held_out_fraction so that both splits get some.",
            )
    if data["supervised_tokens"]["train"] == 0:
        raise UserError(
            setting=source,
            value="0 supervised tokens",
            rule="the loss needs tokens to predict: documents of two tokens or more, or assistant turns",
            remedy=f"Check the data and data.chat_template; dropped so far: {data['dropped']}.",
        )
    config = read_json(model_dir / "config.json")
    vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
    if data["vocab_size"] > vocabulary:
        raise UserError(
            setting="model.path",
            value=f"a tokenizer of {data['vocab_size']} tokens",
            rule=f"the model's vocabulary has {vocabulary}",
            remedy="Use the tokenizer that belongs to the model.",
        )
