"""Looks up what a run reads from outside: the model, the data, and what identifies their contents.

The Hub is asked about everything at once, so that the answer takes no longer than the slowest of its parts. What
cannot be looked up is recorded rather than raised, so that ``action=plan`` can list it among everything else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.artifacts.fingerprints import FINGERPRINTS_FILE, Fingerprints, RememberedFingerprints
from pipeline.config import Data, Model, Settings, Source, Train
from pipeline.config.data import PURPOSES
from pipeline.config.execution import GPUS
from pipeline.data import python_docs, sources
from pipeline.driver.graph import UNKNOWN, Inputs, Node, build_graph, select_nodes
from pipeline.driver.run import Rebuild, missing_nodes
from pipeline.errors import UserError
from pipeline.estimates import Disk, Setup, Sizes, Trained, TrainingOutputs, disk_of, setup_of, sizes_of
from pipeline.evaluation.catalogue import fingerprint_tasks, validate_evaluation
from pipeline.expansion.layer_plan import recorded_gaps
from pipeline.expansion.method import Method, method_of
from pipeline.expansion.methods import module_fingerprint
from pipeline.files import let_group_write, nearest_existing, no_access, read_json
from pipeline.launch.machine import Machine, detect_machine, requested_placement
from pipeline.models import hub
from pipeline.models.checkpoint_dtype import elements_in, resolve_dtype
from pipeline.models.config_json import is_nested
from pipeline.models.families import Shape, family_for, inner_config, shape_of
from pipeline.models.source import ModelSource, config_of, resolve
from pipeline.training.deepspeed_config import override_faults

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class FoundInputs:
    """What was found of a run's inputs.

    Attributes:
        model, data: the run's settings, with branches and tags resolved to commits, and the checkpoint's own dtype.
        source: where the model is; None if it was not found.
        config: the model's config, or the entries of ``model.shape``; empty if neither is known.
        config_from: the origin of ``config``, for the user.
        identities: what identifies the contents; ``UNKNOWN`` for an input that was not found.
        failures: why an input cannot be used: ``model``, ``corpus``, ``instructions`` or ``evaluate``.
    """

    model: Model
    data: Data
    source: ModelSource | None
    config: Mapping[str, Any]
    config_from: str
    identities: Inputs
    failures: Mapping[str, UserError]


@dataclass(frozen=True)
class PreparedRun:
    """A run with its inputs looked up and its graph built: what the checks and the plan are made from."""

    run: Settings
    inputs: FoundInputs = field(repr=False)
    nodes: Mapping[str, Node] = field(repr=False)

    @cached_property
    def selected(self) -> dict[str, Node]:
        """The nodes of the chosen stages and all that these depend on."""
        return select_nodes(self.nodes, self.run.stages)

    @cached_property
    def missing(self) -> dict[str, Node]:
        """The nodes that would be built now."""
        return missing_nodes(self.run, self.nodes)

    @cached_property
    def shape(self) -> Shape | None:
        """The tensors of the base model; None if its config is not known or its family is not supported.

        Of a model that reads images, they are those of its language model, by their names in training.
        """
        return attempt(lambda: shape_of(self.language_config))[0] if self.inputs.config else None

    @property
    def language_config(self) -> Mapping[str, Any]:
        """The config of the language model that is trained, which of a multimodal model is a part of its config."""
        return inner_config(self.inputs.config)

    @cached_property
    def outer_parameters(self) -> int:
        """The number of a multimodal model's parameters outside its language model; 0 for others, or if not known."""
        source = self.inputs.source
        if source is None or self.shape is None or not is_nested(self.inputs.config):
            return 0
        directory = source.directory
        elements = source.elements if directory is None else attempt(lambda: elements_in(directory))[0]
        return max(0, sum((elements or {}).values()) - self.shape.parameters)

    @property
    def context_length(self) -> int | None:
        """The most tokens that the base model can read; None if that is not known or not limited."""
        if self.shape is None:
            return None
        return family_for(self.language_config).with_defaults(self.language_config).get("max_position_embeddings")

    @cached_property
    def sizes(self) -> Sizes | None:
        """The models before and after expansion; None if the base is not known or cannot be expanded as asked."""
        shape = self.shape
        return None if shape is None else attempt(lambda: sizes_of(self.expansion, shape))[0]

    @property
    def expansion(self) -> Method:
        """The method, with the gaps that a finished expansion found by ranking the layers."""
        method, node = method_of(self.run.expansion), self.nodes.get("expand")  # a batch job has only what it needs
        if method.ranked_position is None or node is None or not node.artifact.is_complete():
            return method
        return method.with_gaps(recorded_gaps(read_json(node.artifact.path / "expansion.json")))

    @property
    def expansion_gpu(self) -> int | None:
        """All memory in bytes of the GPU on which the method would compute; None if that is a CPU or not known."""
        method, gpu = method_of(self.run.expansion), GPUS.get(self.run.launch.device)
        without = self.run.action == "submit" and self.machine("expand").gpus == 0
        if gpu is None or not method.uses_gpu or method.device == "cpu" or without:
            return None
        return int(gpu.memory_gib * 2**30)

    @property
    def expansion_memory(self) -> int | None:
        """The estimated peak memory in bytes on ``expansion_gpu``; None if there is no such GPU or no estimate."""
        sizes, gpu = self.sizes, self.expansion_gpu
        return None if sizes is None or gpu is None else sizes.method.gpu_bytes(sizes.base, gpu)

    @property
    def training(self) -> dict[str, Train]:
        """The settings of the training stages that would run."""
        return {name: node.settings for name, node in self.missing.items() if isinstance(node.settings, Train)}

    def trained(self, stage: str) -> Trained | None:
        """Which parameters a training stage trains; None if that is not known or would be none."""
        sizes, train = self.sizes, getattr(self.run, stage)
        return None if sizes is None else attempt(lambda: sizes.trained(stage, train))[0]

    def disk_needed(self, nodes: Sequence[str] | None = None) -> Disk:
        """Estimates the disk space that the missing nodes take. The sizes of the models must be known.

        Args:
            nodes: only these; None for all that are missing.
        """
        sizes = self.sizes
        assert sizes is not None
        chosen = {name: node.stage for name, node in self.missing.items() if nodes is None or name in nodes}
        outputs = {
            stage: TrainingOutputs(
                trained.parameters,
                train.keep_checkpoints,
                len(train.snapshot_at),
                train.ema_decay is not None,
                train.save_model,
            )
            for stage, train in self.training.items()
            if stage in chosen and (trained := self.trained(stage)) is not None
        }
        scratch = sizes.method.scratch_bytes(sizes.base, self.expansion_gpu) if "expand" in chosen else 0
        tokens = {"tokenize/corpus": self.run.data.max_corpus_tokens or 0}
        dtype = self.run.model.dtype
        return disk_of(chosen, sizes.base, sizes.grown, dtype, outputs, tokens, scratch, self.outer_parameters)

    def has_valid_overrides(self, stage: str) -> bool:
        """Whether the stage's ``deepspeed.overrides`` have no fault, so that estimates can read them."""
        return next(override_faults(stage, getattr(self.run, stage).deepspeed.overrides), None) is None

    def machine(self, stage: str) -> Machine:
        """Where a stage would run: on the nodes that its batch job asks for, or on those around this process."""
        if self.run.action == "submit":
            resources = self.run.slurm.resources(stage)
            return Machine(cores=resources.cpus, gpus=resources.gpus, nodes=resources.nodes)
        machine = detect_machine()
        return replace(machine, nodes=self.run.launch.nodes) if self.run.action == "plan" else machine

    def setup(self, stage: str) -> Setup:
        """How a training stage would be placed on its machine."""
        return setup_of(getattr(self.run, stage), requested_placement(self.run.launch, self.machine(stage)))


def prepare(runs: Sequence[Settings]) -> list[PreparedRun]:
    """Looks up the inputs of every job of a command and builds its graph. What jobs share is looked up once.

    If the same command was interrupted after it had begun to rebuild what ``force`` names, it continues, and the
    prepared runs have no ``force``.

    Raises:
        UserError: ``output_dir`` cannot be written, and the command would write to it.
    """
    found: dict[str, FoundInputs] = {}
    prepared = []
    for run in runs:
        # Everything that decides what is looked up. Which stages read data depends on the method's settings as well.
        parts = (run.model, run.data, run.evaluate)
        decisive = [run.stages, run.reads_data, run.expand.module, *(part.model_dump_json() for part in parts)]
        shared = json.dumps(decisive)
        if shared not in found:
            if run.group_writable:
                let_group_write()
            if not run.is_read_only:
                _create_output_dir(run)
            found[shared] = _look_up(run)
        prepared.append(with_inputs(run, found[shared]))
    rebuild = Rebuild.of([(each.run, each.nodes) for each in prepared])
    if rebuild is not None and rebuild.is_interrupted():
        return [without_force(each) for each in prepared]
    return prepared


def without_force(prepared: PreparedRun) -> PreparedRun:
    """Returns the run that builds only what is missing, once the rebuild that ``force`` asks for has begun."""
    return replace(prepared, run=prepared.run.model_copy(update={"force": []}))


def with_inputs(run: Settings, inputs: FoundInputs) -> PreparedRun:
    """Builds the graph of a run that reads ``inputs``, which were looked up for it or for another run."""
    run = run.model_copy(update={"model": inputs.model, "data": inputs.data})
    prepared = PreparedRun(run, inputs, build_graph(run, inputs.identities))
    source = inputs.source
    if inputs.config or source is None or run.is_read_only or not prepared.missing:
        return prepared
    # The config of a GGUF file on the Hub is inside that file. Fetch it only now that something is to be built.
    config, failure = attempt(lambda: config_of(source))
    failures = {**inputs.failures, **({} if failure is None else {"model": failure})}
    return replace(prepared, inputs=replace(inputs, config=config or {}, failures=failures))


# ----------------------------------------------------------------------------------------- output directory


def _create_output_dir(run: Settings) -> None:
    if (fault := unwritable(run.output_dir)) is not None:
        raise fault
    try:
        Path(run.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(run.output_dir, error.strerror or "it cannot be created") from error


def unwritable(output_dir: str) -> UserError | None:
    """Checks that a directory can be written, or created if it does not exist. Changes nothing."""
    place = nearest_existing(Path(output_dir))
    if not place.is_dir():
        return _unwritable(output_dir, f"{place} is not a directory")
    return None if os.access(place, os.W_OK | os.X_OK) else no_access(place)


def _unwritable(output_dir: str, why: str) -> UserError:
    return UserError(
        setting="output_dir",
        value=output_dir,
        rule=f"results are written to this directory, but {why[0].lower()}{why[1:]}",
        remedy="Set output_dir=DIRECTORY to one that you can write to.",
    )


# -------------------------------------------------------------------------------------------------- inputs


def _look_up(run: Settings) -> FoundInputs:
    """Looks up everything that the chosen stages read, all at once."""
    only_keys = run.only_names_artifacts
    find_model = _find_source if only_keys else _find_source_and_config
    asked: dict[str, Callable[[], Any]] = {"model": lambda: find_model(run)}
    if run.reads_data:
        texts = {purpose: getattr(run.data, purpose) for purpose in PURPOSES}
        asked |= {
            purpose: partial(sources.pin_sources, several, purpose)
            for purpose, several in texts.items()
            if several is not None
        }
    if run.scores_models and not only_keys:
        asked["evaluate"] = lambda: validate_evaluation(run.evaluate)
    with ThreadPoolExecutor() as pool:
        answers = dict(zip(asked, pool.map(attempt, asked.values()), strict=True))
    failures = {name: failure for name, (_, failure) in answers.items() if failure is not None}

    found: _FoundModel = answers["model"][0] or _FoundModel(None)
    if found.failure is not None:
        failures["model"] = found.failure
    model, source = run.model, found.source
    if source is not None and source.commit is not None:
        model = model.model_copy(update={"revision": source.commit})
    if source is not None:
        settled, failure = attempt(lambda: resolve_dtype(model, source))
        model = settled or model
        if failure is not None:
            failures.setdefault("model", failure)
    pinned: dict[str, Any] = {name: answers[name][0] for name in PURPOSES if name in asked and name not in failures}
    data = run.data.model_copy(update=pinned)
    config, config_from = (found.config, _place(source)) if found.config and source else _fallback_config(run.model)
    return FoundInputs(model, data, source, config, config_from, _identify(run, source, pinned, failures), failures)


def _identify(
    run: Settings, source: ModelSource | None, pinned: Mapping[str, list[Source]], failures: dict[str, UserError]
) -> Inputs:
    """Identifies the contents of what was found, and records in ``failures`` what cannot be read."""
    memo = Path(run.output_dir) / "artifacts" / FINGERPRINTS_FILE
    # A plan reads no file only to hash it.
    fingerprints = (
        RememberedFingerprints(memo) if run.action == "plan" else Fingerprints(memo, writes=not run.is_read_only)
    )
    # One after another, because all of them update the same file of remembered fingerprints.
    texts = [purpose for purpose in PURPOSES if getattr(run.data, purpose) is not None]
    identities: dict[str, Any] = {"instructions": None, **dict.fromkeys(("model", *texts), UNKNOWN)}
    if source is not None:
        identities["model"] = source.identity or fingerprints.of_files(source.files)
    for purpose in PURPOSES:
        if purpose in pinned:
            identify = partial(sources.fingerprint_sources, pinned[purpose], purpose, fingerprints)
            identity, failure = attempt(identify)
            identities[purpose] = identity or UNKNOWN
            if failure is not None:
                failures[purpose] = failure
    tasks: Mapping[str, str] | None = {}
    if run.scores_models:
        tasks, failure = attempt(lambda: fingerprint_tasks(run.evaluate, fingerprints))
        if failure is not None:
            failures.setdefault("evaluate", failure)
    return Inputs(
        **identities,
        interpreter=python_docs.interpreter_fingerprint(),
        tasks=dict.fromkeys(run.evaluate.tasks, UNKNOWN) if tasks is None else tasks,
        method=None if run.expand.module is None else module_fingerprint(run.expand.module),
    )


@dataclass(frozen=True)
class _FoundModel:
    source: ModelSource | None
    config: Mapping[str, Any] = field(default_factory=dict)
    failure: UserError | None = None  # of reading the config


def _find_source(run: Settings) -> _FoundModel:
    return _FoundModel(resolve(run.model))


def _find_source_and_config(run: Settings) -> _FoundModel:
    source = resolve(run.model)
    if source.gguf_file is not None and source.directory is None:
        return _FoundModel(source)  # its config is inside the file, which would have to be downloaded
    config, failure = attempt(lambda: config_of(source, keep=not run.is_read_only))
    return _FoundModel(source, config or {}, failure)


def _place(source: ModelSource) -> str:
    return f"the config in {source.directory or f'{source.repo} on the Hub'}"


def _fallback_config(model: Model) -> tuple[Mapping[str, Any], str]:
    """The config of a model that cannot be read: from the Hub's cache, or else from ``model.shape``."""
    cached = hub.cached_file(model.path, model.revision, "config.json") if hub.is_repo_id(model.path) else None
    if cached is not None and model.gguf_file is None:
        return json.loads(cached.read_text()), "the config in the Hub's cache"
    if model.shape is not None:
        return model.shape, "model.shape, since its config cannot be read"
    return {}, "nowhere"


def attempt(function: Callable[[], _Result]) -> tuple[_Result | None, UserError | None]:
    """The result of a function, or the ``UserError`` that it raised."""
    try:
        return function(), None
    except UserError as error:
        return None, error
