"""Tasks are accepted or refused within seconds, and without importing torch or lm-eval."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Evaluate
from pipeline.errors import UserError
from pipeline.evaluation.catalogue import BUNDLED, SUITE_TASKS, installed_names, validate_evaluation
from tests.evaluation.custom_tasks import write_custom_tasks

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


def test_a_task_whose_dataset_is_a_loading_script_is_refused() -> None:
    with pytest.raises(UserError, match=r"logiqa: its dataset is a loading script.*Leave it out"):
        validate_evaluation(_evaluate("minimal_pairs", "logiqa"))


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


def test_in_offline_mode_cached_data_may_be_used(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    validate_evaluation(_evaluate("arc_easy"))


def test_the_suites_in_conf_name_tasks_that_lm_eval_knows() -> None:
    assert installed_names() >= SUITE_TASKS
    for file in (REPOSITORY / "conf" / "evaluate").glob("*.yaml"):
        tasks = yaml.safe_load(file.read_text()).get("tasks", [])
        assert set(tasks) <= SUITE_TASKS | set(BUNDLED), file.name


def test_groups_and_their_tasks_are_known() -> None:
    assert {"mmlu_anatomy", "mmlu", "hellaswag"} <= installed_names()
