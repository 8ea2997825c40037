"""Checks the entries of a model's config.json before anything is built from them, without transformers.

The plan works out every tensor from these entries, so that a number with a digit too many would exhaust the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError, bad_model

# Smallest and largest value by name. Modules are built one by one, so fewer of them are allowed than entries of a
# tensor.
MAX_MODULES, MAX_SIZE = 10_000, 2**31 - 1
DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
INTEGERS = {
    **dict.fromkeys((*DEPTH_NAMES, "num_attention_heads", "num_key_value_heads"), (1, MAX_MODULES)),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "num_labels"), (0, MAX_MODULES)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "vocab_size"), (1, MAX_SIZE)),
    **dict.fromkeys(("moe_intermediate_size", "max_position_embeddings"), (1, MAX_SIZE)),
    **dict.fromkeys(("shared_expert_intermediate_size", "decoder_sparse_step"), (0, MAX_SIZE)),
}
BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qkv_bias")
EXPERTS = ("num_experts", "num_local_experts")  # two names of one entry
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def depth_name(config: Mapping[str, Any]) -> str | None:
    """Returns the name of the entry with the number of layers, which some families have under an older name."""
    return next((name for name in DEPTH_NAMES if config.get(name) is not None), None)


# Entries of Qwen2.5-VL's published configs that are not those of its language model.
_OF_OUTER = (
    "architectures", "dtype", "image_token_id", "quantization_config", "tie_word_embeddings", "torch_dtype",
    "transformers_version", "video_token_id", "vision_config", "vision_end_token_id", "vision_start_token_id",
    "vision_token_id",
)  # fmt: skip


def as_nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with the entries of a language model inside the model in ``text_config``.

    Qwen2.5-VL was published without it, and transformers writes it.
    """
    if config.get("model_type") != "qwen2_5_vl" or "text_config" in config:
        return dict(config)
    outer = {name: value for name, value in config.items() if name in _OF_OUTER}
    inner = {name: value for name, value in config.items() if name not in _OF_OUTER}
    return {**outer, "model_type": "qwen2_5_vl", "text_config": {**inner, "model_type": "qwen2_5_vl_text"}}


def is_nested(config: Mapping[str, Any]) -> bool:
    """Returns whether a model is a language model inside another one, which has a config of its own for it."""
    return depth_name(config) is None and isinstance(config.get("text_config"), Mapping)


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a model's language model, which is the model itself unless it is nested."""
    return dict(config["text_config"] if is_nested(config) else config)


def with_language_config(config: Mapping[str, Any], language: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with another config of its language model. The inverse of ``language_config``."""
    return {**config, "text_config": dict(language)} if is_nested(config) else dict(language)


def depth_of(config: Mapping[str, Any]) -> int:
    """Returns the number of layers of a config that ``check_config`` accepts."""
    language = language_config(config)
    name = depth_name(language)
    assert name is not None
    return int(language[name])


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Checks the family, the sizes and the token ids of a config.

    Args:
        config: the content of a config.json, or the corresponding entries of a GGUF file.
        where: the model, for messages.

    Raises:
        UserError: an entry is missing, has another type than transformers accepts, or is out of range.
    """
    _check_family(config, where)
    if is_nested(config):
        check_config({**config["text_config"], "text_config": None}, f"{where}, text_config")
        return
    for name, (smallest, largest) in INTEGERS.items():
        if (value := config.get(name)) is None:
            continue
        if type(value) is not int or not smallest <= value <= largest:
            raise _wrong(where, name, value, f"an integer from {smallest} to {largest}")
    for name in BOOLEANS:
        if not isinstance(config.get(name), bool | None):
            raise _wrong(where, name, config[name], "true or false")
    for name in TOKEN_IDS:
        _check_token_ids(config, name, where)
    experts = {config[name] for name in EXPERTS if config.get(name) is not None}
    if len(experts) > 1:
        raise _wrong(where, EXPERTS[0], config[EXPERTS[0]], f"equal to {EXPERTS[1]}, since both name the same number")


def _check_family(config: Mapping[str, Any], where: object) -> None:
    if depth_name(config) is None and not is_nested(config):
        rule = "its config.json has no num_hidden_layers, so it is not a plain causal language model"
        raise bad_model(where, rule, "Set model.path to a decoder-only language model.")
    if not isinstance(config.get("model_type"), str):
        rule = "its config.json has no model_type, which names the model's family"
        raise bad_model(where, rule, 'Add the entry, for example "model_type": "llama".')


def _check_token_ids(config: Mapping[str, Any], name: str, where: object) -> None:
    """Checks special tokens. A negative id means no token, but must be a valid index of the embeddings as well."""
    value, vocabulary = config.get(name), config.get("vocab_size") or MAX_SIZE
    ids = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
    if any(type(token) is not int or not -vocabulary <= token < vocabulary for token in ids):
        raise _wrong(where, name, value, f"below vocab_size, which is {vocabulary}, or null")


def custom_classes(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> list[str]:
    """Returns the classes in ``auto_map`` that transformers does not have itself.

    Many models whose family is now part of transformers still name the code of their first release, with the same
    names of classes.

    Args:
        config: the content of config.json.
        tokenizer_config: the content of tokenizer_config.json; empty if there is none.
    """
    family = config["model_type"].removesuffix("_text").replace("_", "").lower()
    own = {"AutoModelForCausalLM": [f"{family}forcausallm"], "AutoConfig": [f"{family}config", f"{family}textconfig"]}
    maps = [values.get("auto_map") for values in (config, tokenizer_config)]
    named = {name: value for entries in maps if isinstance(entries, dict) for name, value in entries.items()}
    return [
        str(named[name])
        for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        if name in named and str(named[name]).rpartition(".")[2].lower() not in own.get(name, [])
    ]


def _wrong(where: object, name: str, value: object, rule: str) -> UserError:
    shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
    return bad_model(where, f"its config.json has {name} = {shown}, which must be {rule}", "Correct its config.json.")
