"""A whole run in which every process is watched: nothing is pickled or unpickled, and no token reaches a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import EXIT_DONE
from tests.test_pipeline import run

SECRETS = {"HF_TOKEN": "hf_" + "s3cr3t" * 6, "WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef"}

# Python imports a module of this name at the start of every process.
WATCH = """
import os, pickle, sys, traceback

def forbid(name):
    def called(*arguments, **details):
        with open(os.environ["PIPELINE_TEST_PICKLES"], "a") as log:
            log.write(name + "\\n" + "".join(traceback.format_stack(limit=4)) + "\\n")
        raise AssertionError(f"{name} was called")
    return called

pickle.load, pickle.dump = forbid("pickle.load"), forbid("pickle.dump")
if {"pipeline.stages", "pipeline.training.worker"} & set(sys.orig_argv):
    import torch
    torch.load, torch.save = forbid("torch.load"), forbid("torch.save")
with open(os.environ["PIPELINE_TEST_PICKLES"] + ".watched", "a") as log:
    log.write(" ".join(sys.orig_argv) + "\\n")
"""


@pytest.fixture(scope="module")
def watched(shrunk: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run; ``pickles`` in it would name every forbidden call."""
    place = tmp_path_factory.mktemp("watched")
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(WATCH)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in SECRETS.items():
            environment.setenv(name, value)
        environment.setenv("PIPELINE_TEST_PICKLES", str(place / "pickles"))
        status, output = run("+experiment=quickstart", *shrunk, "tracking=offline", cwd=place, path=[place / "site"])
    assert status == EXIT_DONE, output
    (place / "terminal.txt").write_text(output)
    return place


@pytest.mark.xdist_group("safety")
def test_no_pickle_is_written_or_read(watched: Path) -> None:
    started = (watched / "pickles.watched").read_text()
    assert "pipeline.stages" in started and "pipeline.training.worker" in started
    assert not (watched / "pickles").exists(), (watched / "pickles").read_text()


@pytest.mark.xdist_group("safety")
def test_no_token_is_in_any_file_or_on_the_terminal(watched: Path) -> None:
    files = [path for path in watched.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path
