"""Mixtures of experts train, however their experts are stored, and are exported as they were stored.

One launch per number of ranks runs all cases in sequence. The oracle is a plain torch loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.artifacts.task import StageTask
from pipeline.config import Train
from pipeline.models.forward import packed_mask
from tests.tiny_families import tiny_model
from tests.training.forked import ForkedRanks
from tests.training.many_cases import Runs, run_cases
from tests.training.naive_loop import naive_balance_loss, naive_batches, naive_loss, naive_rate
from tests.training.small import NEW_LAYERS, logged, train_settings, write_grown

pytestmark = pytest.mark.xdist_group("distributed")

STEPS, STOP_AFTER = 2, 1
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"decoder_sparse_step": 2},
    "olmoe": {},
    "gpt_oss": {},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 4,
    },
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "ernie4_5_moe": {
        "moe_num_experts": 3, "moe_k": 2, "moe_intermediate_size": 12, "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
}  # fmt: skip
MakeTask = Callable[..., StageTask]


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained."""

    family: str
    ranks: int = 1
    zero: int = 2
    stacked: bool = False  # stored as transformers holds it
    trainable: str = "new_layers"
    balance: float | None = None

    def settings(self) -> Train:
        # By default ZeRO 3 does not partition tensors as small as these.
        overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        deepspeed = {"zero_stage": self.zero, "overrides": overrides}
        return train_settings(
            steps=STEPS, micro_batch=2, warmup_fraction=0.0, trainable=self.trainable, snapshot_at=[0.5],
            evaluate_at=[], deepspeed=deepspeed, router_aux_loss=self.balance,
        )  # fmt: skip


APART, STACKED = Case("qwen2_moe", trainable="all", balance=0.5), Case("mixtral", stacked=True, balance=0.5)
MATRIX = [
    replace(case, ranks=ranks, zero=zero)
    for case in (APART, STACKED)
    for ranks, zero in itertools.chain([(1, 0)], itertools.product((2,), range(4)))
]
CASES = [*(Case(family) for family in FAMILIES), *MATRIX]
INTERRUPTED = [*(Case(family) for family in FAMILIES), replace(APART, ranks=2, zero=3)]
ELASTIC = [replace(APART, zero=3), replace(STACKED, zero=0)]  # resumed from two ranks at ZeRO 2


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Callable[[Case], Path]:
    """A random model, of which layers 1 and 3 are new."""
    saved: dict[tuple[str, bool], Path] = {}

    def make(case: Case) -> Path:
        key = (case.family, case.stacked)
        if key not in saved:
            model = tiny_model(case.family, **FAMILIES[case.family])
            directory = tmp_path_factory.mktemp("mixture") / "model"
            saved[key] = write_grown(directory, tiny_llama_dir, model, save_original_format=not case.stacked)
        return saved[key]

    return make


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    make_task: MakeTask,
    forked_ranks: ForkedRanks,
    model_of: Callable[[Case], Path],
) -> Runs[Case]:
    def make(case: Case, out: Path | None) -> StageTask:
        return make_task(case.settings(), case.ranks, out, model=model_of(case))

    return run_cases(make, CASES, INTERRUPTED, ELASTIC, STOP_AFTER, forked_ranks, tmp_path_factory.mktemp)


def naive_balance(
    model: PreTrainedModel, case: Case, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Returns the load-balancing loss of the routers that train."""
    own_mask = packed_mask(model, positions)
    output = model.model(input_ids=ids, position_ids=positions, attention_mask=own_mask, output_router_logits=True)
    sparse = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    logits = dict(zip(sparse, output.router_logits, strict=True))
    trained = sparse if case.trainable == "all" else [layer for layer in sparse if layer in NEW_LAYERS]
    return naive_balance_loss([logits[i] for i in trained], model.config.num_experts_per_tok, positions, mask)


def naive_losses(case: Case, model_dir: Path, blocks_dir: Path) -> list[float]:
    """Trains with a plain float32 loop on transformers' model, and returns the losses of all steps."""
    train = case.settings()
    assert case.balance is not None
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if case.trainable == "all" or any(f"layers.{layer}." in name for layer in NEW_LAYERS)
    ]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in trained))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = [p for p in trained if p.ndim > 1 and not names[id(p)].endswith("bias")]
    others = [p for p in trained if not any(p is each for each in decayed)]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.epsilon, foreach=False)
    losses = []
    for step, batch in enumerate(naive_batches(blocks_dir, train), start=1):
        loss = naive_loss(model, *batch)
        optimizer.zero_grad()
        (loss + case.balance * naive_balance(model, case, *batch)).backward()
        torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = naive_rate(step, STEPS, 0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("case", [APART, STACKED], ids=lambda case: case.family)
def test_losses_equal_those_of_a_plain_loop(
    runs: Runs[Case], case: Case, model_of: Callable[[Case], Path], blocks_dir: Path
) -> None:
    expected = naive_losses(case, model_of(case), blocks_dir)
    for each in (each for each in MATRIX if each.family == case.family):
        assert logged(runs.straight[each], "loss") == pytest.approx(expected, rel=2e-6), each
    for each in (each for each in ELASTIC if each.family == case.family):
        assert logged(runs.elastic[each], "loss") == pytest.approx(expected, rel=2e-6), each


def test_router_metrics_are_those_of_the_global_batch(runs: Runs[Case]) -> None:
    base = runs.straight[replace(STACKED, zero=0)]
    names = [f"{name}/{i}" for i in NEW_LAYERS for name in ("expert_load_max", "expert_load_min", "router_entropy")]
    for case in (case for case in MATRIX if case.family == STACKED.family):
        for name in (*names, "router_aux_loss"):
            assert logged(runs.straight[case], name) == pytest.approx(logged(base, name), rel=1e-4), (case, name)
    assert all(1.0 < value < 1.5 for value in logged(base, "expert_load_max/1"))  # of 3 experts, 2 per token
    assert all(0.5 < value <= 1.0 for value in logged(base, "router_entropy/3"))
    assert not logged(base, "router_entropy/0")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_trained_tensors_change_and_all_keep_their_stored_names(
    runs: Runs[Case], case: Case, model_of: Callable[[Case], Path]
) -> None:
    """A snapshot has the stored names, too. The export check has loaded the result with plain transformers."""
    base, out = load_file(model_of(case) / "model.safetensors"), runs.straight[case].out
    trained = {name for name in base if case.trainable == "all" or any(f"layers.{i}." in name for i in NEW_LAYERS)}
    trained -= {name for name in base if name.endswith("e_score_correction_bias")}  # gradients do not reach it
    exported = load_file(out / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in exported.items()} == {
        n: (t.dtype, t.shape) for n, t in base.items()
    }
    assert {name for name in base if not torch.equal(exported[name], base[name])} == trained
    snapshot = load_file(out / "on_the_way" / "50" / "model.safetensors")
    assert snapshot.keys() == trained
    assert not any(torch.equal(snapshot[name], exported[name]) for name in trained)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("case", INTERRUPTED, ids=str)
def test_an_interrupted_run_is_bitwise_equal_to_an_uninterrupted_one(runs: Runs[Case], case: Case) -> None:
    straight, resumed = runs.straight[case], runs.resumed[case]
    assert logged(resumed, "loss") == logged(straight, "loss")
    ours, theirs = (load_file(task.out / "model.safetensors") for task in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
