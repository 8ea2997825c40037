"""Custom task YAMLs: the files that their scores depend on, and what is refused before anything starts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.artifacts.fingerprints import Fingerprints
from pipeline.config import Evaluate
from pipeline.errors import EXIT_DONE, EXIT_REQUEST, UserError
from pipeline.evaluation.catalogue import fingerprint_tasks, validate_evaluation
from pipeline.evaluation.custom_tasks import CustomTasks, resolve_data_paths
from pipeline.files import read_json
from tests.evaluation.custom_tasks import write_custom_tasks


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_custom_tasks(tmp_path / "tasks")


def _evaluate(directory: Path | list[str] | None, *tasks: str) -> Evaluate:
    include_path = str(directory) if isinstance(directory, Path) else directory
    return Evaluate.model_construct(tasks=list(tasks), include_path=include_path, num_fewshot=None)


def _fingerprints(directory: Path, *tasks: str) -> dict[str, str]:
    memo = Fingerprints(directory.parent / "fingerprints.json")
    return fingerprint_tasks(_evaluate(directory, *(tasks or ("capitals", "repeat", "own_suite"))), memo)


def test_tasks_groups_and_tags_are_accepted_without_a_network(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", None)
    validate_evaluation(_evaluate(directory, "capitals", "own_suite", "geography", "minimal_pairs"))


def test_reading_tasks_executes_no_function(directory: Path) -> None:
    (directory / "utils.py").write_text("raise AssertionError('imported')")
    validate_evaluation(_evaluate(directory, "repeat"))
    assert "utils" not in sys.modules


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("data/capitals.jsonl", {"capitals", "own_suite"}),
        ("data/words.jsonl", {"repeat", "own_suite"}),
        ("capitals.yaml", {"capitals", "own_suite"}),
        ("own_suite.yaml", {"own_suite"}),
        ("utils.py", {"repeat", "own_suite"}),
        ("_base.yaml", {"capitals", "repeat", "own_suite"}),
    ],
)
def test_a_change_of_a_file_changes_the_tasks_that_depend_on_it(file: str, changed: set[str], directory: Path) -> None:
    before = _fingerprints(directory)
    (directory / file).write_text((directory / file).read_text() + "\n")
    after = _fingerprints(directory)
    assert {task for task in before if before[task] != after[task]} == changed


def test_fingerprints_do_not_depend_on_where_the_directory_is(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "elsewhere" / "copy")
    assert _fingerprints(directory) == _fingerprints(tmp_path / "elsewhere" / "copy")


def test_only_requested_custom_tasks_have_a_fingerprint(directory: Path, tmp_path: Path) -> None:
    assert set(_fingerprints(directory, "capitals", "minimal_pairs", "geography")) == {"capitals", "geography"}
    assert fingerprint_tasks(_evaluate(None, "minimal_pairs"), Fingerprints(tmp_path / "memo.json")) == {}


def test_data_paths_are_relative_to_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    config: dict[str, Any] = {
        "group": "g",
        "task": [
            {"dataset_path": "json", "dataset_kwargs": {"data_files": ["a.jsonl", "/b.jsonl", "https://host/c.jsonl"]}},
            {"dataset_path": "local"},
            {"dataset_path": "./missing"},
            {"dataset_path": "owner/name", "dataset_kwargs": {"data_files": "en/a.jsonl"}},
        ],
    }
    files, local, missing, hub = resolve_data_paths(config, tmp_path)["task"]
    assert files["dataset_kwargs"]["data_files"] == [f"{tmp_path}/a.jsonl", "/b.jsonl", "https://host/c.jsonl"]
    assert (local["dataset_path"], missing["dataset_path"]) == (f"{tmp_path}/local", f"{tmp_path}/missing")
    assert hub == config["task"][3]  # files of a dataset on the Hub


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text) and None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _remove("data/capitals.jsonl"),
            r"capitals.yaml: the task capitals reads .*/data/capitals.jsonl, and there is no",
        ),
        (_remove("utils.py"), r"repeat.yaml: '!function utils.prompt' needs .*/utils.py, which does not exist"),
        (_remove("_base.yaml"), r"capitals.yaml: it includes _base.yaml, and there is no file"),
        (_write("_base.yaml", "include: capitals.yaml"), "_base.yaml|capitals.yaml: it includes itself"),
        (_write("_base.yaml", "[1, 2]"), "_base.yaml: capitals.yaml includes it, and it is not a mapping"),
        (_write("broken.yaml", "task: broken\n  doc: [1"), r"broken.yaml: it is not valid YAML: line 2"),
        (_write("tag.yaml", "task: !unknown 3"), r"tag.yaml: it is not valid YAML: line 1"),
        (_write("again.yaml", "task: capitals"), r"it defines capitals, which .* defines too"),
        (_write("slash.yaml", "task: a/b"), r"the name a/b contains a slash"),
        (_write("bundled.yaml", "task: minimal_pairs"), r"minimal_pairs, which is the name of a bundled task"),
        (
            _write("own_suite.yaml", "group: own_suite\ntask: [{task: capitals, process_docs: !function f}]"),
            r"own_suite.yaml: '!function f' names no module",
        ),
    ],
)
def test_files_that_cannot_be_loaded_are_refused(spoil: Callable[[Path], None], message: str, directory: Path) -> None:
    spoil(directory)
    with pytest.raises(UserError, match=message) as caught:
        validate_evaluation(_evaluate(directory, "capitals", "repeat", "own_suite"))
    assert caught.value.setting == "evaluate.include_path"


def test_a_directory_that_is_missing_or_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no/such: there is no such directory"):
        validate_evaluation(_evaluate(["/no/such"], "capitals"))
    (tmp_path / "_base.yaml").write_text("dataset_path: json")
    (tmp_path / "capitals.yml").write_text("task: capitals")
    with pytest.raises(UserError, match=r"no \.yaml file that defines a task"):
        validate_evaluation(_evaluate(tmp_path, "capitals"))


def test_an_unknown_name_lists_near_matches_of_all_sources(directory: Path) -> None:
    for wrong, right in {"capital": "capitals", "arc_eazy": "arc_easy", "minimal_pair": "minimal_pairs"}.items():
        with pytest.raises(UserError, match=f"Did you mean .*{right}"):
            validate_evaluation(_evaluate(directory, wrong))


def test_names_that_a_group_does_not_define_must_be_known(directory: Path) -> None:
    (directory / "mixed.yaml").write_text("group: mixed\ntask: [capitals, arc_easy]")
    assert CustomTasks(str(directory)).outside_names("mixed") == ["arc_easy"]
    (directory / "mixed.yaml").write_text("group: mixed\ntask: [capitals, arc_eazy]")
    with pytest.raises(UserError, match=r"arc_eazy: there is no such task"):
        validate_evaluation(_evaluate(directory, "mixed"))


def test_a_run_scores_local_tasks_once_and_again_after_a_line_of_their_data_changed(
    directory: Path, shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["+experiment=quickstart", *shrunk, f"output_dir={tmp_path / 'out'}", "stages=[evaluate]",
               "evaluate.targets=[load]", "evaluate.tasks=[capitals,repeat]",
               f"evaluate.include_path={directory}"]  # fmt: skip

    def run() -> str:
        capsys.readouterr()
        assert main(command) == EXIT_DONE
        return capsys.readouterr().out

    def scores() -> dict[str, float]:
        evaluation = read_json(tmp_path / "out" / "quickstart" / "evaluate" / "load" / "evaluation.json")
        return {f"{row['task']} {row['metric']}": row["n"] for row in evaluation["rows"]}

    assert "build  evaluate/load" in run()
    assert scores() == {"capitals acc": 4, "repeat exact_match": 3}
    assert "all artifacts are complete" in run()
    rows = (directory / "data" / "capitals.jsonl").read_text().splitlines(keepends=True)
    (directory / "data" / "capitals.jsonl").write_text("".join(rows[:-1]))
    printed = run()
    assert "build  evaluate/load" in printed and printed.count("build") == 1
    assert scores() == {"capitals acc": 3, "repeat exact_match": 3}


@pytest.mark.parametrize("action", ["run", "plan"])
def test_run_and_plan_give_the_same_message(
    action: str, directory: Path, shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "data" / "capitals.jsonl").unlink()
    command = ["+experiment=quickstart", *shrunk, f"output_dir={tmp_path / 'out'}", f"action={action}",
               "evaluate.tasks=[own_suite]", f"evaluate.include_path={directory}"]  # fmt: skip
    assert main(command) == (EXIT_REQUEST if action == "run" else EXIT_DONE)
    captured = capsys.readouterr()
    printed = " ".join((captured.out + captured.err).split())
    assert "the task capitals reads" in printed and "there is no such file" in printed
    assert "build" not in printed and "Traceback" not in printed
    # Stages that score nothing do not need the tasks.
    assert main([*command, "stages=[load]"]) == EXIT_DONE
