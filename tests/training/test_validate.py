import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.launch.machine import Machine
from pipeline.models.families import shape_of
from pipeline.training.attention_support import attention_faults
from pipeline.training.validate import shared_model_faults, training_faults, validate_corpus, validate_data
from tests.plain_settings import cpu_launch
from tests.training.small import train_settings, write_blocks

MACHINE = Machine(cores=2, gpus=0)
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 64, "head_dim": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
}  # fmt: skip


def validate(*arguments: Any) -> None:
    """Raises the first fault."""
    for fault in training_faults(*arguments):
        raise fault


def test_valid_settings_have_no_faults():
    validate("pretrain", train_settings(), cpu_launch(2), 32, MACHINE)
    validate("pretrain", train_settings(trainable=r"layers\.3\."), cpu_launch(1), None, MACHINE)
    # A role that only an inferred family has, as DeepSeek-V3. The model's roles are checked by requested_multiples.
    validate("pretrain", train_settings(role_learning_rates={"kv_b": 2.0}), cpu_launch(1), None, MACHINE)
    complete = {"schedule": "warmup_stable_decay", "warmup_fraction": 0.7, "decay_fraction": 0.3}
    validate("pretrain", train_settings(**complete), cpu_launch(1), None, MACHINE)


@pytest.mark.parametrize(
    "changes, processes, setting, remedy",
    [
        ({"sequence_length": 33}, 1, "sequence_length", "sequence_length=32"),
        ({"global_batch": 6, "micro_batch": 4}, 1, "global_batch", "micro_batch=2 or 3 or 6"),
        ({"global_batch": 4, "micro_batch": 1}, 3, "global_batch", "global_batch=3"),
        ({"deepspeed": {"offload_parameters": True}}, 1, "deepspeed.offload_parameters", "zero_stage=3"),
        ({"deepspeed": {"zero_stage": 0, "offload_optimizer": True}}, 1, "deepspeed.offload_optimizer", "zero_stage=2"),
        ({"trainable": "layers.(3"}, 1, "trainable", "Correct the expression"),
        (
            {"schedule": "warmup_stable_decay", "warmup_fraction": 0.7, "decay_fraction": 0.4},
            1,
            "decay_fraction",
            "decay_fraction=0.3 or less",
        ),
        ({"float32_products": True, "deepspeed": {"zero_stage": 0}}, 1, "float32_products", "float32_products=false"),
        ({"compile": True, "deepspeed": {"zero_stage": 3}}, 1, "compile", "zero_stage=2"),
        ({"deepspeed": {"hpz_partition_size": 2}}, 2, "deepspeed.hpz_partition_size", "zero_stage=3"),
        (
            {"deepspeed": {"hpz_partition_size": 4, "zero_stage": 3}},
            2,
            "deepspeed.hpz_partition_size",
            "hpz_partition_size=1 or 2",
        ),
        ({"sequence_parallel": 3}, 2, "sequence_parallel", "sequence_parallel=1 or 2"),
        ({"sequence_parallel": 3, "global_batch": 6}, 6, "sequence_parallel", "sequence_parallel=1 or 2"),
        ({"sequence_parallel": 2, "attention": "sdpa"}, 2, "sequence_parallel", "attention=auto"),
    ],
)
def test_invalid_settings_are_refused_with_a_remedy(changes: dict, processes: int, setting: str, remedy: str):
    with pytest.raises(UserError) as error:
        validate("pretrain", train_settings(**changes), cpu_launch(processes), 32, MACHINE)
    assert error.value.setting == f"pretrain.{setting}"
    assert remedy in error.value.remedy


@pytest.mark.parametrize(
    "stage, zero, rule",
    [
        (2, {"offload_optimizer": {"ratio": 0.5}}, "only ZeRO 3 can offload a part"),
        (3, {"offload_optimizer": {"ratio": 1.5}}, "between 0 and 1"),
        (3, {"zero_quantized_weights": True}, "on GPUs only"),
        (3, 3, "it must be a section"),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}, {"optimizer": "muon"}], ids=str)
def test_overrides_that_deepspeed_would_reject_are_one_fault(stage: int, zero: Any, rule: str, changes: dict):
    settings = train_settings(deepspeed={"zero_stage": stage, "overrides": {"zero_optimization": zero}}, **changes)
    faults = list(training_faults("pretrain", settings, cpu_launch(1), None, MACHINE))
    (found,) = [fault for fault in faults if fault.setting == "pretrain.deepspeed.overrides"]
    assert rule in found.rule


def test_the_ranks_of_all_nodes_count_towards_the_batch():
    two_nodes = Machine(cores=2, gpus=0, nodes=2)
    validate("pretrain", train_settings(global_batch=4, micro_batch=1), cpu_launch(2), 32, two_nodes)
    with pytest.raises(UserError, match="4 process"):
        validate("pretrain", train_settings(global_batch=6, micro_batch=1), cpu_launch(2), 32, two_nodes)


def test_ranks_that_share_sequences_count_once_towards_the_batch():
    validate("pretrain", train_settings(global_batch=2, sequence_parallel=2), cpu_launch(4), 32, MACHINE)
    with pytest.raises(UserError, match=r"3 group\(s\) of 2 processes times micro_batch=1"):
        validate("pretrain", train_settings(global_batch=4, sequence_parallel=2), cpu_launch(6), 32, MACHINE)


@pytest.mark.parametrize(
    "heads, key_heads, ranks, possible",
    [
        (32, 8, 16, None),  # key heads are repeated
        (32, 8, 3, "1 or 2 or 4 or 8 or 16 or 32"),
        (12, 3, 2, "1 or 3 or 6 or 12"),
        (4, 4, 8, "1 or 2 or 4"),
    ],
)
def test_ranks_that_share_sequences_divide_the_heads(heads: int, key_heads: int, ranks: int, possible: str | None):
    config = {**LLAMA, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    faults = list(shared_model_faults("pretrain", train_settings(sequence_parallel=ranks), shape_of(config), config))
    remedies = [] if possible is None else [f"Set pretrain.sequence_parallel={possible}."]
    assert [fault.remedy for fault in faults] == remedies
    assert all(f"{heads} query heads and {key_heads} key heads" in fault.rule for fault in faults)


def test_rotary_embeddings_that_depend_on_the_longest_document_are_refused_only_for_shared_sequences():
    for entries in ({"rope_scaling": {"type": "longrope"}}, {"rope_parameters": {"full": {"rope_type": "dynamic"}}}):
        config = {**LLAMA, **entries}
        for ranks, expected in ((1, []), (2, ["Set pretrain.sequence_parallel=1."])):
            settings = train_settings(sequence_parallel=ranks)
            faults = list(shared_model_faults("pretrain", settings, shape_of(config), config))
            assert [fault.remedy for fault in faults] == expected


@pytest.mark.parametrize(
    "model, changes, device, setting",
    [
        ({"model_type": "llama"}, {"sequence_parallel": 2}, "cpu", None),
        ({"model_type": "mistral", "sliding_window": 16}, {}, "cpu", None),
        ({"model_type": "mistral", "sliding_window": 16}, {"sequence_parallel": 2}, "cuda", None),
        ({"model_type": "mistral", "sliding_window": 16}, {"sequence_parallel": 2}, "cpu", "sequence_parallel"),
        ({"model_type": "gemma2"}, {"sequence_parallel": 2}, "cpu", "sequence_parallel"),
        ({"model_type": "gpt_oss"}, {"sequence_parallel": 2, "attention": "documents"}, "cuda", "attention"),
        ({"model_type": "llama"}, {"attention": "flex"}, "cpu", "attention"),
        ({"model_type": "granite", "attention_dropout": 0.1}, {}, "cuda", None),
        ({"model_type": "granite", "attention_dropout": 0.1}, {"attention": "flex"}, "cuda", "attention"),
        ({"model_type": "granite", "attention_dropout": 0.1}, {"attention": "documents"}, "cpu", "attention"),
        ({"model_type": "granite", "attention_dropout": 0.1}, {"sequence_parallel": 2}, "cuda", "sequence_parallel"),
    ],
)
def test_attention_that_cannot_compute_the_model_is_refused(
    model: dict[str, Any], changes: dict[str, Any], device: str, setting: str | None
):
    faults = list(attention_faults("pretrain", train_settings(**changes), model, device))
    assert [fault.setting for fault in faults] == ([] if setting is None else [f"pretrain.{setting}"])


def test_compiling_on_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch):
    validate("pretrain", train_settings(compile=True), cpu_launch(1), 32, Machine(cores=2, gpus=0))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler was not found"):
        validate("pretrain", train_settings(compile=True), cpu_launch(1), 32, Machine(cores=2, gpus=0))


def test_compiling_is_the_default_on_gpus_below_zero_3_and_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch):
    gpus, launch = Machine(cores=2, gpus=2), cpu_launch(2).model_copy(update={"device": "cuda"})
    auto, at_zero_3 = train_settings(), train_settings(deepspeed={"zero_stage": 3})
    assert auto.compile == "auto"
    assert [auto.compiles("cuda"), at_zero_3.compiles("cuda"), auto.compiles("cpu")] == [True, False, False]
    assert not train_settings(compile=False).compiles("cuda") and train_settings(compile=True).compiles("cpu")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match="pretrain.compile = auto.*no-such-compiler was not found.*compile=false"):
        validate("pretrain", auto, launch, 32, gpus)
    validate("pretrain", at_zero_3, launch, 32, gpus)
    validate("pretrain", auto, launch, 32, gpus, True)  # submitted from a machine without a compiler
    validate("pretrain", auto, cpu_launch(1), 32, MACHINE)


def write_model(directory: Path, vocab_size: int = 384) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return directory


@pytest.mark.parametrize("sizes, split", [({"blocks": 0}, "train"), ({"held_out": 0}, "held_out")])
def test_an_empty_split_is_refused(tmp_path: Path, sizes: dict, split: str):
    data = write_blocks(tmp_path / "data", **sizes)
    with pytest.raises(UserError, match=f"{split} split") as error:
        validate_data("pretrain", train_settings(), data, write_model(tmp_path / "model"))
    assert error.value.setting == "data.corpus"


def test_an_empty_held_out_split_is_accepted_without_evaluations(tmp_path: Path):
    data = write_blocks(tmp_path / "data", held_out=0)
    validate_data("pretrain", train_settings(evaluate_at=[]), data, write_model(tmp_path / "model"))


def test_data_without_targets_are_refused(tmp_path: Path):
    data = write_blocks(tmp_path / "data", length=1)
    with pytest.raises(UserError, match="0 supervised tokens"):
        validate_data("sft", train_settings(), data, write_model(tmp_path / "model"))


def test_a_tokenizer_with_too_many_tokens_is_refused(tmp_path: Path):
    data = write_blocks(tmp_path / "data")
    with pytest.raises(UserError, match="vocabulary has only 100"):
        validate_data("pretrain", train_settings(), data, write_model(tmp_path / "model", vocab_size=100))


def test_a_corpus_that_does_not_fill_a_sequence_is_refused(tmp_path: Path) -> None:
    corpus = write_blocks(tmp_path / "corpus", blocks=3, length=16)
    validate_corpus("sft", train_settings(sequence_length=48, corpus_fraction=0.5), corpus)
    with pytest.raises(UserError, match="48 training tokens, and a sequence has 49"):
        validate_corpus("sft", train_settings(sequence_length=49, corpus_fraction=0.5), corpus)
