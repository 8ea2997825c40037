"""What comes from outside, looked up without a change to any file: the model's config, and what names the contents.

Where the hub is asked it is asked for everything at once, so that the answer to a plan takes no longer than the
slowest of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts.store import RememberedFingerprints
from pipeline.config import Data, Model, Settings, Source
from pipeline.data import python_docs, sources
from pipeline.driver.graph import Inputs
from pipeline.errors import UserError
from pipeline.evaluation.catalogue import fingerprint_tasks
from pipeline.evaluation.catalogue import validate as validate_evaluation
from pipeline.expansion.methods import module_fingerprint
from pipeline.models import hub
from pipeline.models.source import ModelSource, config_of, resolve

UNKNOWN = "unknown"  # the content of an input that could not be looked up: nothing was ever made from it


@dataclass(frozen=True)
class Outside:
    """What is known of a run's inputs.

    Attributes:
        config: the model's config, or the entries of it that ``model.shape`` gives; None where neither is to be had.
        config_from: where it comes from, in words.
        model, data: the run's, with what was found put in the place of branches and tags.
        faults: what could not be looked up, by input: model, corpus, instructions, evaluate.
    """

    config: Mapping[str, Any] | None
    config_from: str
    inputs: Inputs
    model: Model
    data: Data
    faults: Mapping[str, UserError]


def look_up(run: Settings) -> Outside:
    """Asks for everything at once; takes no longer than the slowest answer (``hub.ANSWER_WITHIN_SECONDS``)."""
    remembered = RememberedFingerprints(Path(run.output_dir) / "artifacts" / "fingerprints.json")
    with ThreadPoolExecutor() as pool:
        read_model = pool.submit(_read_model, run.model)
        corpus = pool.submit(_read_sources, run.data.corpus, "corpus", remembered)
        instructions = pool.submit(_read_sources, run.data.instructions, "instructions", remembered)
        evaluate = pool.submit(validate_evaluation, run.evaluate)
    asked: dict[str, Future[Any]] = {"model": read_model, "corpus": corpus, "instructions": instructions}
    faults = {name: fault for name, future in {**asked, "evaluate": evaluate}.items() if (fault := _fault(future))}
    source: ModelSource | None = None
    config: Mapping[str, Any] | None = None
    if "model" not in faults:
        source, config = read_model.result()
    inputs = Inputs(
        model=UNKNOWN if source is None else source.identity or remembered.of_files(source.files),
        corpus=UNKNOWN if "corpus" in faults else corpus.result()[1],
        instructions=UNKNOWN if "instructions" in faults else instructions.result()[1],
        interpreter=python_docs.interpreter_fingerprint(),
        tasks=_fingerprint_tasks(run, remembered, faults),
        method=None if run.expand.module is None else module_fingerprint(run.expand.module),
    )
    if source is None or config is None:
        config, config_from = _second_best(run.model)
    else:
        config_from = f"the config in {_place(source)}"
    model, data = _pinned_model(run.model, source), _pinned_data(run.data, asked, faults)
    return Outside(config, config_from, inputs, model, data, faults)


def _read_sources(
    several: list[Source], purpose: sources.Purpose, remembered: RememberedFingerprints
) -> tuple[list[Source], str]:
    """The sources with their revisions resolved, and their content identity."""
    pinned = sources.pin_sources(several, purpose)
    return pinned, sources.fingerprint_sources(pinned, purpose, remembered)


def _fingerprint_tasks(
    run: Settings, remembered: RememberedFingerprints, faults: Mapping[str, UserError]
) -> Mapping[str, str]:
    """The content of the user's own tasks, which cannot be known where their files are wrong."""
    if not run.scores_models:
        return {}
    try:
        return fingerprint_tasks(run.evaluate, remembered)
    except UserError:
        assert "evaluate" in faults, "what cannot be read is refused by the check of the same files"
        return dict.fromkeys(run.evaluate.tasks, UNKNOWN)


def _pinned_model(model: Model, source: ModelSource | None) -> Model:
    commit = None if source is None else source.commit
    return model if commit is None else model.model_copy(update={"revision": commit})


def _pinned_data(data: Data, asked: Mapping[str, Future[Any]], faults: Mapping[str, UserError]) -> Data:
    known = {"corpus", "instructions"} - faults.keys()
    return data.model_copy(update={purpose: asked[purpose].result()[0] for purpose in known})


def _fault(future: Future[Any]) -> UserError | None:
    """The user's fault that a look-up ended with; a defect of ours is raised."""
    error = future.exception()
    if error is None or isinstance(error, UserError):
        return error
    raise error


def _read_model(model: Model) -> tuple[ModelSource, dict[str, Any] | None]:
    source = resolve(model)
    if source.gguf_file is not None and source.directory is None:
        return source, None  # its config is inside the file, which would have to be downloaded
    return source, config_of(source, keep=False)


def _place(source: ModelSource) -> str:
    return f"{source.repo} on the hub" if source.directory is None else str(source.directory)


def _second_best(model: Model) -> tuple[Mapping[str, Any] | None, str]:
    """A config where the model itself could not be looked up: from the hub's cache, else from ``model.shape``."""
    cached = hub.cached_file(model.path, model.revision, "config.json") if hub.is_repo_id(model.path) else None
    if cached is not None and model.gguf_file is None:
        return json.loads(cached.read_text()), "the config in the hub's cache"
    if model.shape is not None:
        return model.shape, "model.shape, since its config cannot be read"
    return None, "nowhere"
