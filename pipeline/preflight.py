"""What would fail is said now: every check that needs no weights, before anything expensive starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.architecture import architecture_of
from pipeline.artifact import Fingerprints
from pipeline.config import Settings
from pipeline.data import sources
from pipeline.disk import free_bytes, no_room
from pipeline.errors import UserError
from pipeline.evaluation.catalogue import validate as validate_evaluation
from pipeline.expansion.layer_plan import validate as validate_expansion
from pipeline.graph import Inputs, Node
from pipeline.machine import Machine, detect_machine
from pipeline.shape import shape_of
from pipeline.source import ModelSource, config_of
from pipeline.training.validate import validate as validate_training
from pipeline.weight_files import read_headers, refuse_quantised

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FREE_SPACE_MARGIN = 512 * 2**20  # corpora, logs, reports


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
    if not os.access(place, os.W_OK | os.X_OK):
        raise _unwritable(place, "it cannot be written")


def _unwritable(place: Path, why: str) -> UserError:
    return UserError(
        setting="output_dir",
        value=place,
        rule=f"results must be written there: {why.lower()}",
        remedy="Say output_dir=DIRECTORY with one you may write to.",
    )


def pin_data(run: Settings) -> Settings:
    """The run with its hub data sets' revisions resolved: what a branch stands for now is what will be read.

    Raises:
        UserError: the hub cannot be reached, or has no such data set or revision.
    """
    corpus, instructions = run.data.corpus, run.data.instructions
    pinned = {"corpus": sources.pin(corpus, "corpus"), "instructions": sources.pin(instructions, "instructions")}
    return run.model_copy(update={"data": run.data.model_copy(update=pinned)})


def identify(run: Settings, source: ModelSource) -> Inputs:
    """The content identity of everything that comes from outside."""
    fingerprints = Fingerprints(Path(run.output_dir) / "artifacts" / "fingerprints.json", writes=not run.only_looks)
    return Inputs(
        model=source.identity or fingerprints.of_files(source.files),
        corpus=sources.fingerprint(run.data.corpus, "corpus", fingerprints),
        instructions=sources.fingerprint(run.data.instructions, "instructions", fingerprints),
        interpreter=sources.interpreter_fingerprint(),
    )


def check(
    run: Settings,
    source: ModelSource,
    missing: Mapping[str, Node],
    machine_of: Callable[[str], Machine] = lambda stage: detect_machine(),
) -> None:
    """Checks what the missing stages will need.

    Args:
        machine_of: where a stage will run; this machine, or the nodes of the Slurm job around this process.

    Raises:
        UserError: the first thing that cannot work, with its remedy.
    """
    stages = {node.stage for node in missing.values()}
    if not stages:
        return
    config = config_of(source)
    if "load" in stages:
        _check_weights(source, config)
    architecture_of(config["model_type"])  # a family that is not in the table is refused before it is loaded
    validate_expansion(run.expand, config["num_hidden_layers"])
    if "pretrain" in stages:
        context = config.get("max_position_embeddings")
        validate_training("pretrain", run.pretrain, run.launch, context, machine_of("pretrain"))
    if "sft" in stages:
        context = config.get("max_position_embeddings")
        validate_training("sft", run.sft, run.launch, context, machine_of("sft"))
    if "evaluate" in stages:
        validate_evaluation(run.evaluate)
    if "tokenize/corpus" in missing:
        sources.check(run.data.corpus, "corpus")
    if "tokenize/instructions" in missing:
        sources.check(run.data.instructions, "instructions")
        _check_chat_template(run, config)
    _check_login(run)
    _check_disk(run, config, stages)


def _check_weights(source: ModelSource, config: Mapping[str, object]) -> None:
    """The weights are plain, and those that lie on this machine are whole."""
    refuse_quantised(config, source.repo or source.directory)
    if source.directory is not None and source.gguf_file is None:
        read_headers(source.directory)


def _check_chat_template(run: Settings, config: Mapping[str, object]) -> None:
    if run.data.chat_template == "model" and not config.get("has_chat_template"):
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


def _check_disk(run: Settings, config: Mapping[str, int], stages: set[str]) -> None:
    """Every model stage writes the model once; training keeps two checkpoints of what trains beside it."""
    shape = shape_of(config)
    deeper = shape.with_layers(shape.num_hidden_layers + run.expand.new_layers)
    width = BYTES[run.model.dtype]
    need = shape.parameters * width if "load" in stages else 0
    need += deeper.parameters * width * len(stages & {"expand", "pretrain", "sft"})
    if stages & {"pretrain", "sft"}:
        trained = run.expand.new_layers * shape.per_layer or deeper.parameters
        need += 2 * trained * 12  # float32 master weight and two moments
    free = free_bytes(_existing(Path(run.output_dir)))
    if free < need + FREE_SPACE_MARGIN:
        raise no_room(run.output_dir, f"{_gib(need + FREE_SPACE_MARGIN)} are needed there and {_gib(free)} are free")


def _existing(place: Path) -> Path:
    """The place, or what of its path is there already."""
    return place if place.exists() else _existing(place.absolute().parent)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
