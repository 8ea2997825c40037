"""Whatever config.json contains, it is refused with one message or means what it means to json and transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.models.families import family_for, shape_of
from pipeline.models.layer_config import explicit_config, rebuild_config
from pipeline.models.loading import build_on_meta, is_tied, quiet_transformers
from pipeline.models.quantization import check_quantization
from pipeline.models.source import ModelSource, config_of, refuse_code
from tests.fuzz.limits import examples, outcome
from tests.fuzz.strategies import damaged, encoded, literals, object_text, plain
from tests.plain_settings import model_at
from tests.tiny_families import SMALL, TINY_CONFIGS

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "gpt_neox", "mixtral", "qwen3_moe", "phi3")
# Entries that transformers itself reads, whatever the family.
OTHERS = (
    "n_layer", "n_embd", "num_layers", "hidden_dim", "num_local_experts", "num_experts", "torch_dtype", "dtype",
    "auto_map",
    "architectures", "quantization_config", "text_config", "vision_config", "rope_scaling", "rope_parameters",
    "rope_theta", "_attn_implementation", "attn_implementation", "_name_or_path", "transformers_version", "is_decoder",
    "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "num_labels", "id2label", "label2id",
    "problem_type", "pruned_heads", "chunk_size_feed_forward", "use_return_dict", "return_dict", "output_attentions",
    "output_hidden_states", "torchscript", "use_bfloat16", "base_model_tp_plan", "model_type", "_commit_hash",
    "return_unused_kwargs", "gguf_file", "layer_types", "sliding_window_pattern", "max_length", "do_sample", "",
    "__class__", "to_dict", "name_or_path", "num_key_value_heads", "head_dim", "pad_token_id",
)  # fmt: skip
# Of the right type for some entry, though perhaps not for the one that gets it.
PLAUSIBLE = st.sampled_from(
    ["null", "true", "false", *map(str, (0, 1, 2, 3, 4, 5, 8, 16, 384)), "0.5", "1000000.0", "[0, 2]", "[]", "{}",
        "[1]",
     '["full_attention", "sliding_attention"]', json.dumps(["full_attention"] * 4),
     '{"rope_type": "linear", "factor": 2.0}',
     *(json.dumps(family) for family in FAMILIES), '"silu"', '"gelu"', '"float16"', '"eager"', '"4"', "[2, 3]"]
)  # fmt: skip


@cache
def _config(family: str) -> dict[str, Any]:
    config: dict[str, Any] = AutoConfig.for_model(family, **{**SMALL, **TINY_CONFIGS[family]}).to_diff_dict()
    return {**config, "model_type": family}


@st.composite
def _changed(draw: st.DrawFn) -> bytes:
    """A config of a tiny model with some entries changed, added, repeated or left out."""
    pairs = [(name, json.dumps(value)) for name, value in _config(draw(st.sampled_from(FAMILIES))).items()]
    for _ in range(draw(st.integers(0, 3))):
        names = st.sampled_from([name for name, _ in pairs] or [""]) | st.sampled_from(OTHERS)
        name, at = draw(names), draw(st.integers(0, len(pairs)))
        value = draw(literals() | PLAUSIBLE)
        match draw(st.sampled_from(["set", "set", "repeat", "remove"])):
            case "set":
                pairs = [(other, value) for other, value in pairs if other != name] + [(name, value)]
            case "repeat":
                pairs.insert(at, (name, value))
            case "remove":
                pairs = [(other, value) for other, value in pairs if other != name]
    return encoded(object_text(pairs))


def _read(source: ModelSource) -> dict[str, Any]:
    """What the plan and the load stage do with a config, in their order."""
    config = config_of(source)
    refuse_code(model_at(source.directory), config)
    check_quantization(config, model_at(source.directory))
    family_for(config)
    shape_of(config)
    assert source.directory is not None
    built = build_on_meta(source.directory)
    return {"config": config, "built": built}


def _check(content: bytes, directory: Path) -> None:
    path = directory / "config.json"
    path.write_bytes(content)
    read = outcome(lambda: _read(ModelSource("directory", directory, names=("config.json", "model.safetensors"))))
    if isinstance(read, UserError):
        return
    config, built = read["config"], read["built"]
    assert plain({name: config[name] for name in json.loads(content)}) == plain(json.loads(content.decode()))
    assert read_json(path) == json.loads(content.decode())
    write_json(directory / "copy.json", read_json(path))  # as the load stage does
    for name in ("num_hidden_layers", "vocab_size", "hidden_size"):
        assert config.get(name, getattr(built.config, name)) == getattr(built.config, name)
    shape = shape_of(config)
    parameters = {name: tuple(tensor.shape) for name, tensor in built.named_parameters()}
    assert {name: size for name, _, size in shape.tensors()} == parameters
    assert (shape.head == family_for(config).embeddings) == is_tied(built)
    _check_deeper(directory, config)


def _check_deeper(directory: Path, config: dict[str, Any]) -> None:
    """A model with every layer twice is what transformers builds from the config that expanding writes."""
    sources = [layer for layer in range(config["num_hidden_layers"]) for _ in range(2)]
    write_json(directory / "config.json", rebuild_config(explicit_config(directory), sources))
    deeper = build_on_meta(directory)
    parameters = {name: tuple(tensor.shape) for name, tensor in deeper.named_parameters()}
    assert {name: size for name, _, size in shape_of(config).with_layers(sources).tensors()} == parameters


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers prints the whole config for many odd entries."""
    with quiet_transformers():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only names of weights are read: those of a model whose experts, if any, are stored together."""
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("config")
    save_file({"a": torch.zeros(1)}, place / "model.safetensors")
    return place


@examples(50)
@given(st.data())
def test_damaged_text(place: Path, data: st.DataObject) -> None:
    text = json.dumps(_config(data.draw(st.sampled_from(FAMILIES))), indent=data.draw(st.sampled_from([None, 2])))
    _check(data.draw(damaged(text.encode())), place)


@examples(110)
@given(_changed())
def test_odd_entries(place: Path, content: bytes) -> None:
    _check(content, place)
