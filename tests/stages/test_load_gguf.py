"""GGUF files of the architectures that transformers reads become models with the same logits, which can be expanded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.config import AnyExpand
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.models.gguf import ARCHITECTURES, MISREAD
from pipeline.models.source import config_of, resolve
from pipeline.stages import expand, load
from tests.plain_settings import model_at
from tests.stages.one_task import make_task
from tests.tiny_families import EXPERTS, SMALL, randomized_model
from tests.tiny_gguf import write_family_gguf

TOKENS = torch.arange(3, 40)[None]
ROTATION = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}  # no family's default
CASES: dict[str, dict[str, Any]] = {  # what a file can say, by architecture
    "qwen2": {},
    "qwen3": {},
    "qwen2moe": {**EXPERTS, "shared_expert_intermediate_size": 20},
    "qwen3moe": {**EXPERTS, "norm_topk_prob": True},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 256, "head_dim": 4},
    "phi3": {"sliding_window": 8},
    "starcoder2": {"use_bias": True},
    "stablelm": {},
}


@pytest.mark.parametrize(("architecture", "entries"), [*CASES.items(), ("phi3", {"sliding_window": None})])
def test_a_file_becomes_the_model_that_was_converted(
    architecture: str,
    entries: dict[str, Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    expand_settings: Callable[..., AnyExpand],
) -> None:
    sizes = {**SMALL, **entries, **({} if architecture == "stablelm" else ROTATION)}
    if architecture in ("phi3", "starcoder2", "stablelm", "qwen2", "qwen2moe"):
        del sizes["head_dim"]
    original = randomized_model(AutoConfig.for_model(ARCHITECTURES[architecture], **sizes))
    original.save_pretrained(tmp_path / "original")
    tiny_tokenizer.save_pretrained(tmp_path / "original")
    write_family_gguf(tmp_path / "original", tmp_path / "model.gguf", architecture)
    known = config_of(resolve(model_at(tmp_path / "model.gguf")))  # what a plan reads
    loaded, out = tmp_path / "load", tmp_path / "expand"
    metrics = load.run(make_task("load", model_at(tmp_path / "model.gguf"), loaded))
    assert metrics["model_type"] == known["model_type"] == ARCHITECTURES[architecture]
    assert metrics["parameters"] == original.num_parameters()
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


def test_the_table_of_architectures_is_that_of_transformers() -> None:
    named = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "minimax_m2": "minimax-m2"}
    known = {named.get(name, name) for name in (*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS)}
    # What has no decoder of its own, and gpt_oss, whose experts are not read: their names are not in gguf's table.
    assert set(ARCHITECTURES) == known - {"general", "tokenizer", "t5", "umt5", "gpt_oss", *MISREAD}
    assert set(MISREAD) <= known
    assert set(ARCHITECTURES) <= {*gguf.MODEL_ARCH_NAMES.values(), "mistral"}
    assert set(ARCHITECTURES.values()) - {"deci"} <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize(
    ("architecture", "entries", "rule"),
    [
        ("gptneox", {}, "does not read GGUF files of the architecture gptneox"),
        ("gpt-oss", {}, "does not read GGUF files of the architecture gpt-oss"),
        ("falcon", {}, "files of the architecture falcon are not supported: .*fused attention weights"),
        ("gemma4", {}, "files of the architecture gemma4 are not supported: .*differ in head size"),
        ("llama", {"llama.expert_count": 8}, "a mixture of experts of the architecture llama"),
        ("gemma3", {"gemma3.rope.scaling.factor": 8}, r"scales rotary positions \(rope.scaling.factor 8"),
        ("llama", {"tensor": "rope_freqs"}, r"scales rotary positions \(rope_freqs.weight"),
    ],
)
def test_what_transformers_does_not_read_is_refused(
    architecture: str, entries: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    for name, value in entries.items():
        if name == "tensor":
            writer.add_tensor(f"{value}.weight", torch.ones(2).numpy())
        else:
            writer.add_uint32(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=rf"model.gguf_file = .*{rule}.*Use the model's safetensors"):
        config_of(resolve(model_at(tmp_path / "model.gguf")))
