"""The README's commands are commands: they compose, and their ranks divide their batches."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs
from pipeline.config import Settings

README = Path(__file__).resolve().parent.parent / "README.md"
COMMAND = re.compile(r"^ *(?:\$ )?(?:scripts/run|scripts/submit|salloc|python -m pipeline) .*$", re.MULTILINE)


def _commands() -> list[list[str]]:
    blocks = re.findall(r"^ *```(?:bash|console)?\n(.*?)^ *```$", README.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in COMMAND.findall(block.replace("\\\n", " "))]
    return [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines]


def _overrides(command: list[str]) -> list[str]:
    start = command.index("--") if "--" in command else command.index("pipeline") if "pipeline" in command else 0
    return [word for word in command[start + 1 :] if word != "--multirun"]


def _ranks(run: Settings, section: str, command: list[str]) -> int:
    """Processes of a training stage, by what the command asks Slurm for; one where it asks for nothing."""
    asked = dict(word.removeprefix("--").split("=", 1) for word in command if re.match(r"--[\w-]+=", word))
    if asked:
        return int(asked["nodes"]) * int(asked["gpus-per-node"])
    if run.action != "submit":
        return 1
    resources = getattr(run.slurm, section)
    return resources.nodes * max(1, resources.gpus)


def test_the_experiment_of_ones_own_composes(tmp_path: Path) -> None:
    (experiment,) = re.findall(r"^```yaml\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(experiment)
    (job,) = compose_jobs(["+experiment=mine"], False, tmp_path)
    assert (job.settings.name, job.settings.pretrain.global_batch, job.settings.data.chat_template) == (
        "mine",
        64,
        "plain",
    )


def test_the_commands_are_found() -> None:
    assert len(_commands()) >= 12


@pytest.mark.parametrize("command", _commands(), ids=lambda command: " ".join(command)[:60])
def test_a_command_composes_and_its_ranks_divide_its_batches(command: list[str]) -> None:
    for job in compose_jobs(_overrides(command), "--multirun" in command, None):
        for section in ("pretrain", "sft"):
            train = getattr(job.settings, section)
            assert train.global_batch % (_ranks(job.settings, section, command) * train.micro_batch) == 0, section
