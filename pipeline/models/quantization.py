"""Checkpoints in FP8 with one scale per block of a matrix, as DeepSeek and Qwen publish them, without torch.

Format: https://huggingface.co/docs/transformers/quantization/finegrained_fp8. Beside a matrix ``NAME``, the tensor
``NAME_scale_inv`` holds what its blocks are multiplied by, or one number if ``weight_block_size`` is null.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import Any

from pipeline.config import Model
from pipeline.errors import UserError, bad_model

FP8 = "F8_E4M3"  # in headers of safetensors files
_SCALE, _OF_ACTIVATIONS = "_scale_inv", ".activation_scale"  # at the end of names
ScaledBlock = tuple[int, int]  # rows and columns


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json says that weights are stored in FP8 with scales."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "fp8"


def block_size(config: Mapping[str, Any]) -> ScaledBlock | None:
    """Returns the size of the blocks with a scale of their own. None if a scale is that of a complete matrix.

    Raises:
        UserError: the entry is neither null nor two positive integers.
    """
    block = config["quantization_config"].get("weight_block_size")
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise UserError(
            setting="model.path",
            value=f"weight_block_size = {block!r}",
            rule="the entry of quantization_config must be null or two positive integers",
            remedy="Correct its config.json, or download it again.",
        )
    return block[0], block[1]


def check_quantization(config: Mapping[str, Any], model: Model) -> None:
    """Checks that the weights of a model are not quantized, or can and may be dequantized.

    Args:
        config: the content of its config.json.
        model: the settings.

    Raises:
        UserError: they cannot, or ``model.dequantize`` is false.
    """
    if not config.get("quantization_config"):
        return
    if not is_fp8(config):
        raise UserError(
            setting="model.path",
            value=model.path,
            rule="its weights are quantized, and new layers can only be made from unquantized ones",
            remedy="Set model.path to the unquantized model. The only quantized formats that can be dequantized here "
            "are GGUF and FP8 with one scale per block.",
        )
    block_size(config)
    if not model.dequantize:
        raise UserError(
            setting="model.dequantize",
            value="false",
            rule=f"{model.path} is stored in FP8, and new layers can only be made from unquantized weights",
            remedy="Set model.dequantize=true to dequantize them when they are loaded (2 bytes per parameter in "
            "bfloat16 instead of 1), or model.path to the unquantized model.",
        )


def without_scales(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Returns the names of a checkpoint's tensors without those that only belong to its quantization."""
    scales = (_SCALE, _OF_ACTIVATIONS) if is_fp8(config) else ()
    return [name for name in names if not name.endswith(scales)]


def scales_of(
    quantized: Collection[str], shapes: Mapping[str, tuple[int, ...]], block: ScaledBlock | None, where: object
) -> dict[str, str]:
    """Finds the scales of the tensors that are stored in FP8.

    Args:
        quantized: the names of these tensors.
        shapes: of all tensors by name.
        block: as returned by ``block_size``.
        where: the model, for messages.

    Returns:
        The name of the tensor with the scales, by the name of the tensor that they belong to.

    Raises:
        UserError: scales are missing, or have another shape than the blocks.
    """
    for name in quantized:
        if f"{name}{_SCALE}" not in shapes:
            raise _invalid(where, f"{name} is stored in FP8, and its scales {name}{_SCALE} are missing")
        shape, found = shapes[name], shapes[f"{name}{_SCALE}"]
        expected = None if block is None else _grid(shape, block)
        if prod(found) != 1 if expected is None else found != expected:
            blocks = "one number" if expected is None else f"the shape {list(expected)}"
            raise _invalid(where, f"{name}{_SCALE} has the shape {list(found)}, but must be {blocks}")
    return {name: f"{name}{_SCALE}" for name in quantized}


def _grid(shape: tuple[int, ...], block: ScaledBlock) -> tuple[int, ...]:
    """Returns the number of blocks along each dimension. The last ones may be smaller."""
    if len(shape) < 2:
        return ()
    *others, rows, columns = shape
    return (*others, -(-rows // block[0]), -(-columns // block[1]))


def _invalid(where: object, rule: str) -> UserError:
    remedy = "Download all weight files and config.json again, from the same revision."
    return bad_model(where, rule, remedy)
