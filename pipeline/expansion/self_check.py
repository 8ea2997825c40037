"""Whether a written model directory is a sound model: it loads whole, decodes with a cache as without, and, where it
was promised, computes what another one does. On the model's own tokenizer and a few sentences.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.models.layer_config import spelled_out_config
from pipeline.models.reading import ModelDirectory
from pipeline.models.tensors import is_finite

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "Water boils at a lower temperature on a mountain, because the air presses on it less.",
)
DECODED_TOKENS = 8
LOGIT_TOLERANCE = 1e-5  # of the largest logit, or absolute where that is below one: float32 rounding
CACHE_TOLERANCE = 1e-3  # likewise; a cache sums in another order, which depth amplifies

ROOM = ".check-"  # begins the name of a folder to work in

# A narrow twin's sizes. Head width stays: rotary tables have its length.
NARROW = {
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "vocab_size": 512, "sliding_window": 8,
}  # fmt: skip


class CheckFailedError(Exception):
    """The model that was written is not the model that was meant: a defect of the pipeline's."""


@dataclass(frozen=True)
class Outcome:
    """What was measured, all as fractions of the largest logit or absolute where that is below one.

    Attributes:
        cache_difference: between decoding with a cache and without.
        logit_difference: to the model that it must agree with; None where nothing was promised.
        logits_of: how the logits were computed.
        cache_of: what was decoded.
    """

    cache_difference: float
    logit_difference: float | None
    logits_of: str
    cache_of: str


def check_model(directory: Path, config: dict[str, Any], same_logits_as: Path | None, memory: int) -> Outcome:
    """Checks shapes, values, per-layer config entries, tied weights, cached decoding, and logits: finite, as promised.

    A model that takes more than ``memory`` bytes in float32 is not held: its logits are computed layer by layer from
    disk, in the dtype it is stored in, and decoding is compared on a narrow random model of the same config and depth.

    Args:
        directory: what was written.
        config: what its config must spell out to.
        same_logits_as: a model directory that it must agree with, or None.
        memory: bytes.

    Raises:
        CheckFailedError: with the first thing that is wrong.
    """
    _check_config(directory, config)
    _check_values(directory)
    entries = sum(spec.entries for spec in ModelDirectory(directory).specs.values())
    whole = entries * torch.float32.itemsize <= memory
    prompts = _prompts(directory)
    for stale in directory.glob(f"{ROOM}*"):  # of an attempt that was cut off
        shutil.rmtree(stale)
    with TemporaryDirectory(prefix=ROOM, dir=directory) as room:
        promised = None if same_logits_as is None else _logits(_opened(same_logits_as, whole, room), prompts)
        model = _opened(directory, whole, room)
        logit_difference = _check_logits(_logits(model, prompts), promised)
        cache_difference = _check_cache(model if whole else _narrow_twin(directory), prompts)
    return Outcome(
        cache_difference,
        logit_difference,
        logits_of="the whole model in float32" if whole else "layer by layer from disk, in the stored dtype",
        cache_of="this model" if whole else "a narrow random model of the same config and depth",
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckFailedError(f"the model that was written is wrong: {otherwise}")


def _check_config(directory: Path, config: dict[str, Any]) -> None:
    read = spelled_out_config(directory)
    differing = [name for name, value in config.items() if read.get(name) != value]
    _require(not differing, f"its config reads back differently in {', '.join(differing)}")


def _check_values(directory: Path) -> None:
    stored = ModelDirectory(directory)
    for name in stored.specs:
        _require(is_finite(stored.read(name)), f"{name} is not finite")


def _prompts(directory: Path) -> Tensor:
    """Token ids of the sentences ``[sentences, longest]``.

    Shorter ones are filled up on the right with token 0, which nothing to its left can see.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [tokenizer(sentence, return_tensors="pt")["input_ids"][0] for sentence in SENTENCES]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _opened(directory: Path, whole: bool, room: str) -> PreTrainedModel:
    """A directory's model: held in float32, or read from disk layer by layer, in its own dtype, as it computes.

    ``room`` is a folder for weights that loading rearranges.
    """
    if whole:
        return _load(directory)
    return _load(directory, dtype="auto", device_map={"": "disk"}, offload_folder=room)


@torch.inference_mode()
def _logits(model: PreTrainedModel, prompts: Tensor) -> Tensor:
    """``[sentences, longest, vocabulary]``."""
    logits: Tensor = model(prompts, use_cache=False).logits
    return logits


def _check_logits(logits: Tensor, promised: Tensor | None) -> float | None:
    """How far they are from what was promised; None where nothing was."""
    _require(bool(logits.isfinite().all()), "its logits are not finite")
    if promised is None:
        return None
    difference = _difference(promised, logits)
    _require(difference <= LOGIT_TOLERANCE, f"its logits differ from the base's by {difference:.2g}")
    return difference


def _check_cache(model: PreTrainedModel, prompts: Tensor) -> float:
    """How far cached decoding is from uncached."""
    difference = _cache_difference(model, prompts % model.config.vocab_size)
    _require(difference <= CACHE_TOLERANCE, f"cached decoding differs from uncached by {difference:.2g}")
    return difference


def _load(directory: Path, dtype: Any = torch.float32, **placement: Any) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, use_safetensors=True, output_loading_info=True, **placement
    )
    model: PreTrainedModel
    report: dict[str, object]
    model, report = loaded
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        _require(not report[fault], f"{directory} loads with {fault} {report[fault]}")
    if model.config.tie_word_embeddings:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        _require(tied, "the head is not tied to the embeddings")
    return model.eval()


def _narrow_twin(directory: Path) -> PreTrainedModel:
    """A random model of the directory's config, kinds of layers and depth, and of small width; float32."""
    config = AutoConfig.from_pretrained(directory)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, size in NARROW.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(size, getattr(config, name)))
    config.hidden_size = config.num_attention_heads * head_width
    config.pad_token_id = None  # it may lie beyond the narrow vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def _cache_difference(model: PreTrainedModel, prompt: Tensor) -> float:
    """Decodes greedily with a cache, then computes the same positions at once without one."""
    step = model(prompt, use_cache=True)
    tokens, cached = prompt, [step.logits[:, -1]]
    for _ in range(DECODED_TOKENS):
        token = cached[-1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, token], dim=1)
        step = model(token, past_key_values=step.past_key_values, use_cache=True)
        cached.append(step.logits[:, -1])
    uncached = model(tokens, use_cache=False).logits[:, prompt.shape[1] - 1 :]
    return _difference(uncached, torch.stack(cached, dim=1))


def _difference(wanted: Tensor, got: Tensor) -> float:
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1.0))
