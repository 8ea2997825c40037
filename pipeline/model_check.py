"""Whether a written model directory is a sound model: it loads whole, decodes with a cache as without, and, where it
was promised, computes what another one does. In float32, on the model's own tokenizer and a few sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.layer_config import Config, spelled_out_config

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "Water boils at a lower temperature on a mountain, because the air presses on it less.",
)
DECODED_TOKENS = 8
LOGIT_TOLERANCE = 1e-5  # of the largest logit, or absolute where that is below one: float32 rounding
CACHE_TOLERANCE = 1e-3  # likewise; a cache sums in another order, which depth amplifies


class CheckFailedError(Exception):
    """The model that was written is not the model that was meant: a defect of the pipeline's."""


@dataclass(frozen=True)
class Outcome:
    """What was measured, all as fractions of the largest logit or absolute where that is below one."""

    cache_difference: float
    logit_difference: float | None  # None where nothing was promised

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"cache_difference": self.cache_difference, "logit_difference": self.logit_difference}


def check_model(directory: Path, config: Config, same_logits_as: Path | None) -> Outcome:
    """Checks shapes, values, per-layer config entries, tied weights, cached decoding, and logits.

    Holds one model in float32 at a time.

    Args:
        directory: what was written.
        config: what its config must spell out to.
        same_logits_as: a model directory that it must agree with, or None.

    Raises:
        CheckFailedError: with the first thing that is wrong.
    """
    prompts = _prompts(directory)
    promised = None if same_logits_as is None else _logits(_load(same_logits_as), prompts)
    model = _load(directory)
    _check_config(directory, config)
    _check_parameters(model)
    cache_difference = max(_cache_difference(model, prompt) for prompt in prompts)
    _require(cache_difference <= CACHE_TOLERANCE, f"cached decoding differs from uncached by {cache_difference:.2g}")
    logit_difference = None
    if promised is not None:
        logit_difference = max(map(_difference, promised, _logits(model, prompts)))
        _require(logit_difference <= LOGIT_TOLERANCE, f"its logits differ from the base's by {logit_difference:.2g}")
    return Outcome(cache_difference, logit_difference)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckFailedError(f"the model that was written is wrong: {otherwise}")


def _prompts(directory: Path) -> list[Tensor]:
    """Token ids ``[1, n]`` of each sentence."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer(sentence, return_tensors="pt")["input_ids"] for sentence in SENTENCES]


def _load(directory: Path) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    model: PreTrainedModel
    report: dict[str, object]
    model, report = loaded
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        _require(not report[fault], f"{directory} loads with {fault} {report[fault]}")
    return model.eval()


def _check_config(directory: Path, config: Config) -> None:
    read = spelled_out_config(directory)
    differing = [name for name, value in config.items() if read.get(name) != value]
    _require(not differing, f"its config reads back differently in {', '.join(differing)}")


def _check_parameters(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        _require(bool(torch.isfinite(parameter).all()), f"{name} is not finite")
    if model.config.tie_word_embeddings:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        _require(tied, "the head is not tied to the embeddings")


@torch.inference_mode()
def _logits(model: PreTrainedModel, prompts: list[Tensor]) -> list[Tensor]:
    """``[1, n, vocabulary]`` for each prompt."""
    return [model(prompt, use_cache=False).logits for prompt in prompts]


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
