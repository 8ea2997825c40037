"""Checks the entries of a model's config.json before anything is built from them, without transformers.

The plan works out every tensor from these entries, so that a number with a digit too many would exhaust the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

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


def depth_of(config: Mapping[str, Any]) -> int:
    """Returns the number of layers of a config that ``check_config`` accepts."""
    name = depth_name(config)
    assert name is not None
    return int(config[name])


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Checks the family, the sizes and the token ids of a config.

    Args:
        config: the content of a config.json, or the corresponding entries of a GGUF file.
        where: the model, for messages.

    Raises:
        UserError: an entry is missing, has another type than transformers accepts, or is out of range.
    """
    if depth_name(config) is None:
        rule = "its config.json has no num_hidden_layers, so it is not a plain causal language model"
        raise _invalid(where, rule, "Set model.path to a decoder-only language model.")
    if not isinstance(config.get("model_type"), str):
        rule = "its config.json has no model_type, which names the model's family"
        raise _invalid(where, rule, 'Add the entry, for example "model_type": "llama".')
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


def _check_token_ids(config: Mapping[str, Any], name: str, where: object) -> None:
    """A negative id stands for no token, except that it may not lie before the first embedding either."""
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
    return _invalid(where, f"its config.json has {name} = {shown}, which must be {rule}", "Correct its config.json.")


def _invalid(where: object, rule: str, remedy: str) -> UserError:
    return UserError(setting="model.path", value=where, rule=rule, remedy=remedy)
