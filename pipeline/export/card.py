"""The model card of a model of a run: what it is made from, how it was trained, what it scores, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import MODEL_TARGETS
from pipeline.config.data import PURPOSE_OF
from pipeline.expansion.model_card import base_name, card_header
from pipeline.models.config_json import is_nested
from pipeline.report.differences import paired_differences
from pipeline.report.markup import bullets, code, table
from pipeline.report.metrics import TARGET_NAMES
from pipeline.report.results import collect_results
from pipeline.report.runs import RunArtifacts
from pipeline.report.scores import Scores
from pipeline.report.sections import LEGEND
from pipeline.report.tables import score_table

VERBS = {"pretrain": "Continued pre-training", "sft": "Instruction tuning"}


def card_of(run: RunArtifacts, target: str, repository: str) -> str:
    """Returns the text of README.md.

    Args:
        run: the finished artifacts of the run.
        target: the stage whose model is described.
        repository: where others load it from.
    """
    model = (run.manifest("load") or {"settings": {}})["settings"]
    expansion = run.expansion() if target != "load" else None
    config = run.read("load", "config.json") or {}
    blocks = [
        "\n".join(card_header(model, config, [] if expansion is None else [expansion["method"]])),
        f"# {_title(target, repository)}",
        bullets(_facts(run, target, model, expansion)),
        "## How to load it",
        code(_example(run, target, repository, config), "python"),
        *_results(run),
        *_citation(expansion),
    ]
    return "\n\n".join(blocks) + "\n"


def _title(target: str, repository: str) -> str:
    return f"{repository.rpartition('/')[2]}: the {TARGET_NAMES[target]} model of a depth-growth run"


def _facts(
    run: RunArtifacts, target: str, model: Mapping[str, Any], expansion: Mapping[str, Any] | None
) -> Iterator[str]:
    yield f"Base: {base_name(model) or 'a local model directory'}"
    if expansion is not None:
        new = ", ".join(map(str, run.new_layers())) or "none"
        yield (
            f"Expansion: {run.method_title}, from {expansion['num_base_layers']} to {expansion['num_layers']} layers; "
            f"new layers: {new} ({expansion['source']})"
        )
    for stage, verb in VERBS.items():
        done = run.training(stage) if MODEL_TARGETS.index(stage) <= MODEL_TARGETS.index(target) else None
        if done is not None:
            yield (
                f"{verb} on {_sources(run, stage)}: {done['steps']:,} steps, {done['tokens']:,} tokens, "
                f"{done['flops']:.3g} FLOPs; trained parameters: {done['trainable_parameters']:,} of "
                f"{done['total_parameters']:,}"
            )


def _sources(run: RunArtifacts, stage: str) -> str:
    """Names the data that others can find; of local files only that they are local."""
    data = run.read(f"tokenize/{PURPOSE_OF[stage]}", "dataset.json")
    names = [_source(source) for source in data["sources"]] if data else []
    return ", ".join(dict.fromkeys(names)) or "data that is not recorded"


def _source(source: Mapping[str, Any]) -> str:
    if source["kind"] == "python_docs":
        return "the documentation that ships with CPython"
    if source["kind"] == "files":
        return "local files"
    return " ".join(str(source[part]) for part in ("path", "config_name", "split", "revision") if source[part])


def _example(run: RunArtifacts, target: str, repository: str, config: Mapping[str, Any]) -> str:
    auto_class = "AutoModelForImageTextToText" if is_nested(config) else "AutoModelForCausalLM"
    lines = [
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(repository)})",
        f"model = {auto_class}.from_pretrained({json.dumps(repository)})",
    ]
    if not (run.directories[target] / "chat_template.jinja").is_file():
        return "\n".join([*lines, 'prompt = tokenizer("Once upon a time", return_tensors="pt")', *_GENERATE])
    question = 'messages = [{"role": "user", "content": "What does json.dumps do?"}]'
    prompt = "prompt = tokenizer.apply_chat_template("
    arguments = '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True'
    return "\n".join([*lines, question, prompt, arguments, ")", *_GENERATE])


_GENERATE = ("print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))",)


def _results(run: RunArtifacts) -> list[str]:
    scores = Scores(collect_results([run]), paired_differences([run]))
    if not scores.task_metrics():
        return []
    return ["## Results", "By lm-eval, for every model of the run.", table(score_table(scores, run.name)), LEGEND]


def _citation(expansion: Mapping[str, Any] | None) -> list[str]:
    """Cites the papers that the method's source names by their numbers on arXiv."""
    source = "" if expansion is None else expansion["source"]
    entries = []
    for number in re.findall(r"arXiv (\d{4}\.\d{4,5})", source):
        title = source.partition(", arXiv")[0] if source.count("arXiv") == 1 else source
        entries.append(
            f"@misc{{arxiv{number.replace('.', '')},\n  title = {{{title}}},\n  eprint = {{{number}}},\n"
            f"  archivePrefix = {{arXiv}},\n  url = {{https://arxiv.org/abs/{number}}}\n}}"
        )
    return ["## Citation", code("\n".join(entries), "bibtex")] if entries else []
