"""The graph of a run's artifacts: the stages, the dependencies between them, and the key of every artifact.

    load ──▶ expand ──▶ pretrain ──▶ sft ──▶ report
      │         │           │          │        ▲
      │      tokenize ──────┴──────────┘        │
      └─────────┴───────────┴──────────┴─▶ evaluate

If layers are ranked on training text, ``expand`` depends on ``tokenize`` as well, and ``sft`` on both datasets if
``corpus_fraction`` is set. With ``data.instructions=null``, there are neither conversations to tokenize nor ``sft``.

Nothing is read or built here, and no expansion method is known by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipeline.artifacts.store import Artifact, make_key
from pipeline.artifacts.task import ANSWERS, ANSWERS_FOLDER, SAME_LOGITS
from pipeline.config import (
    Answers,
    Evaluate,
    EvaluateSnapshot,
    Report,
    Section,
    Settings,
    Source,
    Target,
    Tokenize,
    Train,
)


@dataclass(frozen=True)
class Stage:
    """What a stage's artifacts depend on besides settings, parents and inputs, and where it runs."""

    version: int  # to be increased when the same settings would give a different artifact
    files: tuple[str, ...]  # patterns of the files that every artifact of the stage contains
    own_process: bool = True  # False: the stage starts workers itself, from the driver's process


_MODEL = ("config.json", "model*.safetensors")
_METRICS = ("metrics.jsonl", "training.json")
_TRAINED = (*_MODEL, "expansion.json", *_METRICS)
_BLOCKS = tuple(
    f"{split}.{array}.npy" for split in ("train", "held_out") for array in ("input_ids", "position_ids", "loss_mask")
)

STAGES: dict[str, Stage] = {
    "load": Stage(version=1, files=_MODEL),
    "expand": Stage(version=1, files=(*_MODEL, "expansion.json")),
    "tokenize": Stage(version=3, files=("dataset.json", "held_out.jsonl", *_BLOCKS)),
    "pretrain": Stage(version=2, files=_TRAINED, own_process=False),
    "sft": Stage(version=2, files=_TRAINED, own_process=False),
    "evaluate": Stage(version=2, files=("evaluation.json", "tasks/*.json")),
    "report": Stage(version=2, files=("results.json", "report.md", "report.html")),
}


UNKNOWN = "unknown"  # identifies an input that was not looked up or not found; no artifact may be made from it


@dataclass(frozen=True)
class Inputs:
    """What identifies the contents of a run's external inputs."""

    model: str
    corpus: str
    instructions: str | None  # None: the run has none
    forgetting: str | None = field(default=None, kw_only=True)
    interpreter: str  # bundled questions are generated from this Python's documentation
    tasks: Mapping[str, str] = field(default_factory=dict)  # custom tasks of evaluate.tasks: name -> content
    method: str | None = None  # the source code of expand.module


@dataclass(frozen=True)
class Node:
    """An artifact of a run, which may or may not exist yet.

    ``reuses`` are artifacts with results that are also this one's. They save time if they exist when it is built, and
    change nothing else, so they are not in the key. ``inputs`` identify the contents of what is read from outside.
    """

    name: str  # "load", "tokenize/corpus", "evaluate/sft"
    stage: str
    settings: Section
    parents: Mapping[str, Node] = field(repr=False)  # role -> node
    seed: int
    artifact: Artifact
    reuses: Mapping[str, Node] = field(default_factory=dict, repr=False)  # role -> node
    inputs: Mapping[str, str] = field(default_factory=dict, repr=False)  # name -> identity, or UNKNOWN


def expected_files(node: Node) -> tuple[str, ...]:
    """Returns patterns of the files that an artifact contains."""
    if isinstance(node.settings, Train) and not node.settings.save_model:
        return _METRICS
    if isinstance(node.settings, Answers):
        return (f"{ANSWERS_FOLDER}/*.json",)
    return STAGES[node.stage].files


class _Builder:
    """Collects nodes, parents first."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.nodes: dict[str, Node] = {}

    def add(self, name: str, settings: Section, parents: Mapping[str, str], **inputs: str) -> None:
        """Adds a node. ``parents`` maps each role to the name of an earlier node."""
        stage = name.partition("/")[0]
        nodes = {role: self.nodes[parent] for role, parent in parents.items()}
        self.nodes[name] = make_node(self._settings, name, STAGES[stage], settings, nodes, inputs)


def make_node(
    run: Settings, name: str, stage: Stage, settings: Section, parents: Mapping[str, Node], inputs: Mapping[str, str]
) -> Node:
    """Creates a node and works out its key."""
    stage_name = name.partition("/")[0]
    seed = run.seed if settings.draws_random_numbers else 0
    key = make_key(
        stage_name,
        stage.version,
        {**settings.key_settings(), "seed": seed},
        {role: node.artifact.key for role, node in parents.items()},
        inputs,
    )
    artifact = Artifact(Path(run.output_dir) / "artifacts", stage_name, key)
    return Node(name, stage_name, settings, parents, seed, artifact, inputs=inputs)


def build_graph(run: Settings, inputs: Inputs) -> dict[str, Node]:
    """Creates all nodes of a run, parents first. ``evaluate.targets`` decides which models are scored."""
    graph = _Builder(run)
    graph.add("load", run.model, {}, model=inputs.model)
    if run.expansion.ranked_position is None:
        _add_expand(graph, run, inputs, {"load": "load"})
    texts = {"corpus": inputs.corpus} | ({} if inputs.forgetting is None else {"forgetting": inputs.forgetting})
    graph.add("tokenize/corpus", _corpus_settings(run), {"load": "load"}, **texts)
    if run.expansion.ranked_position is not None:
        _add_expand(graph, run, inputs, {"load": "load", "data": "tokenize/corpus"})
    conversations = _instruction_settings(run)
    if conversations is not None:
        assert inputs.instructions is not None, "looked up if the run has them"
        graph.add("tokenize/instructions", conversations, {"load": "load"}, instructions=inputs.instructions)
    graph.add("pretrain", _with_snapshots(run, "pretrain"), {"model": "expand", "data": "tokenize/corpus"})
    if conversations is not None:
        parents = {"model": "pretrain", "data": "tokenize/instructions"}
        corpus_too = {"corpus": "tokenize/corpus"} if run.sft.corpus_fraction else {}
        graph.add("sft", _with_snapshots(run, "sft"), {**parents, **corpus_too})
    own_tasks = {f"task/{name}": content for name, content in inputs.tasks.items()}
    # The checks refuse a target whose stage the run lacks.
    scored = [target for target in run.evaluate.models() if target.stage in graph.nodes]
    for target in sorted(scored, key=lambda target: target.order):
        parents = {"model": target.stage, "corpus": "tokenize/corpus"}
        graph.add(target.role, _evaluate_settings(run, target), parents, interpreter=inputs.interpreter, **own_tasks)
    base, expanded = (graph.nodes.get(Target(stage).role) for stage in ("load", "expand"))
    if base and expanded and run.expansion.keeps_logits and not run.evaluate.rescore:
        graph.nodes[expanded.name] = replace(expanded, reuses={SAME_LOGITS: base})
    models = {target.stage: target.stage for target in scored if target.fraction is None}
    if run.evaluate.sample_answers and models and conversations is not None:
        # Not part of the scores, so that the base is not scored again when the conversations change.
        parents = {**models, "conversations": "tokenize/instructions"}
        graph.add(ANSWERS, Answers(questions=run.evaluate.sample_answers), parents)
    report = make_report(run, [(run, graph.nodes)])
    graph.nodes["report"] = report
    return graph.nodes


def _add_expand(graph: _Builder, run: Settings, inputs: Inputs, parents: Mapping[str, str]) -> None:
    method = {} if inputs.method is None else {"method": inputs.method}
    graph.add("expand", run.expansion, parents, **method)


def make_report(first: Settings, runs: Iterable[tuple[Settings, Mapping[str, Node]]]) -> Node:
    """Creates the node of a report on one run, or on all runs of a sweep.

    Args:
        first: the settings that the report's artifact is stored by.
        runs: the settings and the nodes of every run.
    """
    runs = list(runs)
    settings = Report(runs={run.name: run.expand.method for run, _ in runs})
    parents = {
        f"{run.name}:{name}": node
        for run, nodes in runs
        for name, node in nodes.items()
        if node.stage != "report"
    }  # fmt: skip
    return make_node(first, "report", STAGES["report"], settings, parents, {})


def _corpus_settings(run: Settings) -> Tokenize:
    """Collects the settings that matter to the corpus from ``data`` and ``pretrain``."""
    return Tokenize(
        purpose="corpus",
        sources=_weighted(run.data.corpus),
        sequence_length=run.pretrain.sequence_length,
        # They are read one after another, so that their weights do not matter.
        forgetting=run.data.forgetting and [s.model_copy(update={"weight": 1.0}) for s in run.data.forgetting],
        held_out_fraction=run.data.held_out_fraction,
        validation_fraction=run.data.validation_fraction,
        max_tokens=run.data.max_corpus_tokens,
        max_forgetting_tokens=run.data.max_forgetting_tokens if run.data.forgetting is not None else None,
        chat_template=None,
        system_messages="keep",
        max_dropped=run.data.max_dropped,
        max_record_bytes=run.data.max_record_bytes,
    )


def _instruction_settings(run: Settings) -> Tokenize | None:
    """Collects the settings that matter to the conversations from ``data`` and ``sft``; None if there are none."""
    if run.data.instructions is None:
        return None
    return Tokenize(
        purpose="instructions",
        sources=_weighted(run.data.instructions),
        sequence_length=run.sft.sequence_length,
        forgetting=None,
        held_out_fraction=run.data.held_out_fraction,
        validation_fraction=run.data.validation_fraction,
        max_tokens=None,
        max_forgetting_tokens=None,
        chat_template=run.data.chat_template,
        system_messages=run.data.system_messages,
        max_dropped=run.data.max_dropped,
        max_record_bytes=run.data.max_record_bytes,
    )


def _weighted(sources: list[Source]) -> list[Source]:
    """The sources for the key, in which the weight of a single source does not matter."""
    return sources if len(sources) > 1 else [sources[0].model_copy(update={"weight": 1.0})]


def _with_snapshots(run: Settings, stage: Literal["pretrain", "sft"]) -> Train:
    """The training section, saving also the snapshots that ``evaluate.targets`` asks for."""
    train: Train = getattr(run, stage)
    return train.with_snapshots_at(
        t.fraction for t in run.evaluate.models() if t.stage == stage and t.fraction is not None
    )


def _evaluate_settings(run: Settings, target: Target) -> Evaluate:
    if target.fraction is None:
        return run.evaluate
    return EvaluateSnapshot(**run.evaluate.model_dump(), fraction=target.fraction)


def select_nodes(nodes: Mapping[str, Node], stages: Iterable[str]) -> dict[str, Node]:
    """Selects the nodes of some stages and all that these depend on, in order."""
    chosen = set(stages)
    wanted = lineage(node for node in nodes.values() if node.stage in chosen)
    return {name: node for name, node in nodes.items() if node.artifact.key in wanted}


def lineage(nodes: Iterable[Node]) -> set[str]:
    """Returns the keys of some nodes and of all that these depend on."""
    keys: set[str] = set()

    def add(node: Node) -> None:
        if node.artifact.key not in keys:
            keys.add(node.artifact.key)
            for parent in node.parents.values():
                add(parent)

    for node in nodes:
        add(node)
    return keys


def forced(nodes: Mapping[str, Node], stages: Iterable[str]) -> set[str]:
    """Returns the names of the nodes to rebuild: those of ``stages`` and everything that depends on them."""
    chosen, by_key = set(stages), dict[str, bool]()

    def is_forced(node: Node) -> bool:
        key = node.artifact.key
        if key not in by_key:
            by_key[key] = node.stage in chosen or any(map(is_forced, node.parents.values()))
        return by_key[key]

    return {name for name, node in nodes.items() if is_forced(node)}
