"""GGUF files of the supported architectures become models with the same logits, which can be expanded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.config import AnyExpand
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.models.families import shape_of
from pipeline.models.gguf import ARCHITECTURES, DEQUANTIZED, MISREAD, MIXTRAL, READ_HERE, TOKENIZERS
from pipeline.models.source import config_of, resolve
from pipeline.stages import expand, load
from tests.plain_settings import model_at
from tests.stages.one_task import make_task
from tests.tiny_families import EXPERTS, SMALL, randomized_model
from tests.tiny_gguf import add_value, write_family_gguf

TOKENS = torch.arange(3, 40)[None]
ROTATION = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}  # no family's default
YARN = {
    "rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0,
    "beta_slow": 2.0, "truncate": False,
}  # fmt: skip
MIXTURE = {"num_local_experts": 3, "num_experts_per_tok": 2}
FAMILY = {**ARCHITECTURES, **READ_HERE, "llama": MIXTRAL}  # of the files that are written here
CASES: dict[str, dict[str, Any]] = {  # what a file can say, by architecture
    "qwen2": {},
    "qwen3": {},
    "qwen2moe": {**EXPERTS, "shared_expert_intermediate_size": 20},
    "qwen3moe": {**EXPERTS, "norm_topk_prob": True},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 256, "head_dim": 4},
    "phi3": {"sliding_window": 8},
    "starcoder2": {"use_bias": True},
    "stablelm": {},
    "gptneox": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "llama": MIXTURE,
    "gpt-oss": {**MIXTURE, "sliding_window": 8, "rope_parameters": YARN},
}
OTHERS = [
    ("phi3", {"sliding_window": None}),
    ("gptneox", {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}),
    ("gpt-oss", {**MIXTURE, "attention_bias": False}),
]


@pytest.mark.parametrize(("architecture", "entries"), [*CASES.items(), *OTHERS])
def test_a_file_becomes_the_model_that_was_converted(
    architecture: str,
    entries: dict[str, Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    expand_settings: Callable[..., AnyExpand],
) -> None:
    sizes = {**SMALL, **({} if architecture in ("stablelm", "gptneox") else ROTATION), **entries}
    if architecture in ("phi3", "starcoder2", "stablelm", "qwen2", "qwen2moe", "gptneox"):
        del sizes["head_dim"]
    if architecture == "gptneox":
        del sizes["num_key_value_heads"]
    original = randomized_model(AutoConfig.for_model(FAMILY[architecture], **sizes))
    original.save_pretrained(tmp_path / "original")
    tiny_tokenizer.save_pretrained(tmp_path / "original")
    write_family_gguf(tmp_path / "original", tmp_path / "model.gguf", architecture)
    known = config_of(resolve(model_at(tmp_path / "model.gguf")))  # what a plan reads
    loaded, out = tmp_path / "load", tmp_path / "expand"
    metrics = load.run(make_task("load", model_at(tmp_path / "model.gguf"), loaded))
    assert metrics["model_type"] == known["model_type"] == FAMILY[architecture]
    assert metrics["parameters"] == shape_of(known).parameters == original.num_parameters()
    written = AutoConfig.from_pretrained(loaded).to_dict()
    assert {name: value for name, value in known.items() if name in written} == {
        name: written[name] for name in known if name in written
    }
    with torch.no_grad():
        expected = original(TOKENS).logits
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(loaded)(TOKENS).logits, expected, atol=1e-4)
        expand.run(
            make_task("expand", expand_settings("llama_pro", new_layers=2, position="top"), out, {"load": loaded})
        )
        deeper = AutoModelForCausalLM.from_pretrained(out)
        assert torch.allclose(deeper(TOKENS).logits, expected, atol=1e-4)
    assert read_json(out / "config.json")["num_hidden_layers"] == SMALL["num_hidden_layers"] + 2


@pytest.mark.parametrize("architecture", ["llama", "gpt-oss"])
def test_quantized_experts_are_dequantized(architecture: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    sizes = {**SMALL, **MIXTURE, "hidden_size": 32, "intermediate_size": 64}  # blocks have 32 weights
    original = randomized_model(AutoConfig.for_model(FAMILY[architecture], **sizes))
    representable = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 16
    for name, parameter in original.named_parameters():
        if "experts" in name and "bias" not in name:
            signs = torch.randint(2, parameter.shape) * 2 - 1
            parameter.data = signs * representable[torch.randint(8, parameter.shape)]
    original.save_pretrained(tmp_path / "original")
    tiny_tokenizer.save_pretrained(tmp_path / "original")
    write_family_gguf(tmp_path / "original", tmp_path / "model.gguf", architecture, gguf.GGMLQuantizationType.MXFP4)
    load.run(make_task("load", model_at(tmp_path / "model.gguf"), tmp_path / "load"))
    expected, loaded = (
        load_file(tmp_path / "original/model.safetensors"),
        load_file(tmp_path / "load/model.safetensors"),
    )
    assert loaded.keys() == expected.keys()  # also the names are those of published checkpoints
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_the_table_of_architectures_is_that_of_transformers() -> None:
    named = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "minimax_m2": "minimax-m2"}
    known = {named.get(name, name) for name in (*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS)}
    # What has no decoder of its own, and gpt_oss, whose experts transformers does not read.
    assert set(ARCHITECTURES) == known - {"general", "tokenizer", "t5", "umt5", "gpt_oss", *MISREAD}
    assert set(MISREAD) <= known
    assert {*ARCHITECTURES, *READ_HERE} <= {*gguf.MODEL_ARCH_NAMES.values(), "mistral"}
    assert set(TOKENIZERS) == set(GGUF_TOKENIZER_TYPES)
    assert set(FAMILY.values()) - {"deci"} <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


COMPLETE = {  # what a file of Mixtral must have
    f"llama.{key}": 4
    for key in (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
        "expert_count", "expert_used_count", "attention.layer_norm_rms_epsilon",
    )
}  # fmt: skip
OPENAI = {
    **{key.replace("llama", "gpt-oss"): value for key, value in COMPLETE.items()}, "gpt-oss.attention.sliding_window": 4
}  # fmt: skip
DTYPES = {"tensor": torch.float32, "integers": torch.int32}


@pytest.mark.parametrize(
    ("architecture", "entries", "rule"),
    [
        ("mpt", {}, "does not read GGUF files of the architecture mpt"),
        ("falcon", {}, "files of the architecture falcon are not supported: .*fused attention weights"),
        ("gemma4", {}, "files of the architecture gemma4 are not supported: .*differ in head size"),
        ("gemma3", {"gemma3.rope.scaling.factor": 8}, r"scales rotary positions \(rope.scaling.factor 8"),
        ("llama", {"tensor": "rope_freqs"}, r"scales rotary positions \(rope_freqs.weight"),
        ("qwen3", {"integers": "output"}, "has tensors of the type 26 of GGML, which is not dequantized"),
        ("gptneox", {}, "has no gptneox.attention.head_count, on which the model depends"),
        ("llama", {**COMPLETE, "llama.expert_weights_scale": 2}, "has llama.expert_weights_scale, and what this"),
        ("llama", {**COMPLETE, "llama.rope.scaling.factor": 8}, "has llama.rope.scaling.factor, and what this"),
        (
            "llama",
            {**COMPLETE, "llama.rope.dimension_count": 3},
            "llama.rope.dimension_count is not the size of a head",
        ),
        ("llama", {**COMPLETE, "llama.rope.sections": [1, 2]}, "has llama.rope.sections, and what this"),
        ("llama", {**COMPLETE, "llama.block_count": [4, 4]}, "llama.block_count is an array, not a positive integer"),
        ("gpt-oss", {"gpt-oss.rope.scaling.type": "yarn"}, "has no gpt-oss.attention.head_count"),
        ("gpt-oss", {**OPENAI, "gpt-oss.rope.scaling.type": "yarn"}, "has no gpt-oss.rope.scaling.factor"),
        ("gpt-oss", {**OPENAI, "gpt-oss.rope.scaling.type": "linear"}, "has gpt-oss.rope.scaling.type, and what this"),
        ("gpt-oss", {**OPENAI, "gpt-oss.attention.sliding_window": 0}, "sliding_window is 0, not a positive integer"),
        ("llama", {**COMPLETE, "tokenizer.ggml.model": "rwkv"}, "has a tokenizer of the kind rwkv, which transformers"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(
    architecture: str, entries: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    for name, value in entries.items():
        if name in ("tensor", "integers"):
            writer.add_tensor(f"{value}.weight", torch.ones(2, dtype=DTYPES[name]).numpy())
        else:
            add_value(writer, name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=rf"model.gguf_file = .*{rule}.*Use the model's safetensors"):
        config_of(resolve(model_at(tmp_path / "model.gguf")))


def test_tensors_that_are_not_those_of_the_metadata_are_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    randomized_model(AutoConfig.for_model(MIXTRAL, **SMALL, **MIXTURE)).save_pretrained(tmp_path / "original")
    tiny_tokenizer.save_pretrained(tmp_path / "original")
    weights = tmp_path / "original/model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.v_proj.bias"] = torch.ones(8)
    tensors["model.layers.1.block_sparse_moe.gate.weight"] = torch.ones(4, 16)
    save_file(tensors, weights)
    write_family_gguf(tmp_path / "original", tmp_path / "model.gguf", "llama")
    with pytest.raises(UserError, match="model.gguf_file = model.gguf.*those of the mixtral model") as refused:
        load.run(make_task("load", model_at(tmp_path / "model.gguf"), tmp_path / "load"))
    assert refused.value.rule.endswith(
        "output_norm.weight is missing; blk.0.attn_v.bias is not in such a model; "
        "blk.1.ffn_gate_inp.weight has the shape [4, 16] and not [3, 16]"
    )
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:-1000])
    with pytest.raises(UserError, match="truncated or damaged"):
        load.run(make_task("load", model_at(tmp_path / "model.gguf"), tmp_path / "load"))


def test_the_types_that_are_dequantized_are_those_of_the_gguf_package() -> None:
    readable = set()
    for type_, (_, size) in gguf.GGML_QUANT_SIZES.items():
        with suppress(NotImplementedError):
            gguf.dequantize(np.zeros((1, size), np.uint8), type_)
            readable.add(type_.name if type_.name in ("F32", "F16", "BF16") else str(type_.value))
    assert readable - {str(gguf.GGMLQuantizationType.NVFP4.value)} == DEQUANTIZED
