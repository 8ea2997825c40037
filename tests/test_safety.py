"""A complete run in which every process is monitored: nothing is pickled or unpickled, and no token reaches a file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.errors import EXIT_DONE
from tests import warm
from tests.test_pipeline import run

SECRETS = {"HF_TOKEN": "hf_" + "s3cr3t" * 6, "WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef"}

# Installed as sitecustomize.py, which Python imports at the start of every process, and the warm server before its
# imports and in every fork.
MONITOR = """
import os, pickle, sys, traceback

def forbid(name):
    def forbidden(*arguments, **details):
        with open(os.environ["PIPELINE_TEST_PICKLES"], "a") as log:
            log.write(name + "\\n" + "".join(traceback.format_stack(limit=4)) + "\\n")
        raise AssertionError(f"{name} was called")
    return forbidden

pickle.load, pickle.dump = forbid("pickle.load"), forbid("pickle.dump")
if {"pipeline.stages", "pipeline.training.worker"} & set(sys.orig_argv):
    import torch
    torch.load, torch.save = forbid("torch.load"), forbid("torch.save")
if {"pipeline", "pipeline.training.worker"} & set(sys.orig_argv):
    pickle.loads = forbid("pickle.loads")
    sys.addaudithook(lambda event, _: event == "pickle.find_class" and forbid(event)())  # by whatever means
with open(os.environ["PIPELINE_TEST_PICKLES"] + ".started", "a") as log:
    log.write(" ".join(sys.orig_argv) + "\\n")
"""


@pytest.fixture(scope="module")
def finished_run(shrunk: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run. A forbidden call would have written the file ``pickles`` in it."""
    directory = tmp_path_factory.mktemp("finished_run")
    (directory / "site").mkdir()
    (directory / "tmp").mkdir()
    (directory / "site" / "sitecustomize.py").write_text(MONITOR)
    client = warm.install(site=directory / "site" / "sitecustomize.py")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in SECRETS.items():
            environment.setenv(name, value)
        environment.setenv("PIPELINE_TEST_PICKLES", str(directory / "pickles"))
        environment.setenv("TMPDIR", str(directory / "tmp"))
        environment.setattr(sys, "executable", str(client))
        status, output = run(
            "+experiment=quickstart",
            *shrunk,
            "evaluate.targets=[sft]",
            "tracking=offline",
            cwd=directory,
            path=[directory / "site"],
        )
    assert status == EXIT_DONE, output
    (directory / "terminal.txt").write_text(output)
    return directory


@pytest.mark.xdist_group("safety")
def test_no_pickle_is_written_or_read(finished_run: Path) -> None:
    started = (finished_run / "pickles.started").read_text()
    assert "pipeline.stages" in started and "pipeline.training.worker" in started
    assert not (finished_run / "pickles").exists(), (finished_run / "pickles").read_text()


@pytest.mark.xdist_group("safety")
def test_no_temporary_file_is_left(finished_run: Path) -> None:
    assert not list((finished_run / "tmp").iterdir())


@pytest.mark.xdist_group("safety")
def test_no_token_is_written_to_a_file_or_the_terminal(finished_run: Path) -> None:
    files = [path for path in finished_run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path
