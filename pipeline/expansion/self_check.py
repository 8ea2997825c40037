"""Verifies a written model directory on a few sentences, with the model's own tokenizer.

The model must load completely, decode with a cache as it does without, and, where the method promises it, compute the
same logits as the base.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.models.cache_check import CACHE_TOLERANCE, cache_difference, difference
from pipeline.models.families import family_for
from pipeline.models.family_inference.small import small_model
from pipeline.models.layer_config import explicit_config
from pipeline.models.loading import IncompleteModelError, language_config_of, load_complete
from pipeline.models.reading import ModelDirectory
from pipeline.models.tensors import is_finite

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "Water boils at a lower temperature on a mountain, because the air presses on it less.",
)
LOGIT_TOLERANCE = 1e-5  # relative to the largest logit, or absolute if that is below one: float32 rounding

WORK_PREFIX = ".check-"  # of temporary directories

# The largest sizes of the narrow model of a family with a row. The head size stays, because lengths of rotary tables
# depend on it.
NARROW = {
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "vocab_size": 512, "sliding_window": 8,
}  # fmt: skip


class CheckFailedError(Exception):
    """The model that was written is not the one that was planned, which is a bug of the pipeline or of a method."""


@dataclass(frozen=True)
class Outcome:
    """What was measured. Differences are relative to the largest logit, or absolute if that is below one.

    Attributes:
        cache_difference: between decoding with a cache and without.
        logit_difference: from the model that must have the same logits, or None if there is no such model.
        logits_of: how the logits were computed.
        cache_of: which model was decoded.
    """

    cache_difference: float
    logit_difference: float | None
    logits_of: str
    cache_of: str


def check_model(directory: Path, config: dict[str, Any], same_logits_as: Path | None, memory: int) -> Outcome:
    """Checks shapes, values, the per-layer config entries, tied weights, cached decoding and logits.

    A model that needs more than ``memory`` bytes in float32 is never loaded at once. Its logits are computed layer by
    layer from disk, in the stored dtype, and decoding is compared on a narrow random model with the same config and
    depth.

    Args:
        directory: the directory that was written.
        config: what its config must read back as, with all defaults.
        same_logits_as: a model directory whose logits it must reproduce, or None.
        memory: bytes.

    Raises:
        CheckFailedError: the model is wrong. The message names the first fault.
    """
    _check_config(directory, config)
    _check_values(directory)
    entries = sum(spec.numel for spec in ModelDirectory(directory).specs.values())
    fits = entries * torch.float32.itemsize <= memory
    prompts = _prompts(directory)
    for stale in directory.glob(f"{WORK_PREFIX}*"):  # from an interrupted attempt
        shutil.rmtree(stale)
    with TemporaryDirectory(prefix=WORK_PREFIX, dir=directory) as work_dir:
        expected = None if same_logits_as is None else _logits(_open(same_logits_as, fits, work_dir), prompts)
        model = _open(directory, fits, work_dir)
        logit_difference = _check_logits(_logits(model, prompts), expected)
        cache_difference = _check_cache(model if fits else _narrow_twin(directory), prompts)
    return Outcome(
        cache_difference,
        logit_difference,
        logits_of="the whole model in float32" if fits else "layer by layer from disk, in the stored dtype",
        cache_of="this model" if fits else "a narrow random model of the same config and depth",
    )


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise CheckFailedError(f"the model that was written is wrong: {fault}")


def _check_config(directory: Path, config: dict[str, Any]) -> None:
    read = explicit_config(directory)
    differing = [name for name, value in config.items() if read.get(name) != value]
    _require(not differing, f"its config reads back differently in {', '.join(differing)}")


def _check_values(directory: Path) -> None:
    stored = ModelDirectory(directory)
    for name in stored.specs:
        _require(is_finite(stored.read(name)), f"{name} is not finite")


def _prompts(directory: Path) -> Tensor:
    """Returns token ids of the sentences ``[sentences, longest]``.

    Shorter ones are padded on the right with token 0, which no token before it attends to.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    rows = [tokenizer(sentence, return_tensors="pt")["input_ids"][0] for sentence in SENTENCES]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _open(directory: Path, fits: bool, work_dir: str) -> PreTrainedModel:
    """Loads a model in float32, or if it does not fit, so that each layer is read from disk when it computes.

    Args:
        work_dir: a folder for weights that transformers stores in another layout.
    """
    if fits:
        return _load(directory)
    return _load(directory, dtype="auto", device_map={"": "disk"}, offload_folder=work_dir)


@torch.inference_mode()
def _logits(model: PreTrainedModel, prompts: Tensor) -> Tensor:
    """Returns ``[sentences, longest, vocabulary]``."""
    logits: Tensor = model(prompts, use_cache=False).logits
    return logits


def _check_logits(logits: Tensor, expected: Tensor | None) -> float | None:
    """Returns the difference of the logits from those that are expected, or None if none are."""
    _require(bool(logits.isfinite().all()), "its logits are not finite")
    if expected is None:
        return None
    found = difference(expected, logits)
    _require(found <= LOGIT_TOLERANCE, f"its logits differ from the base's by {found:.2g}")
    return found


def _check_cache(model: PreTrainedModel, prompts: Tensor) -> float:
    """Returns the difference between cached and uncached decoding."""
    found = cache_difference(model, prompts % model.config.get_text_config().vocab_size)
    _require(found <= CACHE_TOLERANCE, f"cached decoding differs from uncached by {found:.2g}")
    return found


def _load(directory: Path, dtype: Any = torch.float32, **placement: Any) -> PreTrainedModel:
    try:
        return load_complete(directory, dtype, **placement)
    except IncompleteModelError as error:
        raise CheckFailedError(f"the model that was written is wrong: {error}") from error


def _narrow_twin(directory: Path) -> PreTrainedModel:
    """Returns a narrow random float32 model with the config, the kinds of layers and the depth of the directory's.

    Of a model that reads images, it is the language model alone. For a family without a row, it is the kind of model
    that the family was inferred from: the sizes that must agree differ among families.
    """
    config, stored = language_config_of(directory), ModelDirectory(directory)
    if family_for(stored.config).inference is not None:
        return small_model(config, sum(spec.numel for spec in stored.specs.values()))
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, size in NARROW.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(size, getattr(config, name)))
    config.hidden_size = config.num_attention_heads * head_width
    config.pad_token_id = None  # it may be outside the narrow vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model.eval()
