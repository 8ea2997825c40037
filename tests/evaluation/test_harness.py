"""How settings are passed to lm-eval."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets.exceptions import DatasetNotFoundError

from pipeline.config import Evaluate
from pipeline.errors import UserError
from pipeline.evaluation import harness
from pipeline.models import tensors


@pytest.mark.parametrize("error", [ConnectionError("no way"), DatasetNotFoundError("gone")])
def test_data_that_cannot_be_downloaded_raise_a_user_error(error: Exception) -> None:
    def load(names: list[str]) -> None:
        raise error

    with pytest.raises(UserError, match="cannot be fetched") as caught:
        harness._load_downloaded("arc_easy", SimpleNamespace(load=load))
    assert caught.value.setting == "evaluate.tasks" and "HF_HUB_OFFLINE" in caught.value.remedy


class _Task:
    """The part of lm-eval's task that few-shot settings use."""

    def __init__(self, fixed: int | None) -> None:
        self.num_fewshot = fixed

    def get_config(self, key: str) -> int | None:
        return self.num_fewshot

    def set_config(self, key: str, value: int) -> None:
        self.num_fewshot = value

    def set_fewshot_seed(self, seed: int) -> None:
        pass


@pytest.mark.parametrize(
    ("asked", "fixed", "given"),
    [
        (None, None, 0),
        (None, 5, 5),
        (0, 5, 0),
        (5, None, 5),
        (5, 0, 0),  # as on lm-eval's command line, a task that fixes zero keeps zero
        ({"arc_challenge": 25}, None, 25),
        ({"hellaswag": 10}, 3, 3),
    ],
)
def test_the_number_of_few_shot_examples(asked: Any, fixed: int | None, given: int) -> None:
    task = _Task(fixed)
    settings = Evaluate.model_construct(num_fewshot=asked)
    harness._set_fewshot("arc_challenge", {"arc_challenge": task}, settings)
    assert task.num_fewshot == given


@pytest.mark.parametrize(
    ("dtype", "device", "flags", "expected"),
    [
        ("auto", "cpu", [], "float32"), ("auto", "cpu", ["avx512_bf16"], "bfloat16"), ("auto", "cuda", [], "bfloat16"),
        ("bfloat16", "cpu", [], "bfloat16"), ("float32", "cuda", [], "float32"),
    ],
)  # fmt: skip
def test_the_dtype_does_not_depend_on_the_checkpoint(
    dtype: str, device: str, flags: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "bfloat16_flags", lambda: flags)
    assert tensors.dtype_of(dtype, device) == expected


def test_a_limit_takes_documents_at_equal_distances() -> None:
    tasks = {name: SimpleNamespace(eval_docs=range(size)) for name, size in (("many", 10), ("few", 2), ("none", 0))}
    found = harness.documents_within(4, tasks)
    assert found == {"many": [0, 2, 5, 7], "few": [0, 1], "none": []}
    assert harness.documents_within(None, tasks) is None
