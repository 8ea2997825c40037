"""Training gives the same results for all ZeRO stages, numbers of ranks and micro-batches, and after interruptions.

One launch per number of ranks runs all cases in sequence. The oracle is a plain torch loop that computes all logits at
once, with an explicit attention mask and without DeepSpeed.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.artifacts.task import StageTask
from pipeline.config import Train
from tests.training.forked import ForkedRanks
from tests.training.many_cases import Runs, run_cases
from tests.training.naive_loop import naive_batches, naive_loss, naive_rate
from tests.training.small import NEW_LAYERS, logged, train_settings

pytestmark = pytest.mark.xdist_group("distributed")  # one launch of workers serves all cases

STEPS = 4
WARMUP = 1  # of the steps
STOP_AFTER = 2
MakeTask = Callable[..., StageTask]


@dataclass(frozen=True)
class Case:
    """One configuration of the same training."""

    ranks: int
    zero: int
    precision: str = "float32"
    micro_batch: int = 1
    recompute: bool = False
    offload: bool = False
    trainable: str = "auto"
    batch: int = 4

    def settings(self) -> Train:
        # By default ZeRO 3 does not partition tensors as small as these.
        overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        return train_settings(
            global_batch=self.batch, steps=STEPS, warmup_fraction=WARMUP / STEPS, precision=self.precision,
            micro_batch=self.micro_batch, activation_checkpointing=self.recompute, trainable=self.trainable,
            deepspeed={
                "zero_stage": self.zero, "overrides": overrides, "offload_optimizer": self.offload,
                "offload_parameters": self.offload and self.zero == 3,
            },
        )  # fmt: skip


def case_of(ranks: int, zero: int, precision: str, recompute: bool) -> Case:
    # Rounding errors of bfloat16 average out over tokens, so these cases have twice as many.
    return Case(ranks, zero, precision, 2 if recompute else 1, recompute, batch=8 if precision == "bfloat16" else 4)


# With two ranks, all stages in both precisions. One rank takes the same code with nothing to exchange, so that one
# precision per stage is enough. Each value of a setting meets each value of every other.
MATRIX = [
    *(case_of(1, zero, ("float32", "bfloat16")[zero % 2], recompute=zero >= 2) for zero in range(4)),
    *(
        case_of(2, zero, precision, recompute=(zero % 2 == 1) == (precision == "bfloat16"))
        for zero, precision in itertools.product(range(4), ("float32", "bfloat16"))
    ),
]
EXACT_8 = Case(1, 2, batch=8)
BFLOAT16_3 = case_of(2, 3, "bfloat16", recompute=True)
CASES = [
    *MATRIX,
    EXACT_8,
    *(Case(2, zero, trainable="all") for zero in (0, 2, 3)),
    *(Case(2, zero, offload=True) for zero in (2, 3)),
    Case(1, 2, micro_batch=4),
    Case(2, 2),
]
INTERRUPTED = [BFLOAT16_3, case_of(2, 0, "float32", recompute=True), Case(2, 2, offload=True)]
# How a checkpoint of two ranks at ZeRO 2 is resumed. Four ranks at ZeRO 3 are in test_sequence_parallel.py.
ELASTIC = [Case(1, 2), Case(4, 2), Case(2, 3), Case(1, 0), replace(BFLOAT16_3, ranks=1)]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    make_task: MakeTask,
    forked_ranks: ForkedRanks,
    blocks_dir: Path,
    splits_dir: Path,
) -> Runs[Case]:
    def make(case: Case, out: Path | None) -> StageTask:
        data = splits_dir if (case.precision, case.trainable) == ("float32", "auto") else blocks_dir
        return make_task(case.settings(), case.ranks, out, data=data)

    return run_cases(make, CASES, INTERRUPTED, ELASTIC, STOP_AFTER, forked_ranks, tmp_path_factory.mktemp)


# ------------------------------------------------------------------------------------------- oracle


@dataclass(frozen=True)
class Reference:
    """The ``trainable`` setting, and the loss and gradient norms of every step."""

    trainable: str
    losses: list[float]
    norms: list[dict[str, float]]


@pytest.fixture(scope="module", params=["auto", "all"])
def reference(request: pytest.FixtureRequest, grown_dir: Path, blocks_dir: Path) -> Reference:
    """Trains with a plain float32 loop."""
    train = Case(1, 0, trainable=request.param).settings()
    model = AutoModelForCausalLM.from_pretrained(grown_dir, dtype=torch.float32, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train.trainable == "all" or any(f"layers.{layer}." in name for layer in NEW_LAYERS))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim == 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.epsilon, foreach=False)
    losses, norms = [], []
    for step, batch in enumerate(naive_batches(blocks_dir, train)):
        loss = naive_loss(model, *batch)
        loss.backward()
        norms.append(naive_norms(model))
        torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = naive_rate(step + 1, STEPS, WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Reference(request.param, losses, norms)


def naive_norms(model: torch.nn.Module) -> dict[str, float]:
    """Returns gradient norms before clipping: the total, those of the new layers' outputs, and that of the rest."""
    outputs = {f"layers.{layer}.{name}" for layer in NEW_LAYERS for name in ("self_attn.o_proj", "mlp.down_proj")}
    groups: dict[str, list[torch.Tensor]] = {"o_proj": [], "down_proj": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            place = name.removeprefix("model.").removesuffix(".weight")
            groups[place.rpartition(".")[2] if place in outputs else "rest"].append(parameter.grad.flatten())
    norms = {f"grad_norm/{group}": torch.cat(gradients).norm().item() for group, gradients in groups.items()}
    return {**norms, "grad_norm": math.hypot(*norms.values())}


# -------------------------------------------------------------------------------------------- tests


def float32_cases(trainable: str) -> list[Case]:
    wanted = (trainable, "float32", 4)
    return [case for case in CASES if (case.trainable, case.precision, case.batch) == wanted]


def test_float32_losses_equal_those_of_a_plain_loop(runs: Runs, reference: Reference):
    cases, expected = float32_cases(reference.trainable), reference.losses
    assert len(cases) >= 3
    for case in cases:
        assert logged(runs.straight[case], "loss") == pytest.approx(expected, rel=1e-6), case
    assert min(expected[3:]) < expected[0] - 0.1  # the loss decreases, so a wrong gradient would be detected


def test_gradient_norms_by_group_equal_those_of_a_plain_loop(runs: Runs, reference: Reference):
    limit = Case(1, 0).settings().max_grad_norm
    assert any(norms["grad_norm"] > limit for norms in reference.norms)  # so clipping has taken place
    for case in float32_cases(reference.trainable):
        for name in ("grad_norm", "grad_norm/o_proj", "grad_norm/down_proj", "grad_norm/rest"):
            expected = [norms[name] for norms in reference.norms]
            assert logged(runs.straight[case], name) == pytest.approx(expected, rel=1e-4), (case, name)


def test_bfloat16_losses_agree_across_stages_and_ranks(runs: Runs):
    losses = {case: logged(runs.straight[case], "loss") for case in MATRIX if case.precision == "bfloat16"}
    assert {case.zero for case in losses if case.ranks == 2} == set(range(4))
    expected = logged(runs.straight[EXACT_8], "loss")
    for case, found in losses.items():
        assert found == pytest.approx(expected, rel=1e-3), case


def test_held_out_loss_and_counters_agree(runs: Runs):
    base = runs.straight[Case(1, 0)]
    for case in float32_cases("auto"):
        for name in ("held_out_loss", "learning_rate", "tokens", "flops"):
            assert logged(runs.straight[case], name) == pytest.approx(logged(base, name), rel=1e-4), (case, name)


def test_the_losses_of_held_out_blocks_equal_those_of_a_plain_model(runs: Runs, grown_dir: Path, blocks_dir: Path):
    """Before training, in every block, for all numbers of ranks and micro-batches, which three blocks do not fill."""
    arrays = [
        np.load(blocks_dir / f"held_out.{name}.npy")[[0, 1, 3]] for name in ("input_ids", "position_ids", "loss_mask")
    ]
    model = AutoModelForCausalLM.from_pretrained(grown_dir, dtype=torch.float32, attn_implementation="eager")
    batches = [[torch.from_numpy(row[None].astype(np.int64)) for row in rows] for rows in zip(*arrays, strict=True)]
    targets = [int(mask.sum()) for _, _, mask in batches]
    with torch.no_grad():
        expected = [naive_loss(model, *batch).item() * count for batch, count in zip(batches, targets, strict=True)]
    for case in float32_cases("auto"):
        entries = json.loads((runs.straight[case].out / "training.json").read_text())["held_out"]
        assert entries[0]["blocks"]["loss"] == {"losses": pytest.approx(expected, rel=1e-5), "targets": targets}, case
        for entry in entries:
            losses = np.array(entry["blocks"]["loss"]["losses"])
            assert entry["loss"] == pytest.approx(losses.sum() / sum(targets))
            residuals = losses - entry["loss"] * np.array(targets)
            assert entry["loss_stderr"] == pytest.approx((3 / 2 * (residuals**2).sum()) ** 0.5 / sum(targets))
        assert logged(runs.straight[case], "held_out_loss_stderr") == [entry["loss_stderr"] for entry in entries]


def test_the_loss_of_every_split_is_computed_alike(runs: Runs):
    """In ``splits_dir``, the validation blocks are copies of the held-out ones, and the others are not."""
    tasks = [runs.straight[case] for case in float32_cases("auto")]
    for task in tasks:
        assert logged(task, "validation_loss") == logged(task, "held_out_loss") != logged(task, "forgetting_loss")
        entries = json.loads((task.out / "training.json").read_text())["held_out"]
        assert [entry["validation_loss"] for entry in entries] == [entry["loss"] for entry in entries]
        assert logged(task, "forgetting_loss") == [entry["forgetting_loss"] for entry in entries]
        assert logged(task, "forgetting_loss") == pytest.approx(logged(tasks[0], "forgetting_loss"), rel=1e-4)


def test_frozen_tensors_are_bitwise_unchanged(runs: Runs, grown_dir: Path):
    base = load_file(grown_dir / "model.safetensors")
    new = {name for name in base if any(f"layers.{layer}." in name for layer in NEW_LAYERS)}
    for case, task in runs.straight.items():
        trained = load_file(task.out / "model.safetensors")
        assert trained.keys() == base.keys()  # no second copy of the tied head
        changed = {name for name in base if not torch.equal(trained[name], base[name])}
        assert changed == (new if case.trainable == "auto" else base.keys()), case


def test_master_weights_are_loaded_from_the_files_in_float32(runs: Runs, grown_dir: Path):
    """With bfloat16 compute, the exported float32 weights still have digits that bfloat16 cannot represent."""
    base = load_file(grown_dir / "model.safetensors")
    trained = load_file(runs.straight[BFLOAT16_3].out / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    moved = (trained[name] - base[name]).abs().max()
    assert moved <= 1.1 * sum(logged(runs.straight[BFLOAT16_3], "learning_rate")) * 1.5
    assert not torch.equal(trained[name], trained[name].bfloat16().float())


@pytest.mark.parametrize("case", INTERRUPTED, ids=str)
def test_an_interrupted_run_is_bitwise_equal_to_an_uninterrupted_one(runs: Runs, case: Case):
    straight, resumed = runs.straight[case], runs.resumed[case]
    for name in ("loss", "learning_rate", "grad_norm", "tokens", "flops", "held_out_loss"):
        assert logged(resumed, name) == logged(straight, name), name
    assert logged(resumed, "step") == logged(straight, "step")
    ours, theirs = (load_file(task.out / "model.safetensors") for task in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", ELASTIC, ids=str)
def test_a_checkpoint_resumes_with_other_numbers_of_ranks_and_zero_stages(runs: Runs, case: Case):
    exact = case.precision == "float32"
    expected = logged(runs.straight[Case(1, 0) if exact else EXACT_8], "loss")
    assert logged(runs.elastic[case], "loss") == pytest.approx(expected, **({"abs": 2e-6} if exact else {"rel": 1e-3}))


def test_training_json_summarizes_the_run(runs: Runs):
    task = runs.straight[BFLOAT16_3]
    summary = json.loads((task.out / "training.json").read_text())
    assert (summary["steps"], summary["world_size"], summary["zero_stage"]) == (STEPS, 2, 3)
    assert summary["precision"] == "bfloat16"
    assert summary["tokens"] == STEPS * 8 * 32
    assert [entry["step"] for entry in summary["held_out"]] == [0, STEPS]
    assert summary["trainable_parameters"] * 2 == summary["total_parameters"] - 384 * 33 - 33
    assert summary["peak_memory_bytes"] > 0
    assert summary["checkpoints"]["saved"] == 1 and summary["checkpoints"]["seconds"] > 0
    float32_state = 3 * 4 * summary["trainable_parameters"]  # weights and two moments; the overhead is small
    assert float32_state < summary["checkpoints"]["bytes"] < 1.1 * float32_state + 16384
    assert summary["mfu"] == pytest.approx(
        summary["flops"] / summary["seconds"] / summary["peak_flops_per_second"]["rate"]
    )
    assert summary["peak_flops_per_second"]["source"].startswith("measured: bfloat16")
    assert AutoModelForCausalLM.from_pretrained(task.out).config.num_hidden_layers == 4


def test_no_pickle_file_is_written(runs: Runs):
    for task in (*runs.straight.values(), *runs.resumed.values()):
        assert {path.suffix for path in task.out.rglob("*") if path.is_file()} <= {
            ".safetensors", ".json", ".jsonl", ".jinja", ".log", ".sha256"
        }  # fmt: skip
