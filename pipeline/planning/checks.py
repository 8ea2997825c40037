"""The list of checks to pass before anything starts. ``run`` and ``submit`` refuse what it finds, ``plan`` prints it.

No check reads weights: of the model, only its config and the headers of its weight files are read.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from os.path import isdir, islink, lexists
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts.fingerprints import FINGERPRINTS_FILE
from pipeline.artifacts.store import is_artifact
from pipeline.config import STAGE_NAMES, EvaluateSnapshot, Target, Train
from pipeline.config.data import Purpose
from pipeline.config.execution import GPUS
from pipeline.config.untuned import tuning_requests
from pipeline.data import sources
from pipeline.data.templates import check_template, default_template
from pipeline.driver.graph import UNKNOWN, Node
from pipeline.driver.notify import notification
from pipeline.driver.run import is_linked, keys_recorded, package_versions
from pipeline.driver.submit import slurm_dir
from pipeline.errors import UserError
from pipeline.estimates import memory_of, usable, what_fits
from pipeline.files import free_bytes, gib, insufficient_space, may_write, nearest_existing, no_access, read_json
from pipeline.launch.environment import code_cache_faults, other_nodes_fault
from pipeline.launch.machine import evaluation_processes, requested_placement
from pipeline.launch.slurm import current_allocation, job_of
from pipeline.models.families import check_stored, family_for, shape_of
from pipeline.models.quantization import FP8, block_size, check_quantization, is_fp8, scales_of, without_scales
from pipeline.models.source import ModelSource, chat_template_of, check_shape, refuse_code
from pipeline.models.weight_files import Headers, read_headers
from pipeline.planning.prepared import PreparedRun, attempt, unwritable
from pipeline.planning.training import plan_training
from pipeline.trackers import login_fault, not_installed, wandb_mode
from pipeline.training.attention_support import attention_faults
from pipeline.training.job import snapshot_dir
from pipeline.training.rates import requested_multiples
from pipeline.training.selection import no_matrix_error
from pipeline.training.validate import context_length_faults, shared_model_faults, training_faults

NOTHING_FITS = "Use more devices (launch.processes, launch.nodes) or larger ones: no other setting makes it fit."
Faults = Iterator[UserError]
Need = Literal["config", "shape", "sizes", "corpus", "instructions", "forgetting"]


@dataclass(frozen=True)
class Check:
    """One row of the list.

    Attributes:
        faults: yields an error for everything that the check finds wrong.
        stops: nodes that cannot be built if the check fails, or stages for all of their nodes. The check is skipped if
            none of these is missing.
        needs: what must be known of the inputs. The check is skipped if it is not, since another one says why.
        always: the check is made even if nothing is missing.
    """

    faults: Callable[[PreparedRun], Faults]
    stops: tuple[str, ...]
    needs: Need | None = None
    always: bool = False


@dataclass(frozen=True)
class Blocker:
    """Something that would stop a run, and the nodes or stages that could not be built."""

    fault: UserError
    stops: tuple[str, ...]


def find_blockers(prepared: PreparedRun, checks: Sequence[Check] | None = None) -> Iterator[Blocker]:
    """Goes through the checks of what is missing, in order.

    Args:
        checks: a part of the list; None for all of it.
    """
    missing = {*prepared.missing, *(node.stage for node in prepared.missing.values())}
    for check in CHECKS if checks is None else checks:
        if (check.always or not missing.isdisjoint(check.stops)) and _is_known(prepared, check.needs):
            for fault in check.faults(prepared):
                yield Blocker(fault, check.stops)


def _is_known(prepared: PreparedRun, need: Need | None) -> bool:
    match need:
        case None:
            return True
        case "config":
            return bool(prepared.inputs.config)
        case "shape":
            return prepared.shape is not None
        case "sizes":
            return prepared.sizes is not None
        case "corpus" | "instructions" | "forgetting":
            return need not in prepared.inputs.failures


def refuse_blocked(prepared: PreparedRun, checks: Sequence[Check] | None = None) -> None:
    """Raises the first thing that would stop a run.

    Raises:
        UserError: a check found something wrong.
        RuntimeError: all checks pass, and yet an input of the run is not known. Its artifact would have the same key
            whatever that input contains.
    """
    for blocker in find_blockers(prepared, checks):
        raise blocker.fault
    if checks is None:
        for node in prepared.selected.values():
            if UNKNOWN in node.inputs.values():
                raise RuntimeError(f"an input of {node.name} was not looked up; this is an error of the pipeline")


def _raised_by(function: Callable[[], object]) -> Faults:
    _, error = attempt(function)
    if error is not None:
        yield error


# ---------------------------------------------------------------------------------------- model and expansion


def _input(name: str, prepared: PreparedRun) -> Faults:
    if name in prepared.inputs.failures:
        yield prepared.inputs.failures[name]


def _model(prepared: PreparedRun) -> Faults:
    model, config = prepared.run.model, prepared.inputs.config
    yield from _raised_by(lambda: refuse_code(model, config))
    yield from _raised_by(lambda: check_quantization(config, model))
    yield from _raised_by(lambda: check_shape(model, config))
    unsupported = list(_raised_by(lambda: family_for(config)))
    yield from unsupported or _raised_by(lambda: shape_of(config))


def _weights(prepared: PreparedRun) -> Faults:
    """The weight files on this machine are complete, and hold the tensors of the config's model."""
    source, config = prepared.inputs.source, prepared.inputs.config
    if source is None or (directory := source.directory) is None or source.gguf_file is not None:
        return
    headers, fault = attempt(lambda: read_headers(directory))
    if fault is not None:
        yield fault
    if headers is not None and prepared.shape is not None:
        yield from _raised_by(lambda: _check_headers(config, headers, prepared.run.model.path))


def _check_headers(config: Mapping[str, Any], headers: Headers, where: str) -> None:
    entries = {name: entry for tensors, _ in headers.values() for name, entry in tensors.items()}
    shapes = {name: entry.shape for name, entry in entries.items()}
    if is_fp8(config):
        scales_of([name for name in entries if entries[name].dtype == FP8], shapes, block_size(config), where)
    check_stored(config, {name: shapes[name] for name in without_scales(shapes, config)}, where)


def _layers(prepared: PreparedRun) -> Faults:
    """The method can make layers like those of the base."""
    shape = prepared.shape
    assert shape is not None
    yield from _raised_by(lambda: prepared.expansion.check_layers(shape))


def _expansion(prepared: PreparedRun) -> Faults:
    assert prepared.shape is not None
    depth = len(prepared.shape.layers)
    yield from _raised_by(lambda: prepared.expansion.check(depth))


def _expansion_memory(prepared: PreparedRun) -> Faults:
    """By estimate, the method's linear algebra fits the GPU that ``launch.device`` names."""
    needed, gpu = prepared.expansion_memory, prepared.expansion_gpu
    if needed is not None and gpu is not None and needed > usable(gpu):
        device = prepared.run.launch.device
        yield UserError(
            setting="expand.device",
            value=prepared.run.expand.device,
            rule=f"the expansion needs about {gib(needed)} of GPU memory, and {device} has {gib(usable(gpu))} "
            "available",
            remedy="Set expand.device=cpu.",
        )


# ------------------------------------------------------------------------------------------------------- data


def _data(purpose: Purpose, prepared: PreparedRun) -> Faults:
    data = prepared.run.data
    several = getattr(data, purpose) or []
    yield from _raised_by(lambda: sources.check_sources(several, purpose, data.max_record_bytes))


def _tuning(prepared: PreparedRun) -> Faults:
    """Nothing that needs conversations is requested of a run without them."""
    for setting, value in tuning_requests(prepared.run):
        yield UserError(
            setting=setting,
            value=value,
            rule="it needs conversations, and data.instructions=null leaves out instruction tuning",
            remedy="Leave it out of the command, or set data.instructions to conversations.",
        )


def _block_length(section: str, prepared: PreparedRun) -> Faults:
    yield from context_length_faults(section, getattr(prepared.run, section), prepared.context_length)


def _chat_template(prepared: PreparedRun) -> Faults:
    """The model's chat template exists and renders conversations, as far as can be told without its tokenizer."""
    source = prepared.inputs.source
    if prepared.run.data.chat_template != "model" or source is None:
        return
    if source.gguf_file is not None:  # its template is in the file, and is read with the tokenizer
        if not prepared.inputs.config.get("has_chat_template", True):
            yield from _raised_by(lambda: default_template(None))
        return
    yield from _raised_by(lambda: _check_template(source, prepared))


def _check_template(source: ModelSource, prepared: PreparedRun) -> None:
    template, tokens = chat_template_of(source, keep=not prepared.run.is_read_only)
    data = prepared.run.data
    readable = "instructions" not in prepared.inputs.failures
    first = sources.first_conversations(data.instructions or [], data.max_record_bytes) if readable else {}
    check_template(default_template(template), tokens, first, folds=data.system_messages == "fold")


# --------------------------------------------------------------------------------------------------- training


def _training(section: str, prepared: PreparedRun) -> Faults:
    run, context = prepared.run, prepared.context_length
    machine, submitted = prepared.machine(section), run.action == "submit"
    yield from training_faults(section, getattr(run, section), run.launch, context, machine, submitted)


def _shared_sequences(section: str, prepared: PreparedRun) -> Faults:
    """Ranks can share the sequences of this model, if they are to."""
    assert prepared.shape is not None
    yield from shared_model_faults(section, getattr(prepared.run, section), prepared.shape, prepared.language_config)


def _attention(section: str, prepared: PreparedRun) -> Faults:
    """The attention that the settings ask for can compute this model on the device."""
    run = prepared.run
    device = requested_placement(run.launch, prepared.machine(section)).device
    yield from attention_faults(section, getattr(run, section), prepared.language_config, device)


def _corpus_share(prepared: PreparedRun) -> Faults:
    """Only sft mixes blocks of the corpus into its own data."""
    if prepared.run.pretrain.corpus_fraction:
        yield UserError(
            setting="pretrain.corpus_fraction",
            value=prepared.run.pretrain.corpus_fraction,
            rule="pretrain trains on the corpus alone",
            remedy="Set pretrain.corpus_fraction=0.0, or give the corpus several sources with weights.",
        )


def _trainable(section: str, prepared: PreparedRun) -> Faults:
    """``trainable`` selects something, and nothing that cannot be trained. All learning rates apply to something."""
    sizes, train = prepared.sizes, getattr(prepared.run, section)
    assert sizes is not None
    if sizes.base.not_trained:
        yield UserError(
            setting=section,
            value=prepared.run.model.path,
            rule=f"the training stages cannot train this model: {sizes.base.not_trained}",
            remedy="Set stages=[expand], and train the expanded model with another program.",
        )
    trained, error = attempt(lambda: sizes.trained(section, train))
    if error is not None:
        yield error
    if trained is None:
        return
    config, layers = prepared.language_config, {name: layer for name, layer, _ in trained.shape.tensors()}
    yield from _raised_by(
        lambda: requested_multiples(
            section, train, family_for(config), config, layers, trained.names, trained.at_learning_rate
        )
    )
    roles = map(family_for(config).role_of, trained.names)
    if train.router_aux_loss and not any(role is not None and role.name == "router" for role in roles):
        yield UserError(
            setting=f"{section}.router_aux_loss",
            value=train.router_aux_loss,
            rule="it balances the routers of mixtures of experts, and no router trains",
            remedy=f"Set {section}.router_aux_loss=null, or change {section}.trainable.",
        )
    if train.uses_muon and not any(trained.updated_by_muon(train.optimizer)):
        yield no_matrix_error(section, train.optimizer)


def _memory(section: str, prepared: PreparedRun) -> Faults:
    """By estimate, training fits the GPU that ``launch.device`` names."""
    device = prepared.run.launch.device
    trained, gpu = prepared.trained(section), GPUS.get(device)
    if trained is None or gpu is None or not prepared.has_valid_overrides(section):
        return
    setup, available = prepared.setup(section), usable(gpu.memory_gib * 2**30)
    needed = memory_of(trained, setup).total
    if needed > available:
        fits = what_fits(section, trained, setup, available)
        yield UserError(
            setting=f"{section}.micro_batch",
            value=setup.train.micro_batch,
            rule=f"training needs about {gib(needed)} per device, and {device} has {gib(available)} available",
            remedy=f"Set {fits}." if fits else NOTHING_FITS,
        )


def _signal(section: str, prepared: PreparedRun) -> Faults:
    """By estimate, a batch job that Slurm is about to end has time to save."""
    if prepared.run.action != "submit":  # a plan shows it beside the hours, since it may be of a run without Slurm
        return
    plan, signal_seconds = plan_training(prepared, section), prepared.run.slurm.signal_seconds
    if plan is None or plan.stop_seconds <= signal_seconds:
        return
    wanted = math.ceil(plan.stop_seconds / 60 + 1) * 60
    slurm = prepared.run.slurm.model_copy(update={"signal_seconds": wanted})
    stages = dict.fromkeys(node.stage for node in prepared.missing.values())
    short = [f"slurm.{stage}.time" for stage in stages if not slurm.has_time_to_start(stage)]
    longer = f", and {', '.join(short)} to more than {slurm.least_time_seconds // 60} minutes" if short else ""
    yield UserError(
        setting="slurm.signal_seconds",
        value=signal_seconds,
        rule=f"{section} takes about {plan.stop_seconds:.0f} seconds to finish a step, a checkpoint that is being "
        f"written and the last one ({gib(plan.checkpoint_bytes)} each), and Slurm would kill it before",
        remedy=f"Set slurm.signal_seconds={wanted}{longer}.",
    )


# ------------------------------------------------------------------------------------------------- evaluation


def _snapshots(prepared: PreparedRun) -> Faults:
    """Snapshots can be scored if their training stage is still to run, or has saved them."""
    for node in prepared.missing.values():
        if not isinstance(node.settings, EvaluateSnapshot):
            continue
        stage, fraction = node.parents["model"], node.settings.fraction
        if stage.name not in prepared.missing:
            yield from _saved_at(stage, fraction, "evaluate.targets", Target(stage.stage, fraction))


def _saved_snapshots(prepared: PreparedRun) -> Faults:
    """A finished training stage has saved the snapshots that ``snapshot_at`` asks for."""
    for name, node in prepared.selected.items():
        if name in prepared.missing or not isinstance(node.settings, Train):
            continue
        for fraction in getattr(prepared.run, node.stage).snapshot_at:
            yield from _saved_at(node, fraction, f"{node.stage}.snapshot_at", fraction)


def _saved_at(finished: Node, fraction: float, setting: str, value: object) -> Faults:
    """A finished training stage has saved the snapshot at a fraction of its steps, which a setting asks for."""
    if not snapshot_dir(finished.artifact.path, fraction).is_dir():
        yield UserError(
            setting=setting,
            value=value,
            rule=f"{finished.name} is finished and saved no snapshot there",
            remedy=f"Leave it out, or train again with force=[{finished.name}].",
        )


def _rescored(prepared: PreparedRun) -> Faults:
    """The expanded model was itself scored if ``rescore`` is set and its evaluation is finished."""
    name = Target("expand").role
    if not prepared.run.evaluate.rescore or name not in prepared.selected or name in prepared.missing:
        return
    other = read_json(prepared.selected[name].artifact.path / "evaluation.json").get("scores_of")
    if other is not None:
        yield UserError(
            setting="evaluate.rescore",
            value="true",
            rule=f"{name} is finished with the scores of {other}, which has the same logits",
            remedy="Leave it out, or score again with force=[evaluate].",
        )


def _evaluation_processes(prepared: PreparedRun) -> Faults:
    """The machine has a GPU for every model that is to be scored at the same time."""
    run = prepared.run
    yield from _raised_by(lambda: evaluation_processes(run.evaluate, run.launch, prepared.machine("evaluate")))


def _backend(prepared: PreparedRun) -> Faults:
    """vLLM is installed and made for the device, if it is to generate answers."""
    run = prepared.run
    if run.evaluate.backend != "vllm":
        return
    version, rule = package_versions().get("vllm"), None
    if version is None:
        rule = f"vLLM is to generate answers, and is not installed for {sys.executable}"
    elif requested_placement(run.launch, prepared.machine("evaluate")).device == "cpu" and "cpu" not in version:
        rule = f"this build of vLLM ({version}) needs a GPU"
    if rule is not None:
        remedy = "Install one (pip install vllm; it requires a torch of its own), or set evaluate.backend=hf."
        yield UserError(setting="evaluate.backend", value="vllm", rule=rule, remedy=remedy)


def _saved(prepared: PreparedRun) -> Faults:
    """Every training stage whose model a later stage reads saves it."""
    for node in prepared.missing.values():
        parent = node.parents.get("model")
        if parent is not None and isinstance(parent.settings, Train) and not parent.settings.save_model:
            yield UserError(
                setting=f"{parent.stage}.save_model",
                value="false",
                rule=f"{node.name} needs the model",
                remedy=f"Set {parent.stage}.save_model=true, or stages=[{parent.stage}].",
            )
            return


# --------------------------------------------------------------------------------------------------- run-wide


def _force(prepared: PreparedRun) -> Faults:
    """What ``force`` names is among what the command builds."""
    chosen, existing = ({node.stage for node in nodes.values()} for nodes in (prepared.selected, prepared.nodes))
    # A sweep also builds a report on all of its jobs.
    ignored = [stage for stage in prepared.run.force if stage in existing - chosen and stage != "report"]
    if ignored:
        yield UserError(
            setting="force",
            value=", ".join(ignored),
            rule="only the chosen stages and those that they depend on are built, so this would have no effect",
            remedy=f"Leave it out, or add it to stages=[{','.join(prepared.run.stages)}].",
        )


def _packages(prepared: PreparedRun) -> Faults:
    """The packages whose versions are recorded are installed."""
    yield from _raised_by(package_versions)


def _allocation(prepared: PreparedRun) -> Faults:
    """The nodes of the Slurm job that this process runs in can be used."""
    _, fault = attempt(current_allocation)
    if fault is not None and prepared.run.action != "submit":
        yield fault


def _nodes(prepared: PreparedRun) -> Faults:
    """This process is not one of several nodes, unless Slurm has started them."""
    if prepared.run.action == "submit" or job_of(os.environ) is not None:
        return
    if (fault := other_nodes_fault(os.environ)) is not None:
        yield fault


def _output_dir(prepared: PreparedRun) -> Faults:
    if (fault := unwritable(prepared.run.output_dir)) is not None:
        yield fault


def _code_caches(prepared: PreparedRun) -> Faults:
    """The directories of compiled code that every process needs can be created."""
    yield from code_cache_faults(os.environ, needed=False)


def _access(prepared: PreparedRun) -> Faults:
    """This user may write where something is to be created, and read what it is made from."""
    run, selected, missing = prepared.run, prepared.selected, prepared.missing
    root = Path(run.output_dir).absolute() / "artifacts"
    places = [directory for node in missing.values() for directory in _written(node)]
    if missing:
        places += [root, root / FINGERPRINTS_FILE]
    if missing or not keys_recorded(run, selected) or not all(is_linked(run, node) for node in selected.values()):
        places += [(root.parent / run.name / name).parent for name in selected]
    if missing and run.action == "submit":
        places.append(slurm_dir(run))
    unwritable = (place for path in places if not may_write(place := nearest_existing(path)))
    read = [path for name, node in selected.items() if name not in missing for path in node.artifact.path.rglob("*")]
    unreadable = (path for path in read if not os.access(path, os.R_OK))
    if (fault := next(chain(unwritable, unreadable), None)) is not None:
        yield no_access(fault)


def _written(node: Node) -> Iterator[Path]:
    """What building an artifact writes to: its directory's parent, its lock, and files of earlier attempts."""
    yield node.artifact.path.parent
    yield node.artifact.lock().directory
    yield node.artifact.partial
    yield from node.artifact.partial.rglob("*")


def _places(prepared: PreparedRun) -> Faults:
    """The links to the run's artifacts can be created: no artifact, other run or file is in their place."""
    output_dir = Path(prepared.run.output_dir).absolute()
    artifact = next((place for place in (output_dir, *output_dir.parents) if is_artifact(place.resolve())), None)
    if artifact is not None:
        yield UserError(
            setting="output_dir",
            value=prepared.run.output_dir,
            rule=f"{artifact} is a finished artifact, and nothing may be added to it",
            remedy="Set output_dir=DIRECTORY to another directory.",
        )
    for node in prepared.selected:
        place = output_dir / prepared.run.name / node
        within = [parent for parent in reversed(place.parents) if parent.is_relative_to(output_dir / ".")][1:]
        # The functions of os.path, unlike pathlib's, raise no errors if another user's directory may not be entered.
        taken = [path for path in within if islink(path) or (lexists(path) and not isdir(path))]
        if taken or (lexists(place) and not islink(place)):
            yield UserError(
                setting="name",
                value=prepared.run.name,
                rule=f"the result of {node} is linked as {place}, but {(*taken, place)[0]} is something else",
                remedy="Set name=NAME to another name.",
            )
            return


def _login(prepared: PreparedRun) -> Faults:
    mode, error = attempt(lambda: wandb_mode(prepared.run.tracking))
    fault = login_fault(os.environ) if mode == "online" else error
    if fault is not None:
        yield fault


def _tracker(prepared: PreparedRun) -> Faults:
    """The client of the tracker is installed, and the command of ``tracking.notify`` exists."""
    tracking = prepared.run.tracking
    if (fault := not_installed(tracking)) is not None:
        yield fault
    if tracking.notify is not None:
        yield from _raised_by(lambda: notification(tracking.notify or ""))


def _disk(prepared: PreparedRun) -> Faults:
    needed, free = prepared.disk_needed().total, free_bytes(prepared.run.output_dir)
    if free < needed:
        yield insufficient_space(prepared.run.output_dir, f"{gib(needed)} are needed there and {gib(free)} are free")


# What was looked up comes first: without it, most other checks cannot say anything.
INPUT_CHECKS = (
    Check(partial(_input, "model"), stops=("load",)),
    Check(partial(_input, "corpus"), stops=("tokenize/corpus",)),
    Check(partial(_input, "forgetting"), stops=("tokenize/corpus",)),
    Check(partial(_input, "instructions"), stops=("tokenize/instructions",)),
    Check(partial(_input, "evaluate"), stops=("evaluate",)),
    Check(_tuning, stops=STAGE_NAMES, always=True),
)
CHECKS = (
    Check(_output_dir, stops=STAGE_NAMES),
    Check(_packages, stops=STAGE_NAMES),
    Check(_allocation, stops=STAGE_NAMES),
    Check(_nodes, stops=("pretrain", "sft")),
    Check(_access, stops=STAGE_NAMES, always=True),
    Check(_code_caches, stops=STAGE_NAMES),
    Check(_places, stops=STAGE_NAMES, always=True),
    *INPUT_CHECKS,
    Check(_force, stops=STAGE_NAMES, always=True),
    Check(_model, stops=("load",), needs="config"),
    Check(_weights, stops=("load",)),
    Check(_expansion, stops=("expand",), needs="shape"),
    Check(_layers, stops=("expand",), needs="shape"),
    Check(_expansion_memory, stops=("expand",), needs="sizes"),
    Check(partial(_trainable, "pretrain"), stops=("pretrain",), needs="sizes"),
    Check(partial(_trainable, "sft"), stops=("sft",), needs="sizes"),
    Check(partial(_training, "pretrain"), stops=("pretrain",)),
    Check(partial(_training, "sft"), stops=("sft",)),
    Check(partial(_shared_sequences, "pretrain"), stops=("pretrain",), needs="shape"),
    Check(partial(_shared_sequences, "sft"), stops=("sft",), needs="shape"),
    Check(partial(_attention, "pretrain"), stops=("pretrain",), needs="shape"),
    Check(partial(_attention, "sft"), stops=("sft",), needs="shape"),
    Check(_corpus_share, stops=("pretrain",)),
    Check(partial(_memory, "pretrain"), stops=("pretrain",), needs="sizes"),
    Check(partial(_memory, "sft"), stops=("sft",), needs="sizes"),
    Check(partial(_signal, "pretrain"), stops=("pretrain",), needs="sizes"),
    Check(partial(_signal, "sft"), stops=("sft",), needs="sizes"),
    Check(_snapshots, stops=("evaluate",)),
    Check(_saved_snapshots, stops=("pretrain", "sft"), always=True),
    Check(_rescored, stops=("evaluate",), always=True),
    Check(_evaluation_processes, stops=("evaluate",)),
    Check(_backend, stops=("evaluate",)),
    Check(_saved, stops=("sft", "evaluate")),
    Check(partial(_block_length, "pretrain"), stops=("tokenize/corpus",), needs="shape"),
    Check(partial(_data, "corpus"), stops=("tokenize/corpus",), needs="corpus"),
    Check(partial(_data, "forgetting"), stops=("tokenize/corpus",), needs="forgetting"),
    Check(partial(_block_length, "sft"), stops=("tokenize/instructions",), needs="shape"),
    Check(partial(_data, "instructions"), stops=("tokenize/instructions",), needs="instructions"),
    Check(_chat_template, stops=("tokenize/instructions",), needs="shape"),
    Check(_login, stops=STAGE_NAMES),
    Check(_tracker, stops=STAGE_NAMES),
    Check(_disk, stops=STAGE_NAMES, needs="sizes"),
)
