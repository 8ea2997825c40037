"""What the jobs of a sweep look up, and which of it they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs
from pipeline.driver.graph import UNKNOWN
from pipeline.planning import prepare
from pipeline.planning.checks import refuse_blocked
from pipeline.planning.prepared import with_inputs


@pytest.mark.parametrize("position", ["top,least_important", "least_important,top"])
def test_a_job_of_a_sweep_has_the_keys_of_the_same_run_alone(position: str, shrunk: list[str], tmp_path: Path) -> None:
    """Only ranking layers reads the corpus, so one job looks it up and the other does not."""
    command = ["+experiment=quickstart", *shrunk, "expand=copy", "stages=[expand]", f"output_dir={tmp_path / 'out'}"]
    jobs = compose_jobs([*command, f"expand.position={position}"], True, None)
    sweep = {job.run.expand.position: job.selected for job in prepare([job.settings for job in jobs])}
    for name, selected in sweep.items():
        (alone,) = prepare([job.settings for job in compose_jobs([*command, f"expand.position={name}"], False, None)])
        refuse_blocked(alone)
        assert {node: found.artifact.key for node, found in selected.items()} == {
            node: found.artifact.key for node, found in alone.selected.items()
        }
    assert "tokenize/corpus" in sweep["least_important"] and "tokenize/corpus" not in sweep["top"]


def test_nothing_is_built_from_an_input_that_was_not_looked_up(shrunk: list[str], tmp_path: Path) -> None:
    command = ["+experiment=quickstart", *shrunk, "stages=[tokenize]", f"output_dir={tmp_path / 'out'}"]
    (job,) = prepare([job.settings for job in compose_jobs(command, False, None)])
    refuse_blocked(job)
    identities = replace(job.inputs.identities, corpus=UNKNOWN)
    with pytest.raises(RuntimeError, match="an input of tokenize/corpus was not looked up"):
        refuse_blocked(with_inputs(job.run, replace(job.inputs, identities=identities)))
