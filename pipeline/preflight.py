"""What would fail is said now: every check that needs no weights, before anything expensive starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.architecture import architecture_of
from pipeline.artifact import Fingerprints
from pipeline.config import EvaluateOnTheWay, Settings, Target
from pipeline.data import sources
from pipeline.errors import UserError
from pipeline.evaluation.catalogue import validate as validate_evaluation
from pipeline.expansion.layer_plan import validate as validate_expansion
from pipeline.graph import Inputs, Node
from pipeline.shape import shape_of
from pipeline.source import ModelSource, config_of
from pipeline.training.job import kept_model
from pipeline.training.validate import validate as validate_training

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FREE_SPACE_MARGIN = 512 * 2**20  # corpora, logs, reports


def check_output(run: Settings) -> None:
    """The output directory can be made and written.

    Raises:
        UserError: it cannot.
    """
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


def identify(run: Settings, source: ModelSource) -> Inputs:
    """The content identity of everything that comes from outside."""
    fingerprints = Fingerprints(Path(run.output_dir) / "artifacts" / "fingerprints.json")
    return Inputs(
        model=source.identity or fingerprints.of_files(source.files),
        corpus=sources.fingerprint(run.data.corpus, "corpus", fingerprints),
        instructions=sources.fingerprint(run.data.instructions, "instructions", fingerprints),
        interpreter=sources.interpreter_fingerprint(),
    )


def check(run: Settings, source: ModelSource, missing: Mapping[str, Node]) -> None:
    """Checks what the missing stages will need.

    Raises:
        UserError: the first thing that cannot work, with its remedy.
    """
    stages = {node.stage for node in missing.values()}
    if not stages:
        return
    config = config_of(source)
    architecture_of(config["model_type"])  # a family that is not in the table is refused before it is loaded
    validate_expansion(run.expand, config["num_hidden_layers"])
    if "pretrain" in stages:
        validate_training("pretrain", run.pretrain, run.launch, config.get("max_position_embeddings"))
    if "sft" in stages:
        validate_training("sft", run.sft, run.launch, config.get("max_position_embeddings"))
    if "evaluate" in stages:
        validate_evaluation(run.evaluate)
        _check_kept(missing)
    if "tokenize/corpus" in missing:
        sources.check_source(run.data.corpus, "corpus")
    if "tokenize/instructions" in missing:
        sources.check_source(run.data.instructions, "instructions")
        _check_chat_template(run, config)
    _check_login(run)
    _check_disk(run, config, stages)


def _check_kept(missing: Mapping[str, Node]) -> None:
    """A model on the way can be scored where training is still to come, or kept it."""
    for node in missing.values():
        if not isinstance(node.settings, EvaluateOnTheWay):
            continue
        trained, target = node.parents["model"], Target(node.parents["model"].stage, node.settings.fraction)
        if trained.name not in missing and not kept_model(trained.artifact.path, node.settings.fraction).is_dir():
            raise UserError(
                setting="evaluate.targets",
                value=target,
                rule=f"{trained.name} is finished and did not keep its model there",
                remedy=f"Leave it out, or train again with force=[{trained.name}].",
            )


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
    """Every model stage writes the model once; training keeps checkpoints of what trains beside it."""
    shape = shape_of(config)
    deeper = shape.with_layers(shape.num_hidden_layers + run.expand.new_layers)
    width = BYTES[run.model.dtype]
    need = shape.parameters * width if "load" in stages else 0
    need += deeper.parameters * width * len(stages & {"expand", "pretrain", "sft"})
    if stages & {"pretrain", "sft"}:
        trained = run.expand.new_layers * shape.per_layer or deeper.parameters
        need += (
            max(run.pretrain.keep_checkpoints, run.sft.keep_checkpoints) * trained * 12
        )  # float32 master weight and two moments
        kept = len(run.pretrain.keep_at) + len(run.sft.keep_at) + len(run.evaluate.on_the_way())
        need += kept * trained * width
    free = shutil.disk_usage(run.output_dir).free
    if free < need + FREE_SPACE_MARGIN:
        raise UserError(
            setting="output_dir",
            value=run.output_dir,
            rule=f"{_gib(need + FREE_SPACE_MARGIN)} are needed there and {_gib(free)} are free",
            remedy="Free some space, or say output_dir=DIRECTORY on a larger disk.",
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
