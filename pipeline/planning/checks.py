"""What would fail is said now: every check that needs no weights, before anything expensive starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts.store import Fingerprints
from pipeline.config import EvaluateSnapshot, Settings, Target, Train
from pipeline.data import python_docs, sources
from pipeline.driver.graph import Inputs, Node
from pipeline.errors import UserError
from pipeline.estimates import Disk, TrainingOutputs, disk_of, sizes_of
from pipeline.evaluation.catalogue import fingerprint_tasks
from pipeline.evaluation.catalogue import validate as validate_evaluation
from pipeline.expansion.method import method_of
from pipeline.expansion.methods import module_fingerprint
from pipeline.files import free_bytes, gib, insufficient_space
from pipeline.launch.machine import Machine, detect_machine
from pipeline.models.families import family_of, shape_of
from pipeline.models.source import ModelSource, check_shape, config_of
from pipeline.models.weight_files import read_headers, refuse_quantized
from pipeline.training.job import snapshot_dir
from pipeline.training.selection import stored_apart
from pipeline.training.validate import validate as validate_training
from pipeline.training.validate import validate_length


def check_output(run: Settings) -> None:
    """The output directory can be made and written, where the command is to write.

    Raises:
        UserError: it cannot.
    """
    if run.only_looks:
        return
    place = Path(run.output_dir)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(place, error.strerror or "it cannot be made") from error
    check_writable(run)


def check_writable(run: Settings) -> None:
    """The output directory, or where it is to be made, can be written.

    Raises:
        UserError: it cannot.
    """
    place = _existing(Path(run.output_dir))
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise _unwritable(place, "it cannot be written")


def _existing(place: Path) -> Path:
    """The place, or what of its path there is."""
    place = place.absolute()
    return place if place.exists() else _existing(place.parent)


def _unwritable(place: Path, why: str) -> UserError:
    return UserError(
        setting="output_dir",
        value=place,
        rule=f"results must be written there: {why.lower()}",
        remedy="Say output_dir=DIRECTORY with one you may write to.",
    )


def pin_data(run: Settings) -> Settings:
    """The run with its hub data sets' revisions resolved: what a branch stands for now is what will be read.

    Where nothing will be read, data that cannot be had are no obstacle.

    Raises:
        UserError: the hub cannot be reached, or has no such data set or revision.
    """
    if not run.reads_data:
        return run
    corpus, instructions = run.data.corpus, run.data.instructions
    pinned = {
        "corpus": sources.pin_sources(corpus, "corpus"),
        "instructions": sources.pin_sources(instructions, "instructions"),
    }
    return run.model_copy(update={"data": run.data.model_copy(update=pinned)})


def identify(run: Settings, source: ModelSource) -> Inputs:
    """The content identity of everything that comes from outside; data that no chosen stage reads have none."""
    fingerprints = Fingerprints(Path(run.output_dir) / "artifacts" / "fingerprints.json", writes=not run.only_looks)
    data = {
        name: sources.fingerprint_sources(getattr(run.data, name), name, fingerprints) if run.reads_data else ""
        for name in ("corpus", "instructions")
    }
    return Inputs(
        model=source.identity or fingerprints.of_files(source.files),
        **data,
        interpreter=python_docs.interpreter_fingerprint(),
        tasks=fingerprint_tasks(run.evaluate, fingerprints) if run.scores_models else {},
        method=None if run.expand.module is None else module_fingerprint(run.expand.module),
    )


Check = Callable[[], None]
MachineOf = Callable[[str], Machine]


def here(stage: str) -> Machine:
    """Every stage runs on this machine, or on the nodes of the Slurm job around this process."""
    return detect_machine()


def check(run: Settings, source: ModelSource, missing: Mapping[str, Node], machine_of: MachineOf = here) -> None:
    """Checks what the missing stages will need.

    Args:
        machine_of: where a stage will run; this machine, or the nodes of the Slurm job around this process.

    Raises:
        UserError: the first thing that cannot work, with its remedy.
    """
    if not missing:
        return
    for each in checks(run, config_of(source), missing, machine_of).values():
        each()
    if "load" in missing and source.directory is not None and source.gguf_file is None:
        read_headers(source.directory)  # weights that lie on this machine are whole


def checks(
    run: Settings, config: Mapping[str, Any], missing: Mapping[str, Node], machine_of: MachineOf = here
) -> dict[str, Check]:
    """What the missing stages will need, each by what it looks at; every one raises a UserError where it fails.

    Args:
        config: the model's.
        machine_of: where a stage will run.
    """
    context, stages = config.get("max_position_embeddings"), {node.stage for node in missing.values()}
    found: dict[str, Check] = {
        "model": lambda: _check_model(run, config),
        "expand": lambda: method_of(run.expand).check(config["num_hidden_layers"]),
        "experts": lambda: _check_experts(run, config, missing),
    }
    if "pretrain" in stages:
        found["pretrain"] = lambda: validate_training(
            "pretrain", run.pretrain, run.launch, context, machine_of("pretrain")
        )
    if "sft" in stages:
        found["sft"] = lambda: validate_training("sft", run.sft, run.launch, context, machine_of("sft"))
    if "evaluate" in stages:
        found["evaluate"] = lambda: validate_evaluation(run.evaluate)
        found["snapshots"] = lambda: _check_snapshots(missing)
    if "tokenize/corpus" in missing:
        found["corpus_length"] = lambda: validate_length("pretrain", run.pretrain, context)
        found["corpus"] = lambda: sources.check_sources(run.data.corpus, "corpus")
    if "tokenize/instructions" in missing:
        found["instructions_length"] = lambda: validate_length("sft", run.sft, context)
        found["instructions"] = lambda: sources.check_sources(run.data.instructions, "instructions")
        found["chat_template"] = lambda: _check_chat_template(run, config)
    found["login"] = lambda: _check_login(run)
    found["disk"] = lambda: check_disk(run, disk_needed(run, config, missing))
    return found


def _check_model(run: Settings, config: Mapping[str, Any]) -> None:
    refuse_quantized(config, run.model.path)
    family_of(config.get("model_type"))  # a family that is not in the table is refused before it is loaded
    check_shape(run.model, config)


def _check_experts(run: Settings, config: Mapping[str, Any], missing: Mapping[str, Node]) -> None:
    """Nothing trains that loading puts together from tensors of single experts."""
    if not config.get("experts_apart", False):
        return
    sizes = sizes_of(run.expand, shape_of(config))
    for name, train in _training(missing).items():
        part = sizes.trained(name, train)
        if experts := sorted(tensor for tensor in part.names if tensor in sizes.grown.experts):
            raise stored_apart(name, experts[0])


def _training(missing: Mapping[str, Node]) -> dict[str, Train]:
    """The settings of the missing stages that train."""
    return {name: node.settings for name, node in missing.items() if isinstance(node.settings, Train)}


def _check_snapshots(missing: Mapping[str, Node]) -> None:
    """A snapshot can be scored if its training stage is still to run, or has saved it."""
    for node in missing.values():
        if not isinstance(node.settings, EvaluateSnapshot):
            continue
        trained, target = node.parents["model"], Target(node.parents["model"].stage, node.settings.fraction)
        if trained.name not in missing and not snapshot_dir(trained.artifact.path, node.settings.fraction).is_dir():
            raise UserError(
                setting="evaluate.targets",
                value=target,
                rule=f"{trained.name} is finished and saved no snapshot there",
                remedy=f"Leave it out, or train again with force=[{trained.name}].",
            )


def _check_chat_template(run: Settings, config: Mapping[str, Any]) -> None:
    if run.data.chat_template == "model" and not config.get("has_chat_template", True):
        raise UserError(
            setting="data.chat_template",
            value="model",
            rule=f"{run.model.path} carries no chat template, and instruction tuning needs one",
            remedy="Say data.chat_template=plain for a plain-text template that needs no new tokens.",
        )


def _check_login(run: Settings) -> None:
    if run.tracking.wandb != "online" or os.environ.get("WANDB_API_KEY"):
        return
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not (netrc.exists() and "wandb" in netrc.read_text()):
        raise UserError(
            setting="tracking.wandb",
            value="online",
            rule="there is no W&B login",
            remedy="Run 'wandb login' or set WANDB_API_KEY; or say tracking=offline and sync later.",
        )


def disk_needed(run: Settings, config: Mapping[str, Any], missing: Mapping[str, Node]) -> Disk:
    """What the missing stages will write.

    Raises:
        UserError: the model cannot be expanded so, or nothing of it would train.
    """
    sizes = sizes_of(run.expand, shape_of(config))
    trained = {
        name: TrainingOutputs(sizes.trained(name, train).parameters, train.keep_checkpoints, len(train.snapshot_at))
        for name, train in _training(missing).items()
    }
    return disk_of(
        {name: node.stage for name, node in missing.items()},
        sizes.base,
        sizes.grown,
        run.model.dtype,
        trained,
        {"tokenize/corpus": run.data.max_corpus_tokens or 0},
        method_of(run.expand).scratch_bytes(sizes.base) if "expand" in missing else 0,
    )


def check_disk(run: Settings, disk: Disk) -> None:
    """There is room for what will be written.

    Raises:
        UserError: there is not.
    """
    free = free_bytes(_existing(Path(run.output_dir)))
    if free < disk.total:
        raise insufficient_space(run.output_dir, f"{gib(disk.total)} are needed there and {gib(free)} are free")
