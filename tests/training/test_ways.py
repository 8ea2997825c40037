"""Ways to train apart from AdamW with one rate: each equals a plain loop, for all ZeRO stages and numbers of ranks.

The model stores query, key and value as one tensor, and gate and up. The oracle updates every part of them as a tensor
of its own. One launch per number of ranks runs all cases in sequence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from pipeline.artifacts.task import StageTask
from pipeline.config import Train
from tests.training.forked import ForkedRanks
from tests.training.many_cases import Runs, run_cases
from tests.training.naive_loop import naive_batches, naive_loss, naive_rate
from tests.training.small import NEW_LAYERS, VOCABULARY, logged, train_settings, write_blocks, write_grown

pytestmark = pytest.mark.xdist_group("distributed")

STEPS, STOP_AFTER = 4, 2
HEADS, GROUPS, SIZE, UNITS = 3, 1, 8, 40
WAYS: dict[str, dict[str, Any]] = {
    "words": {"trainable": "new_layers+embeddings+norms"},
    "corpus": {"corpus_fraction": 0.3},
    "rates and averages": {
        "trainable": "all", "base_learning_rate": 2.5e-4, "role_learning_rates": {"q": 2.0, "gate": 3.0, "o": 0.5},
        "ema_decay": 0.8, "snapshot_at": [0.5],
    },
    # The partition of the second rank begins in the middle of a group, which is inside a matrix if three layers train.
    "muon": {
        "optimizer": "muon", "trainable": r"layers\.[012]\.|norm|embed", "role_learning_rates": {"q": 2.0, "o": 0.5},
    },
    "two optimizers": {
        "optimizer": "muon_new_layers", "trainable": "layers", "base_learning_rate": 2.5e-4,
        "newton_schulz_steps": 3,
    },
}  # fmt: skip
MakeTask = Callable[..., StageTask]


@dataclass(frozen=True)
class Case:
    """One way to train on some ranks, at a ZeRO stage."""

    way: str
    ranks: int
    zero: int
    precision: str = "float32"

    def settings(self) -> Train:
        overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        deepspeed = {"zero_stage": self.zero, "overrides": overrides}
        return train_settings(
            steps=STEPS,
            warmup_fraction=0.0,
            precision=self.precision,
            evaluate_at=[1.0],
            deepspeed=deepspeed,
            **WAYS[self.way],
        )


def averaged(ranks: int, zero: int, precision: str = "float32") -> Case:
    return Case("rates and averages", ranks, zero, precision)


def muon(ranks: int, zero: int, precision: str = "float32") -> Case:
    return Case("muon", ranks, zero, precision)


CASES = [
    Case("words", 2, 2),
    Case("corpus", 2, 2),
    *(averaged(ranks, zero) for ranks, zero in ((1, 0), (2, 1), (2, 2), (2, 3))),
    *(muon(ranks, zero) for ranks, zero in ((1, 0), (2, 1), (2, 2))),
    Case("two optimizers", 2, 2),
    averaged(2, 1, "bfloat16"),
    muon(2, 1, "bfloat16"),
    muon(2, 2, "bfloat16"),
]
INTERRUPTED = [Case("corpus", 2, 2), averaged(2, 2), averaged(2, 3), muon(2, 2), muon(2, 1, "bfloat16")]
ELASTIC = [averaged(1, 0), muon(1, 0)]  # resumed from two ranks at ZeRO 2


@pytest.fixture(scope="module")
def fused_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A random Phi-3 of 4 layers, of which 1 and 3 are new."""
    torch.manual_seed(1)
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=HEADS * SIZE, intermediate_size=UNITS, num_hidden_layers=4,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=256, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return write_grown(tmp_path_factory.mktemp("fused") / "model", tiny_llama_dir, Phi3ForCausalLM(config))


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of another length than those that they are mixed into, with other tokens."""
    text = np.random.default_rng(5).integers(3, VOCABULARY, 9 * 40).tolist()
    return write_blocks(tmp_path_factory.mktemp("corpus"), blocks=7, held_out=2, length=40, text=text)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    make_task: MakeTask,
    forked_ranks: ForkedRanks,
    fused_dir: Path,
    corpus_dir: Path,
) -> Runs[Case]:
    def make(case: Case, out: Path | None) -> StageTask:
        corpus = {"corpus": corpus_dir} if case.settings().corpus_fraction else {}
        return make_task(case.settings(), case.ranks, out, model=fused_dir, **corpus)

    return run_cases(make, CASES, INTERRUPTED, ELASTIC, STOP_AFTER, forked_ranks, tmp_path_factory.mktemp)


# ------------------------------------------------------------------------------------------- oracle


@dataclass(frozen=True)
class Part:
    """A part of a parameter, which the oracle updates by itself."""

    parameter: nn.Parameter
    rows: slice
    leaf: nn.Parameter


@dataclass(frozen=True)
class Reference:
    """The losses of all steps, and the weights to export, or their averages, after every step."""

    losses: list[float]
    weights: list[dict[str, torch.Tensor]]


def roles_and_rows(name: str) -> dict[str, slice]:
    """Returns the rows of the parts of a parameter of Phi-3, by role."""
    queries, keys = HEADS * SIZE, GROUPS * SIZE
    if "qkv_proj" in name:
        return {"q": slice(0, queries), "k": slice(queries, queries + keys), "v": slice(queries + keys, None)}
    if "gate_up_proj" in name:
        return {"gate": slice(0, UNITS), "up": slice(UNITS, None)}
    return {"o" if "o_proj" in name else "other": slice(None)}


@pytest.fixture(scope="module", params=list(WAYS))
def reference(
    request: pytest.FixtureRequest, fused_dir: Path, blocks_dir: Path, corpus_dir: Path
) -> tuple[str, Reference]:
    return request.param, naive_training(Case(request.param, 1, 0).settings(), fused_dir, blocks_dir, corpus_dir)


class NaiveMuon(torch.optim.Optimizer):
    """Computes the iteration on the singular values in float64."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (weight,) = group["params"]
            state = self.state[weight]
            state["momentum"] = 0.95 * state.get("momentum", 0.0) + 0.05 * weight.grad
            u, s, v = torch.linalg.svd((0.05 * weight.grad + 0.95 * state["momentum"]).double(), full_matrices=False)
            s = s / s.square().sum().sqrt()
            for _ in range(group["newton_schulz_steps"]):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            update = 0.2 * math.sqrt(max(weight.shape)) * (u * s) @ v
            weight.copy_(weight - group["lr"] * (update + group["weight_decay"] * weight))


def trains(trainable: str, name: str, is_new: bool) -> bool:
    if trainable == "new_layers+embeddings+norms":
        return is_new or "embed_tokens" in name or "norm" in name
    return trainable == "all" or (is_new if trainable == "auto" else re.search(trainable, name) is not None)


def naive_training(train: Train, model_dir: Path, blocks_dir: Path, corpus_dir: Path) -> Reference:
    """Trains with a plain float32 loop."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    parts: list[Part] = []
    groups: list[dict[str, Any]] = []
    matrices: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        is_new = any(f"layers.{layer}." in name for layer in NEW_LAYERS)
        parameter.requires_grad_(trains(train.trainable, name, is_new))
        if not parameter.requires_grad:
            continue
        for role, rows in roles_and_rows(name).items():
            parts.append(Part(parameter, rows, nn.Parameter(parameter.detach()[rows].clone())))
            multiple = 1.0 if is_new or train.base_learning_rate is None else train.base_learning_rate / 1e-3
            by_muon = {"adamw": False, "muon": "embed" not in name, "muon_new_layers": is_new}[train.optimizer]
            is_matrix = by_muon and parameter.ndim == 2
            (matrices if is_matrix else groups).append({
                "params": [parts[-1].leaf], "weight_decay": train.weight_decay if parameter.ndim == 2 else 0.0,
                "multiple": multiple * train.role_learning_rates.get(role, 1.0),
            })  # fmt: skip
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.epsilon, foreach=False)
    ]
    if matrices:
        optimizers.append(NaiveMuon(matrices, {"newton_schulz_steps": train.newton_schulz_steps}))
    losses, weights = [], [{name: parameter.detach().clone() for name, parameter in model.named_parameters()}]
    for step, batch in enumerate(naive_batches(blocks_dir, train, corpus_dir), start=1):
        loss = naive_loss(model, *batch)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], train.max_grad_norm)
        for part in parts:
            part.leaf.grad = part.parameter.grad[part.rows].clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = naive_rate(step, STEPS, 0) * group["multiple"]
            optimizer.step()
        with torch.no_grad():
            for part in parts:
                part.parameter[part.rows] = part.leaf
        decay = train.ema_decay or 0.0
        weights.append({
            name: decay * weights[-1][name] + (1 - decay) * parameter.detach()
            for name, parameter in model.named_parameters()
        })  # fmt: skip
    return Reference(losses, weights)


# -------------------------------------------------------------------------------------------- tests


def test_losses_and_weights_equal_those_of_a_plain_loop(runs: Runs, reference: tuple[str, Reference]) -> None:
    way, expected = reference
    for case in (case for case in CASES if case.way == way and case.precision == "float32"):
        assert logged(runs.straight[case], "loss") == pytest.approx(expected.losses, rel=2e-6), case
        for name, weight in load_file(runs.straight[case].out / "model.safetensors").items():
            difference = float((weight - expected.weights[-1][name]).abs().max())
            assert difference < 3e-6, (case, name)  # a step is of the size of 1e-3


def test_bfloat16_losses_equal_those_in_float32_up_to_rounding(runs: Runs, reference: tuple[str, Reference]) -> None:
    way, expected = reference
    for case in (case for case in CASES if case.way == way and case.precision == "bfloat16"):
        assert logged(runs.straight[case], "loss") == pytest.approx(expected.losses, rel=5e-3), case


@pytest.mark.parametrize("case", INTERRUPTED, ids=str)
def test_an_interrupted_run_is_bitwise_equal_to_an_uninterrupted_one(runs: Runs, case: Case) -> None:
    straight, resumed = runs.straight[case], runs.resumed[case]
    assert logged(resumed, "loss") == logged(straight, "loss")
    ours, theirs = (load_file(task.out / "model.safetensors") for task in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", ELASTIC, ids=str)
def test_a_checkpoint_resumes_with_other_numbers_of_ranks_and_zero_stages(runs: Runs, case: Case) -> None:
    expected = logged(runs.straight[replace(case, ranks=1, zero=0)], "loss")
    assert logged(runs.elastic[case], "loss") == pytest.approx(expected, rel=1e-5)


def test_training_json_records_the_rates_of_parts(runs: Runs) -> None:
    found = json.loads((runs.straight[averaged(2, 2)].out / "training.json").read_text())
    multiples = found["learning_rate_multiples"]
    assert multiples["model.layers.1.self_attn.qkv_proj.weight"] == {"q": 2.0, "k": 1.0, "v": 1.0}
    assert multiples["model.layers.0.mlp.gate_up_proj.weight"] == {"gate": 0.75, "up": 0.25}
    assert multiples["model.layers.0.self_attn.o_proj.weight"] == 0.125
    assert "model.layers.1.mlp.down_proj.weight" not in multiples


def test_snapshots_are_averages_too(runs: Runs, fused_dir: Path, blocks_dir: Path, corpus_dir: Path) -> None:
    expected = naive_training(averaged(1, 0).settings(), fused_dir, blocks_dir, corpus_dir).weights
    for case in (averaged(2, 2), averaged(2, 3)):
        snapshot = load_file(runs.straight[case].out / "on_the_way" / "50" / "model.safetensors")
        assert snapshot.keys() == expected[0].keys()
        for name, weight in snapshot.items():
            torch.testing.assert_close(weight, expected[STEPS // 2][name], rtol=0, atol=3e-6)
            assert (weight - expected[STEPS][name]).abs().max() > 3e-5


def test_the_held_out_loss_of_averages_is_that_of_the_exported_model(runs: Runs, blocks_dir: Path) -> None:
    arrays = [np.load(blocks_dir / f"held_out.{name}.npy") for name in ("input_ids", "position_ids", "loss_mask")]
    ids, positions, mask = (torch.from_numpy(array[[0, 1, 3]].astype(np.int64)) for array in arrays)
    for case in (averaged(1, 0), averaged(2, 2), averaged(2, 3)):
        out = runs.straight[case].out
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
        found = json.loads((out / "training.json").read_text())
        assert found["ema"]["decay"] == 0.8
        assert found["ema"]["held_out_loss"] == pytest.approx(naive_loss(model, ids, positions, mask).item(), rel=1e-5)
        assert found["ema"]["held_out_loss"] != pytest.approx(found["held_out"][-1]["loss"], rel=1e-4)
