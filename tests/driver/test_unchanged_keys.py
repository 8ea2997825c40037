"""Artifact keys and finished runs of commit 379a28e, from before the package layout was introduced, stay valid.

``keys.json`` contains the keys of that commit for some command lines, and ``finished_run.tar.gz`` a run that it
finished (inputs, command line and outputs). A change that is meant to rebuild artifacts increases the version of a
stage in ``driver/graph.py`` and updates both. The quickstart had other values then, which the tests set again.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs, main
from pipeline.driver.graph import Inputs, build_graph
from tests.driver.finished_run import extract_finished_run

QUICKSTART_THEN = [
    "pretrain.steps=18", "pretrain.global_batch=8", "pretrain.held_out_blocks=8",
    "pretrain.evaluate_at=[0.0,0.2,0.4,0.6,0.8,1.0]", "sft.corpus_fraction=0.0", "sft.steps=48",
    "sft.held_out_blocks=8", "sft.trainable=all", "pretrain.precision=float32", "sft.precision=float32",
    "evaluate.held_out_characters=20000", "evaluate.sample_answers=0", "evaluate.limit=null",
]  # fmt: skip
RECORDED = json.loads(Path(__file__).with_name("keys.json").read_text())


def test_keys_of_every_recorded_command_line_are_unchanged() -> None:
    inputs = Inputs(model="m", corpus="c", instructions="i", interpreter="p")
    for arguments, recorded in RECORDED.items():
        settings = compose_jobs(_as_then(_split(arguments)), False, None)[0].settings
        keys = {name: node.artifact.key for name, node in build_graph(settings, inputs).items()}
        assert keys == recorded, arguments


def _as_then(arguments: list[str]) -> list[str]:
    """Add the values that the quickstart had. Later arguments override them."""
    experiment, *others = arguments
    return [experiment, *(QUICKSTART_THEN if experiment == "+experiment=quickstart" else []), *others]


def _split(arguments: str) -> list[str]:
    """Split a recorded command line into arguments, except at spaces within a dictionary."""
    parts: list[str] = []
    for part in arguments.split(" "):
        if parts and parts[-1].count("{") > parts[-1].count("}"):
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    return parts


@pytest.fixture
def finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Extracts the finished run into the current directory, and returns its command line."""
    extract_finished_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = (tmp_path / "arguments.txt").read_text().replace("tracking=disabled", "tracking=none")  # its name now
    return _as_then(arguments.split())


def test_a_finished_run_is_still_complete(finished_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(finished_run) == 0
    printed = capsys.readouterr().out
    assert "all artifacts are complete" in printed
    assert printed.count(" exists ") == 6
    assert "build" not in printed and "resume" not in printed


def test_an_export_changes_no_file_of_the_run(finished_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The expanded model has a card of its own, which the card for the Hub replaces only in the upload."""
    before = _hashes(Path("outputs/artifacts"))
    export = ["action=export", "target=expand", "export.repository=someone/deeper", "dry_run=true"]
    assert main([*finished_run, *export]) == 0
    (uploaded,) = re.findall(r"([\d,]+) bytes  README.md", capsys.readouterr().out)
    (own,) = Path("outputs/artifacts/expand").glob("*/README.md")
    assert int(uploaded.replace(",", "")) > own.stat().st_size  # the card for the Hub also has the scores
    assert _hashes(Path("outputs/artifacts")) == before


def _hashes(directory: Path) -> dict[Path, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
