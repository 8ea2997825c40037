"""Ranks that share sequences compute the losses, gradients and weights of a single rank.

One launch per number of ranks runs all cases in sequence. The model has fewer key heads than four ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from pipeline.artifacts.task import StageTask
from pipeline.config import Train
from tests.training.forked import ForkedRanks
from tests.training.many_cases import Runs, run_cases
from tests.training.small import VOCABULARY, logged, train_settings, write_grown

pytestmark = pytest.mark.xdist_group("distributed")

STEPS, STOP_AFTER = 3, 2
MakeTask = Callable[..., StageTask]
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=8)),
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**SIZES)),  # gives attention no bounds of documents
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, head_dim=8, num_local_experts=4, router_aux_loss_coef=0.3, sliding_window=None)
    ),
}


@dataclass(frozen=True)
class Case:
    """One way to divide the same training among ranks."""

    ranks: int
    zero: int
    parts: int = 1
    model: str = "llama"
    precision: str = "float32"
    micro_batch: int = 1
    recompute: bool = False
    compile: bool = False

    def settings(self) -> Train:
        overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        return train_settings(
            global_batch=2, steps=STEPS, warmup_fraction=0.0, precision=self.precision, trainable="all",
            sequence_parallel=self.parts,
            micro_batch=self.micro_batch, activation_checkpointing=self.recompute, compile=self.compile,
            evaluate_at=[] if self.compile else [1.0],  # the held-out loss would be compiled separately
            epsilon=1e-5,  # so that AdamW does not amplify the rounding of gradients that are almost zero
            deepspeed={"zero_stage": self.zero, "overrides": overrides},
        )  # fmt: skip


CASES = [
    Case(1, 0),
    *(Case(2, zero, 2) for zero in (0, 2, 3)),
    *(Case(4, zero, parts) for zero, parts in ((0, 2), (2, 4))),
    Case(2, 2, 2, micro_batch=2, recompute=True),
    Case(2, 2, 2, micro_batch=2, recompute=True, compile=True),
    Case(1, 0, precision="bfloat16"),
    Case(2, 2, 2, precision="bfloat16"),
    *(Case(ranks, zero, ranks, model) for ranks, zero in ((1, 0), (2, 2)) for model in ("stablelm", "mixtral")),
]
INTERRUPTED = [Case(2, 2, 2)]
ELASTIC = [Case(4, 3, 2)]  # resumed from two ranks at ZeRO 2, which share sequences


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> dict[str, Path]:
    """Random models of 4 layers."""
    directories = {}
    for name, create in MODELS.items():
        torch.manual_seed(1)
        directories[name] = write_grown(tmp_path_factory.mktemp(name) / "model", tiny_llama_dir, create())
    return directories


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    make_task: MakeTask,
    forked_ranks: ForkedRanks,
    model_dirs: dict[str, Path],
) -> Runs[Case]:
    def make(case: Case, out: Path | None) -> StageTask:
        return make_task(case.settings(), case.ranks, out, model=model_dirs[case.model])

    return run_cases(make, CASES, INTERRUPTED, ELASTIC, STOP_AFTER, forked_ranks, tmp_path_factory.mktemp)


def alone(case: Case) -> Case:
    """Returns the case of a single rank to compare with."""
    return Case(1, 0, model=case.model, precision=case.precision)


SHARED = [case for case in CASES if case.parts > 1]


@pytest.mark.parametrize("case", [case for case in SHARED if case.precision == "float32"], ids=str)
def test_losses_norms_and_weights_are_those_of_one_rank(runs: Runs[Case], case: Case) -> None:
    check_agreement(runs, runs.straight[case], case)


def check_agreement(runs: Runs[Case], ours: StageTask, case: Case) -> None:
    expected = runs.straight[alone(case)]
    for metric in ("loss", "grad_norm") if case.compile else ("loss", "grad_norm", "held_out_loss"):
        assert logged(ours, metric) == pytest.approx(logged(expected, metric), rel=3e-6), metric
    weights = load_file(expected.out / "model.safetensors")
    for name, weight in load_file(ours.out / "model.safetensors").items():
        assert float((weight - weights[name]).abs().max()) < 5e-6, name  # a step is of the size of 1e-3


def test_losses_in_bfloat16_are_those_of_one_rank_up_to_rounding(runs: Runs[Case]) -> None:
    (case,) = (case for case in SHARED if case.precision == "bfloat16")
    assert logged(runs.straight[case], "loss") == pytest.approx(logged(runs.straight[alone(case)], "loss"), rel=5e-3)


def test_the_balance_of_experts_is_that_of_whole_sequences(runs: Runs[Case]) -> None:
    (case,) = (case for case in SHARED if case.model == "mixtral")
    for metric in ("router_aux_loss", "expert_load_max/1", "router_entropy/3"):
        ours, expected = (logged(runs.straight[each], metric) for each in (case, alone(case)))
        assert ours == pytest.approx(expected, rel=1e-5), metric


def test_tokens_and_operations_are_those_of_one_rank(runs: Runs[Case]) -> None:
    for case in SHARED:
        ours, expected = (
            json.loads((runs.straight[each].out / "training.json").read_text()) for each in (case, alone(case))
        )
        assert (ours["tokens"], ours["flops"]) == (expected["tokens"], expected["flops"])


def test_an_interrupted_run_is_bitwise_equal_to_an_uninterrupted_one(runs: Runs[Case]) -> None:
    for case, resumed in runs.resumed.items():
        ours, theirs = (load_file(task.out / "model.safetensors") for task in (resumed, runs.straight[case]))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", ELASTIC, ids=str)
def test_a_run_resumes_with_other_numbers_of_ranks_that_share_sequences(runs: Runs[Case], case: Case) -> None:
    """Four ranks at ZeRO 3 then take the last step."""
    check_agreement(runs, runs.elastic[case], case)
