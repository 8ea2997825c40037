"""Artifact keys and finished runs of commit 379a28e, from before the package layout was introduced, stay valid.

``keys.json`` contains the keys of that commit for some command lines, and ``finished_run.tar.gz`` a run that it
finished (inputs, command line and outputs). A change that is meant to rebuild artifacts increases the version of a
stage in ``driver/graph.py`` and updates both. The quickstart had other values then, which the tests set again.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs, main
from pipeline.driver.graph import Inputs, build_graph

QUICKSTART_THEN = [
    "pretrain.steps=18", "pretrain.global_batch=8", "pretrain.held_out_blocks=8",
    "pretrain.evaluate_at=[0.0,0.2,0.4,0.6,0.8,1.0]", "sft.corpus_fraction=0.0", "sft.steps=48",
    "sft.held_out_blocks=8", "evaluate.held_out_characters=20000", "evaluate.sample_answers=0",
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


def test_a_finished_run_is_still_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(Path(__file__).with_name("finished_run.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    assert main(_as_then((tmp_path / "arguments.txt").read_text().split())) == 0
    printed = capsys.readouterr().out
    assert "everything is there" in printed
    assert printed.count(" there ") == 6
    assert "build" not in printed and "resume" not in printed
