import pytest

from pipeline.training.deepspeed_config import deepspeed_config, merge, uses_bfloat16_parameters
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
    assert deepspeed_config(plain, "bfloat16", 1)["bf16"] == {"enabled": False}


def test_offload_settings_are_in_the_zero_section():
    settings = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    zero = deepspeed_config(train_settings(deepspeed=settings), "bfloat16", 1)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu"}


def test_bucket_sizes_are_in_the_zero_section():
    settings = {"reduce_bucket_size": 12345, "allgather_bucket_size": 54321}
    zero = deepspeed_config(train_settings(deepspeed=settings), "float32", 1)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (12345, 54321)


def test_overrides_take_precedence_and_leave_other_settings_unchanged():
    overrides = {"zero_optimization": {"overlap_comm": False}, "gradient_clipping": 7.0}
    config = deepspeed_config(train_settings(deepspeed={"overrides": overrides}), "float32", 1)
    assert config["gradient_clipping"] == 7.0
    changed = config["zero_optimization"]
    assert changed.pop("overlap_comm") is False
    assert changed == deepspeed_config(train_settings(), "float32", 1)["zero_optimization"]


def test_merge_does_not_modify_its_arguments():
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}
