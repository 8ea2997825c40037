"""Exports one finished model. Nothing that it writes names a path of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from pipeline.config import MODEL_TARGETS, Settings
from pipeline.driver.graph import Node
from pipeline.driver.target import FinishedModel
from pipeline.errors import UserError
from pipeline.export.card import card_of
from pipeline.export.files import stage_files
from pipeline.export.gguf import convert, find_converter
from pipeline.export.hub import check_access, upload
from pipeline.report import RunArtifacts


def export_model(run: Settings, model: FinishedModel, nodes: Mapping[str, Node], console: Console) -> None:
    """Writes a GGUF file, or uploads the model. With ``dry_run``, only says what would be done.

    Args:
        run: the settings; ``export`` says how.
        model: the model.
        nodes: the run's graph, for the model card; empty for a directory that is not of a run.
        console: where the outcome is printed.

    Raises:
        UserError: something that the export needs is missing.
        WorkersFailed: llama.cpp's converter failed.
    """
    if run.export.format == "gguf":
        _to_gguf(run, model, console)
    else:
        _to_hub(run, model, nodes, console)


def _to_gguf(run: Settings, model: FinishedModel, console: Console) -> None:
    converter, out = find_converter(run.export), _gguf_path(run, model)
    console.print(f"{model.name} to {out} with {converter}", markup=False)
    if not run.dry_run:
        with TemporaryDirectory(prefix="export-") as folder:
            named = Path(folder, _short_name(run, model))
            stage_files(model.directory, named, with_code=False)  # the converter might run it
            convert(converter, named, out, run)
        console.print(f"{out.stat().st_size:,} bytes; for example: llama-cli -m {out}", markup=False)


def _gguf_path(run: Settings, model: FinishedModel) -> Path:
    """Returns the file to write, which has a name of its own inside a directory that the user names."""
    path = None if run.export.path is None else Path(run.export.path).expanduser()
    if path is not None and not path.is_dir():
        return path
    return (path or Path(run.output_dir, run.name, "export")) / f"{_short_name(run, model)}-{run.export.outtype}.gguf"


def _short_name(run: Settings, model: FinishedModel) -> str:
    if model.name in MODEL_TARGETS:
        return f"{run.name.replace('/', '-')}-{model.name}"
    return Path(os.path.abspath(model.directory)).name  # of a run's link to an artifact, not the key


def _to_hub(run: Settings, model: FinishedModel, nodes: Mapping[str, Node], console: Console) -> None:
    repository = run.export.repository
    if repository is None:
        raise UserError(
            setting="export.repository",
            value="null",
            rule="the model is uploaded to this repository",
            remedy="Set export.repository=ORGANIZATION/NAME.",
        )
    if not run.dry_run:
        check_access()
    with TemporaryDirectory(prefix="export-") as name:
        folder = Path(name)
        stage_files(model.directory, folder)
        if nodes:
            finished = {role: node.artifact.path for role, node in nodes.items() if node.artifact.is_complete()}
            artifacts = RunArtifacts(run.name, run.expand.method, finished)
            card = folder / "README.md"
            card.unlink(missing_ok=True)  # a link to the artifact's own card, which must not be overwritten
            card.write_text(card_of(artifacts, model.name, repository))
        for file in sorted(folder.iterdir()):
            console.print(f"  {file.stat().st_size:>15,} bytes  {file.name}", markup=False)
        private = "private" if run.export.private else "public"
        if run.dry_run:
            console.print(f"dry run: these files would be uploaded to the {private} repository {repository}")
        else:
            console.print(f"uploaded to {upload(folder, repository, run.export.private)}", markup=False)
