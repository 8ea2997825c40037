"""Tasks are accepted or refused within seconds, and without importing torch or lm-eval."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Evaluate
from pipeline.errors import UserError
from pipeline.evaluation.catalogue import BUNDLED, SUITE_TASKS, validate_evaluation
from pipeline.evaluation.installed_tasks import installed_datasets, installed_files
from tests.evaluation.custom_tasks import write_custom_tasks
from tests.fake_hub import FakeHub, serve

REPOSITORY = Path(__file__).parents[2]


def _evaluate(*tasks: str, include_path: str | None = None) -> Evaluate:
    values: dict[str, Any] = {"targets": ["load"], "num_fewshot": None, "limit": None}
    values |= {
        "include_path": include_path,
        "held_out_characters": 1000,
        "batch_size": 1,
        "rescore": False,
        "backend": "hf",
        "sample_answers": 0,
        "processes": "auto",
    }
    return Evaluate(tasks=list(tasks), **values, prompt_format="plain", dtype="auto")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_bundled_tasks_need_no_network(no_network: None) -> None:
    validate_evaluation(_evaluate(*BUNDLED))


def test_validating_imports_neither_torch_nor_lm_eval() -> None:
    program = (
        "import sys; from pipeline.config import Evaluate;"
        "from pipeline.evaluation.catalogue import BUNDLED, validate_evaluation;"
        "validate_evaluation(Evaluate.model_construct(tasks=list(BUNDLED), include_path=None, num_fewshot=None));"
        "sys.exit(', '.join({'torch', 'lm_eval', 'transformers', 'datasets', 'numpy'} & set(sys.modules)) or 0)"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    ("wrong", "right"), [("held_out_txt", "held_out_text"), ("minimal_pair", "minimal_pairs"), ("arc_eazy", "arc_easy")]
)
def test_an_unknown_task_is_refused_with_a_suggestion(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=right):
        validate_evaluation(_evaluate("minimal_pairs", wrong))


@pytest.mark.parametrize(
    ("asked", "refused", "remedy"),
    [
        ({"held_out_txt": 5}, "evaluate.num_fewshot.held_out_txt = 5: it is not one of", "Did you mean held_out_text"),
        ({"mmlu_anatomy": 5}, "it is not one of evaluate.tasks", "Choose from held_out_text, minimal_pairs, arc_easy"),
        ({"minimal_pairs": 3}, "no effect on minimal_pairs", "Set evaluate.num_fewshot=null"),
        (5, "no effect on held_out_text, minimal_pairs", "Set 'evaluate.num_fewshot={arc_easy:5}'"),
    ],
)
def test_numbers_of_few_shot_examples_without_an_effect_are_refused(asked: Any, refused: str, remedy: str) -> None:
    evaluate = _evaluate("held_out_text", "minimal_pairs", "arc_easy").model_copy(update={"num_fewshot": asked})
    with pytest.raises(UserError, match=refused) as caught:
        validate_evaluation(evaluate)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("asked", [None, 0, {"minimal_pairs": 0}, {"arc_challenge": 25, "truthfulqa_mc2": 0}])
def test_numbers_of_few_shot_examples_of_a_whole_suite_may_stay(asked: Any, no_network: None) -> None:
    validate_evaluation(_evaluate("held_out_text", "minimal_pairs").model_copy(update={"num_fewshot": asked}))


def test_a_task_of_the_users_own_may_fix_zero_examples(tmp_path: Path) -> None:
    path = str(write_custom_tasks(tmp_path / "own"))
    for name in ("capitals", "own_suite", "geography"):
        with pytest.raises(UserError, match=f"no effect on {name}"):
            validate_evaluation(_evaluate(name, include_path=path).model_copy(update={"num_fewshot": 2}))
    base = tmp_path / "own" / "_base.yaml"
    base.write_text(base.read_text().replace("num_fewshot: 0\n", ""))
    validate_evaluation(_evaluate("own_suite", include_path=path).model_copy(update={"num_fewshot": 2}))


def test_an_empty_list_of_tasks_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to score"):
        validate_evaluation(_evaluate())


def test_tasks_with_hub_data_are_refused_within_seconds_if_the_hub_is_unreachable(no_network: None) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached") as caught:
        validate_evaluation(_evaluate("arc_easy"))
    assert time.monotonic() - started < 10.0
    assert "HF_HUB_OFFLINE" in caught.value.remedy


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve(tmp_path, tmp_path / "cache", monkeypatch) as hub:
        yield hub


def test_datasets_that_the_hub_provides_are_accepted(hub: FakeHub) -> None:
    hub.datasets = {"cais/mmlu": ["test.parquet"], "allenai/ai2_arc": ["test.parquet"]}
    validate_evaluation(_evaluate("mmlu", "arc_easy", "minimal_pairs"))
    assert len([path for path in hub.requests if path.startswith("/api/datasets/cais/mmlu")]) == 1


@pytest.mark.parametrize(
    ("repo", "files", "refused", "remedy"),
    [
        ("Idavidrein/gpqa", ["gpqa.csv"], "access to it must be requested", "datasets/Idavidrein/gpqa"),
        ("baber/piqa", ["README.md", "piqa.py"], r"it is a loading script \(piqa.py\)", "leave it out"),
        ("tau/commonsense_qa", None, "the Hub has no such dataset", "hf auth login"),
    ],
)
def test_datasets_that_cannot_be_read_are_refused(
    repo: str, files: list[str] | None, refused: str, remedy: str, hub: FakeHub
) -> None:
    tasks = {"Idavidrein/gpqa": "gpqa_main_zeroshot", "baber/piqa": "piqa", "tau/commonsense_qa": "commonsense_qa"}
    hub.datasets = {"allenai/ai2_arc": ["test.parquet"]} | ({repo: files} if files else {})
    hub.gated = {"Idavidrein/gpqa"}
    with pytest.raises(UserError, match=f"{tasks[repo]}, which reads {repo}: {refused}") as caught:
        validate_evaluation(_evaluate("arc_easy", tasks[repo]))
    assert remedy in caught.value.remedy


def test_datasets_of_a_users_own_group_are_checked(tmp_path: Path, hub: FakeHub) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "group.yaml").write_text("group: reading\ntask: [race, mine]\n")
    (tmp_path / "own" / "mine.yaml").write_text("task: mine\ndataset_path: me/data\noutput_type: loglikelihood\n")
    hub.datasets = {"EleutherAI/race": ["test.parquet"]}
    with pytest.raises(UserError, match="reading, which reads me/data: the Hub has no such dataset"):
        validate_evaluation(_evaluate("reading", include_path=str(tmp_path / "own")))
    (tmp_path / "own" / "mine.yaml").write_text("task: mine\ndataset_path: my/own/data\n")
    with pytest.raises(UserError, match="mine, which reads my/own/data: it is neither a directory nor a dataset name"):
        validate_evaluation(_evaluate("mine", include_path=str(tmp_path / "own")))


def test_offline_every_configuration_must_be_in_the_cache(
    tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="piqa, which reads baber/piqa: it is not in the cache") as caught:
        validate_evaluation(_evaluate("piqa"))
    assert "evaluate.targets=[load]" in caught.value.remedy

    cached = tmp_path / "allenai___ai2_arc" / "ARC-Easy" / "0.0.0" / "0123456789abcdef"
    cached.mkdir(parents=True)
    datasets.DatasetInfo(config_name="ARC-Easy").write_to_directory(str(cached))
    validate_evaluation(_evaluate("arc_easy"))
    with pytest.raises(UserError, match="its configuration ARC-Challenge is not in the cache"):
        validate_evaluation(_evaluate("ai2_arc"))


def test_the_suites_in_conf_name_tasks_that_lm_eval_knows() -> None:
    assert installed_files().keys() >= SUITE_TASKS
    for file in (REPOSITORY / "conf" / "evaluate").glob("*.yaml"):
        tasks = yaml.safe_load(file.read_text()).get("tasks", [])
        assert set(tasks) <= SUITE_TASKS | set(BUNDLED), file.name


@pytest.mark.parametrize("directory", ["arc", "acpbench", "anli", "AraDiCE", "glue", "mmlu", "scrolls", "tmmluplus"])
def test_tasks_groups_and_tags_are_those_of_lm_eval(directory: str) -> None:
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / directory
    known = {name for name, files in installed_files().items() if any(file.is_relative_to(path) for file in files)}
    assert known == {*lm_eval.tasks.TaskManager(include_path=str(path), include_defaults=False).all_tasks}


def test_datasets_of_groups_and_tags_are_those_of_their_tasks() -> None:
    assert {(found.repo, found.config) for found in installed_datasets("ai2_arc")} == {
        ("allenai/ai2_arc", "ARC-Easy"),
        ("allenai/ai2_arc", "ARC-Challenge"),
    }
    subjects = installed_datasets("mmlu")
    assert len(subjects) == 57
    assert {found.repo for found in subjects} == {"cais/mmlu"}
