"""Which entries of a config.json are rejected before anything is built from them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.models.config_json import check_config, custom_classes

VALID = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 32, "vocab_size": 384, "pad_token_id": -1}


@pytest.mark.parametrize(
    "entry",
    [
        {"num_hidden_layers": value} for value in ("4", 4.0, True, 0, -1, 10**9, [4], None)
    ] + [
        {"vocab_size": 10**12}, {"num_attention_heads": 10**9}, {"num_labels": 10**9}, {"head_dim": 0},
        {"pad_token_id": 384}, {"pad_token_id": "2"}, {"pad_token_id": -400}, {"pad_token_id": True},
        {"num_experts": 3, "num_local_experts": 4}, {"eos_token_id": [2, 384]},
        {"tie_word_embeddings": "false"}, {"model_type": None}, {"model_type": ["llama"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_entry_is_rejected_by_its_name(entry: dict[str, Any]) -> None:
    check_config(VALID, "a model")
    with pytest.raises(UserError, match=rf"model.path = a model: .*{next(iter(entry))}"):
        check_config({**VALID, **entry}, "a model")


@pytest.mark.parametrize(
    ("family", "auto_map", "custom"),
    [
        ("phi3", {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "m.Phi3ForCausalLM"}, []),
        ("gemma3_text", {"AutoConfig": "c.Gemma3TextConfig", "AutoModelForCausalLM": "m.Gemma3ForCausalLM"}, []),
        ("gpt_neox", {"AutoModelForCausalLM": "organization/code--m.GPTNeoXForCausalLM"}, []),
        ("llama", {"AutoModelForCausalLM": "m.LlamaForCausalLM", "AutoModel": "m.Unused"}, []),
        ("llama", {"AutoModelForCausalLM": "m.Other"}, ["m.Other"]),
        (
            "llama",
            {"AutoModelForCausalLM": ["m.Other"], "AutoConfig": "m.OtherConfig"},
            ["m.OtherConfig", "['m.Other']"],
        ),
        ("llama", None, []),
    ],
)
def test_only_classes_that_transformers_lacks_are_custom(family: str, auto_map: Any, custom: list[str]) -> None:
    assert custom_classes({"model_type": family, "auto_map": auto_map}, {}) == custom
    assert custom_classes({"model_type": family}, {"auto_map": {"AutoTokenizer": "t.Own"}}) == ["t.Own"]
