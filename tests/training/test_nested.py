"""Language models inside other models train as they would alone, and are exported inside the unchanged outer model.

One launch per number of ranks runs all cases in sequence. The oracle is the same training of the language model alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from pipeline.artifacts.task import StageTask
from pipeline.config import Train
from pipeline.evaluation.lm import LanguageModel
from pipeline.models.loading import load_language_model
from tests.tiny_nested import tiny_outer
from tests.training.forked import ForkedRanks
from tests.training.many_cases import Runs, run_cases
from tests.training.small import NEW_LAYERS, logged, train_settings, write_grown

pytestmark = pytest.mark.xdist_group("distributed")

PREFIXES = {"gemma3": "language_model.", "mistral3": "language_model.", "llava": "language_model.", "qwen2_5_vl": ""}
TOKENS = torch.arange(3, 40)[None]


@dataclass(frozen=True)
class Case:
    """A family, and how its language model is trained."""

    family: str
    alone: bool = False  # the language model by itself
    trainable: str = "new_layers"
    ranks: int = 1
    zero: int = 2

    def settings(self) -> Train:
        return train_settings(
            steps=2, micro_batch=2, trainable=self.trainable, snapshot_at=[0.5], evaluate_at=[],
            deepspeed={"zero_stage": self.zero},
        )  # fmt: skip


CASES = [Case("gemma3", trainable="all"), Case("mistral3"), Case("llava", trainable="head+/mlp/"), Case("qwen2_5_vl")]
SHARDED = Case("gemma3", ranks=2, zero=3)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Callable[[str, bool], Path]:
    """A random model, of which layers 1 and 3 are new, or its language model."""

    @cache
    def make(family: str, alone: bool) -> Path:
        directory = tmp_path_factory.mktemp(family) / "model"
        model = load_language_model(make(family, False), torch.float32) if alone else tiny_outer(family)
        # transformers would undo the renaming with which the language model was read.
        return write_grown(directory, tiny_llama_dir, model, save_original_format=not alone)

    return make


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    make_task: Callable[..., StageTask],
    forked_ranks: ForkedRanks,
    model_of: Callable[[str, bool], Path],
) -> Runs[Case]:
    def make(case: Case, out: Path | None) -> StageTask:
        return make_task(case.settings(), case.ranks, out, model=model_of(case.family, case.alone))

    cases = [replace(case, alone=alone) for case in [*CASES, SHARDED] for alone in (False, True)]
    return run_cases(make, cases, [], [], 1, forked_ranks, tmp_path_factory.mktemp)


@pytest.mark.parametrize("case", [*CASES, SHARDED], ids=str)
def test_training_is_that_of_the_language_model_alone(
    runs: Runs[Case], case: Case, model_of: Callable[[str, bool], Path]
) -> None:
    base, prefix = model_of(case.family, False), PREFIXES[case.family]
    out, alone = runs.straight[case].out, runs.straight[replace(case, alone=True)].out
    assert logged(runs.straight[case], "loss") == logged(runs.straight[replace(case, alone=True)], "loss")

    before, after = (load_file(path / "model.safetensors") for path in (base, out))
    inside = {prefix + name: tensor for name, tensor in load_file(alone / "model.safetensors").items()}
    assert before.keys() == after.keys() > inside.keys()
    assert all(torch.equal(after[name], inside.get(name, before[name])) for name in before)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    if case.trainable == "new_layers":
        assert changed == {name for name in inside if any(f".layers.{layer}." in name for layer in NEW_LAYERS)}
    assert changed and changed <= inside.keys()

    snapshot, expected = (load_file(path / "on_the_way" / "50" / "model.safetensors") for path in (out, alone))
    assert snapshot.keys() == changed == {prefix + name for name in expected}
    assert all(torch.equal(snapshot[prefix + name], tensor) for name, tensor in expected.items())
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_the_export_is_a_complete_model_and_scores_texts_as_its_language_model_does(
    runs: Runs[Case], case: Case
) -> None:
    out, alone = (runs.straight[replace(case, alone=each)].out for each in (False, True))
    model, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inner: PreTrainedModel = load_language_model(alone, torch.float32)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, inner(TOKENS).logits)
    requests = [(("", ""), [3, 4, 5], [6, 7]), (("", ""), [9, 8], [7])]
    scores, expected = (
        LanguageModel(path, torch.float32, "cpu", batch_size=2)._loglikelihood_tokens(requests) for path in (out, alone)
    )
    assert scores == expected
