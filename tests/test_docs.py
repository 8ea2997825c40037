"""Commands in README.md, CONTRIBUTING.md and docs/ compose, their ranks divide their batches, and links resolve."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs
from pipeline.config import Settings
from pipeline.driver.submit import stage_jobs
from pipeline.planning import prepare

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMAND = re.compile(r"^ *(?:\$ )?(?:scripts/run|scripts/submit|salloc|python -m pipeline) .*$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@cache
def _jobs(overrides: tuple[str, ...], multirun: bool) -> list[Settings]:
    """The settings of all jobs of a command, which several pages may show."""
    return [job.settings for job in compose_jobs(list(overrides), multirun, None)]


def _commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"^ *```(?:bash|console)?\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in COMMAND.findall(block.replace("\\\n", " "))]
    return [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines]


def _overrides(command: list[str]) -> list[str]:
    start = command.index("--") if "--" in command else command.index("pipeline") if "pipeline" in command else 0
    return [word for word in command[start + 1 :] if word != "--multirun"]


def _ranks(run: Settings, section: str, command: list[str]) -> int:
    """The number of ranks that the command requests from Slurm for a training stage; 1 without Slurm."""
    requested = dict(word.removeprefix("--").split("=", 1) for word in command if re.match(r"--[\w-]+=", word))
    if requested:
        return int(requested["nodes"]) * int(requested["gpus-per-node"])
    if run.action != "submit":
        return 1
    resources = getattr(run.slurm, section)
    return resources.nodes * max(1, resources.gpus)


def test_the_example_experiment_composes(tmp_path: Path) -> None:
    (experiment,) = re.findall(r"^```yaml\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(experiment)
    (job,) = compose_jobs(["+experiment=mine"], False, tmp_path)
    assert (job.settings.name, job.settings.pretrain.global_batch) == ("mine", 64)
    assert job.settings.data.chat_template == "plain"


@pytest.fixture(scope="module")
def example_method(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The method that CONTRIBUTING.md adds is importable as ``my_package.scaled_copy``."""
    added = (
        CONTRIBUTING.read_text().partition("+++ b/pipeline/expansion/methods/scaled_copy.py\n")[2].partition("+++ ")[0]
    )
    package = tmp_path_factory.mktemp("example") / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "scaled_copy.py").write_text("".join(f"{line[1:]}\n" for line in added.splitlines()))
    sys.path.insert(0, str(package.parent))
    yield
    sys.path.remove(str(package.parent))


@pytest.mark.usefixtures("example_method")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_compose_and_their_ranks_divide_their_batches(page: Path) -> None:
    for command in _commands(page):
        for settings in _jobs(tuple(_overrides(command)), "--multirun" in command):
            for section in ("pretrain", "sft"):
                train = getattr(settings, section)
                ranks = _ranks(settings, section, command)
                assert train.global_batch % (ranks * train.micro_batch) == 0, (section, command)


def test_the_page_on_clusters_shows_the_jobs_of_its_submission(shrunk: list[str], tmp_path: Path) -> None:
    page = REPOSITORY / "docs" / "cluster.md"
    answers = ["evaluate.sample_answers=5", f"output_dir={tmp_path}"]  # shrunk has none of the quickstart's
    (job,) = compose_jobs([*_overrides(_commands(page)[0]), *shrunk, *answers], False, None)
    (prepared,) = prepare([job.settings])
    numbers: dict[str, str] = {}  # by key
    expected = []
    for number, each in enumerate(stage_jobs([(prepared.run, prepared.nodes)], None), 11):
        numbers[each.node.artifact.key] = str(number)
        before = [numbers[node.artifact.key] for node in (*each.node.parents.values(), *each.node.reuses.values())]
        expected.append((each.node.name, str(prepared.run.slurm.resources(each.node.stage).nodes), ", ".join(before)))
    shown = re.findall(r"^  job \d+ +(\S+) +(\d) nodes? *(?:after (.*))?$", page.read_text(), re.MULTILINE)
    assert shown == expected


def test_the_benchmark_of_training_accepts_the_options_that_its_page_shows() -> None:
    from scripts.benchmarks.pretrain import parse

    shown = re.findall(r"`(--tables [^`]+)`", (REPOSITORY / "docs" / "benchmarks.md").read_text())
    assert {table for options in shown for table in parse(options.split()).tables} >= {"settings", "wait-policy"}


def test_every_page_opens_with_a_command_and_readme_links_to_it() -> None:
    for page in PAGES[2:]:
        opening = page.read_text().partition("\n## ")[0]
        assert "```bash" in opening or "```console" in opening, page.name
        assert f"(docs/{page.name})" in README.read_text(), page.name


def test_links_lead_to_existing_files() -> None:
    for page in PAGES:
        for target in LINK.findall(page.read_text()):
            if not target.startswith(("http", "#")):
                assert (page.parent / target.partition("#")[0]).exists(), (page.name, target)


def test_the_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 1500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_longer_than_120_characters(page: Path) -> None:
    assert not [line for line in page.read_text().splitlines() if len(line) > 120]
