import pytest
import torch

from pipeline.training.memory import OutOfMemoryFailure, named_when_out_of_memory
from pipeline.training.validate import less_memory
from tests.training.small import train_settings


def test_the_allocators_error_names_the_settings_that_need_less():
    train = train_settings(global_batch=12, micro_batch=4, deepspeed={"zero_stage": 2})
    with pytest.raises(OutOfMemoryFailure) as error, named_when_out_of_memory("pretrain", train, ranks=2):
        torch.empty(2**55)  # the real one, of this system's allocator
    message = str(error.value)
    for setting in ("micro_batch=3", "activation_checkpointing=true", "deepspeed.zero_stage=3"):
        assert f"pretrain.{setting}" in message
    assert "goes on where it stood" in message


def test_a_gpus_error_is_known_too():
    said = "CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(OutOfMemoryFailure, match=said), named_when_out_of_memory("sft", train_settings(), ranks=1):
        raise torch.OutOfMemoryError(f"{said}\nGPU 0 has ...")


@pytest.mark.parametrize("kind", [RuntimeError, RecursionError, torch.distributed.DistBackendError])
def test_other_errors_pass(kind: type[RuntimeError]):
    with pytest.raises(kind, match="a defect"), named_when_out_of_memory("sft", train_settings(), 1):
        raise kind("a defect")


@pytest.mark.parametrize(
    "changes, processes, named",
    [
        ({"micro_batch": 1, "activation_checkpointing": True}, 1, ["deepspeed.offload_optimizer=true"]),
        ({"micro_batch": 4, "deepspeed": {"zero_stage": 0}}, 1, ["micro_batch=2", "activation_checkpointing=true"]),
        ({"micro_batch": 1, "activation_checkpointing": True, "deepspeed": {"zero_stage": 3}}, 2,
         ["deepspeed.offload_optimizer=true", "deepspeed.offload_parameters=true"]),
    ],
)  # fmt: skip
def test_only_what_is_not_set_yet_is_named(changes: dict, processes: int, named: list[str]):
    sentence = less_memory("pretrain", train_settings(**changes), processes)
    assert [part.strip(" ;,.") for part in sentence.split() if "=" in part] == [f"pretrain.{name}" for name in named]


def test_when_all_is_set_the_sequence_is_what_remains():
    everything = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    train = train_settings(micro_batch=1, activation_checkpointing=True, deepspeed=everything)
    assert "shorter pretrain.sequence_length" in less_memory("pretrain", train, 2)
