import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from pipeline.training.deepspeed_config import (
    OVERRIDES,
    deepspeed_config,
    override_faults,
    uses_bfloat16_parameters,
)
from tests.training.small import train_settings


def test_batch_sizes_agree_for_any_number_of_ranks():
    train = train_settings(global_batch=24, micro_batch=3)
    for ranks in (1, 2, 4):
        config = deepspeed_config(train, "float32", ranks)
        product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * ranks
        assert product == config["train_batch_size"] == 24


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_are_accumulated_and_reduced_in_float32(stage: int, precision: str):
    config = deepspeed_config(train_settings(deepspeed={"zero_stage": stage}), precision, 1)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    assert config["zero_optimization"]["stage"] == stage


def test_parameters_stay_float32_at_zero_0():
    """There, DeepSpeed's own bfloat16 mode accumulates gradients in bfloat16."""
    plain, sharded = (train_settings(deepspeed={"zero_stage": stage}) for stage in (0, 1))
    assert not uses_bfloat16_parameters(plain, "bfloat16")
    assert uses_bfloat16_parameters(sharded, "bfloat16")
    assert deepspeed_config(plain, "bfloat16", 1)["bf16"]["enabled"] is False


def test_offload_settings_are_in_the_zero_section():
    settings = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    zero = deepspeed_config(train_settings(deepspeed=settings), "bfloat16", 1)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": False}
    pinned = deepspeed_config(train_settings(deepspeed=settings), "bfloat16", 1, on_gpu=True)["zero_optimization"]
    assert pinned["offload_optimizer"]["pin_memory"] and pinned["offload_param"]["pin_memory"]


def test_bucket_sizes_are_in_the_zero_section():
    settings = {"reduce_bucket_size": 12345, "allgather_bucket_size": 54321}
    zero = deepspeed_config(train_settings(deepspeed=settings), "float32", 1)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (12345, 54321)


def test_a_bucket_holds_a_layer_on_gpus_and_is_fixed_on_cpus():
    settings, layer = train_settings(), 218_112_000

    def buckets(**place: Any) -> list[int]:
        zero = deepspeed_config(settings, "bfloat16", 8, **place)["zero_optimization"]
        return [zero["reduce_bucket_size"], zero["allgather_bucket_size"]]

    assert buckets() == buckets(largest_layer=layer) == buckets(on_gpu=True, largest_layer=1) == [50_000_000] * 2
    assert buckets(on_gpu=True, largest_layer=layer) == [layer] * 2


def test_reductions_overlap_the_backward_pass_on_gpus_only():
    for on_gpu in (False, True):
        zero = deepspeed_config(train_settings(), "bfloat16", 2, on_gpu=on_gpu)["zero_optimization"]
        assert zero.get("overlap_comm", False) is on_gpu and zero["contiguous_gradients"] is True


def test_the_dtype_of_reductions_is_part_of_the_key_unless_it_is_float32():
    usual, rounded = train_settings(), train_settings(deepspeed={"reduce_dtype": "bfloat16"})
    assert deepspeed_config(rounded, "bfloat16", 2)["communication_data_type"] == "bf16"
    assert deepspeed_config(rounded, "bfloat16", 2)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "reduce_dtype" not in usual.key_settings()["deepspeed"]
    assert rounded.key_settings()["deepspeed"]["reduce_dtype"] == "bfloat16"


def test_deepspeed_neither_times_micro_batches_nor_looks_for_overflows():
    config = DeepSpeedConfig(deepspeed_config(train_settings(), "bfloat16", 1))
    assert not config.timers_config.enabled and not config.bfloat16_config.check_grad_overflow


def test_overrides_take_precedence_and_leave_other_settings_unchanged():
    overrides = {"zero_optimization": {"overlap_comm": True}, "gradient_clipping": 7.0}
    config = deepspeed_config(train_settings(deepspeed={"overrides": overrides}), "float32", 1)
    assert config["gradient_clipping"] == 7.0
    usual = deepspeed_config(train_settings(), "float32", 1)["zero_optimization"]
    assert config["zero_optimization"] == {**usual, "overlap_comm": True} and "overlap_comm" not in usual


@pytest.mark.parametrize(
    "overrides, key, remedy",
    [
        ({"optimizer": {"type": "SGD", "params": {"lr": 9}}}, "optimizer", "learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "schedule"),
        ({"train_batch_size": 999}, "train_batch_size", "global_batch"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "micro_batch"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "precision"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads", "precision"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states", "precision"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor", "reduce_dtype"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "max_grad_norm"),
        ({"disable_allgather": True}, "disable_allgather", "Remove"),  # DeepSpeed reads it, but nothing uses it
        (
            {"zero_optimization": {"reduce_bucket_size": 0}},
            "zero_optimization.reduce_bucket_size",
            "reduce_bucket_size",
        ),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer", "offload_optimizer"),
        ({"fp16": {"enabled": True}}, "fp16", "precision"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage", "zero_stage"),
        ({"nonsense_key": 1}, "nonsense_key", "spelling"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com", "spelling"),
        ({"zero_optimization": {"overlap_comm": "auto"}}, "zero_optimization.overlap_comm", "Correct"),
        ({"zero_optimization": True}, "zero_optimization", "Correct"),
        ({"gradient_clipping": float("inf")}, "gradient_clipping", "Correct"),
        ({"steps_per_print": -1}, "steps_per_print", "Correct"),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "data_types.grad_accum_dtype", "Correct"),
    ],
)
def test_overrides_without_an_effect_are_refused(overrides: dict[str, Any], key: str, remedy: str):
    (fault,) = override_faults("sft", {**overrides, "log_level": "info", "dump_state": False})
    assert (fault.setting, fault.value) == ("sft.deepspeed.overrides", key) and remedy in fault.remedy


def _fields(module: str, name: str) -> set[str]:
    """Returns the fields of one of DeepSpeed's configuration classes, by their aliases, without importing it."""
    spec = find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / module).read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    fields = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
            alias = [key.value.value for key in keywords if key.arg == "alias" and isinstance(key.value, ast.Constant)]
            fields[node.target.id] = alias[0] if alias else node.target.id
    return set(fields.values())


def test_accepted_overrides_exist_in_deepspeed():
    zero = OVERRIDES["zero_optimization"]
    assert set(zero) <= _fields("runtime/zero/config.py", "DeepSpeedZeroConfig")
    assert set(zero["offload_param"]) <= _fields("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig")
    optimizer = _fields("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig")
    assert set(zero["offload_optimizer"]) <= optimizer
    assert set(OVERRIDES["bf16"]) <= _fields("runtime/precision_config.py", "DeepSpeedBF16Config")
    spec = find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    sources = [*Path(spec.origin).parent.rglob("constants.py"), *Path(spec.origin).parent.glob("runtime/*onfig*.py")]
    text = "".join(path.read_text() for path in sources)
    assert not [name for name in OVERRIDES if f'"{name}"' not in text and f"'{name}'" not in text]
