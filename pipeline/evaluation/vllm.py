"""lm-eval's vLLM model for the tasks that generate text, with the prompts, limits and texts of the transformers one.

Imported only if vLLM is installed and needed.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

# Read by vLLM. The engine runs in this process, since one of its own would survive if this one is killed.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # reports of the machine and the architecture over the network
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # otherwise all processes use the same cores

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.vllm_causallms import VLLM

from pipeline.evaluation.lm import LOGITS_BYTES, LanguageModel

CPU_CACHE_BYTES = 2 * 2**30  # for keys and values
GPU_SHARE = 0.9  # of the memory that is free
# Tokens of a prompt and its answer, so that later tasks rarely need another start. On CPUs, the cache of a large model
# may hold fewer, and vLLM would not start.
LEAST_LENGTH = {"cpu": 1, "cuda": 4096}
DTYPE_NAMES: dict[torch.dtype, Literal["float32", "bfloat16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}  # fmt: skip


class VllmLanguageModel(LanguageModel):
    """A model whose answers vLLM generates. Likelihoods are computed by transformers.

    Args: see ``LanguageModel``.
    """

    _generator: Generator | None = None  # started for the first task that needs it
    _released = False

    @property
    def generating_backend(self) -> str:
        """The program that generates answers, with its version."""
        return f"vllm {importlib.metadata.version('vllm')}"

    def release_weights(self) -> None:
        """Moves transformers' model off the GPU, for good: only answers will be generated."""
        self._released = True
        if self._generator is None:
            self.model.to("cpu")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates continuations; see ``lm_eval.api.model.LM.generate_until``. Every process has a share of them."""
        longest = min(max(LEAST_LENGTH[self.device.type], *map(self._longest, requests)), self.max_length)
        with self._progress(len(requests)):
            if self._generator is None or self._generator.max_length < longest:
                self._generator = None  # frees its memory first
                self._generator = self._start_generator(longest)
            own = requests[self._ranks.rank :: self._ranks.count]
            answers: list[str] = self._generator.generate_until(own, disable_tqdm=True) if own else []
        parts = self._ranks.gather(answers, "generating answers")
        return [parts[number % len(parts)][number // len(parts)] for number in range(len(requests))]

    def _longest(self, request: Any) -> int:
        """Returns how many tokens a prompt and its answer may have together."""
        prompt, settings = request.args
        answer: int = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
        return len(self.tok_encode(prompt)) + answer

    def _start_generator(self, longest: int) -> Generator:
        reserved = 0 if self._released else LOGITS_BYTES[self.device.type]
        memory = _memory(self.device.type, reserved)
        return Generator(
            self._directory, DTYPE_NAMES[self.model.dtype], self.tokenizer, longest, memory, self._check_beginning
        )


def _memory(device: str, reserved: int) -> dict[str, Any]:
    """Returns vLLM's settings for memory: what transformers' model does not need.

    Args:
        reserved: bytes of the GPU that are free now and will be needed.
    """
    if device == "cpu":
        return {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enforce_eager": True}  # compiling would take minutes
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": max(0.0, GPU_SHARE * (free - reserved) / total)}


class Generator(VLLM):
    """vLLM with the tokenizer of the transformers model.

    Args:
        directory: a Hugging Face model directory.
        longest: tokens of a prompt and its answer together. Longer prompts lose their beginnings, as in ``HFLM``.
        memory: arguments of ``vllm.LLM``.
        check: called with the token ids of every prompt.
    """

    def __init__(
        self,
        directory: Path,
        dtype: Literal["float32", "bfloat16"],
        tokenizer: Any,
        longest: int,
        memory: dict[str, Any],
        check: Callable[[list[int]], None],
    ) -> None:
        # All prompts are one batch. With "auto", vLLM divides by the time that a bar shows, which harness.py disables.
        super().__init__(
            str(directory),
            dtype=dtype,
            max_model_len=longest,
            batch_size=sys.maxsize,
            trust_remote_code=False,
            **memory,
        )
        self.tokenizer = tokenizer
        self._check = check

    def tok_encode(self, string: Sequence[str], add_special_tokens: bool | None = None, **kwargs: Any) -> Any:
        """Returns the token ids of prompts, each beginning with exactly one BOS token where the tokenizer adds one."""
        prompts: list[list[int]] = super().tok_encode(list(string), add_special_tokens, **kwargs)
        for prompt in sorted(prompts, key=len, reverse=True):  # ``HFLM`` begins with the longest ones
            self._check(prompt)
        return prompts

    @staticmethod
    def modify_gen_kwargs(
        gen_kwargs: dict[str, Any], eos: str | list[str] | None = None, default_max_gen_toks: int = 256
    ) -> tuple[dict[str, Any], list[str], int]:
        """Returns vLLM's settings, the strings that end an answer, and its largest number of tokens.

        As in ``HFLM``, answers are greedy unless the task wants samples. lm-eval 0.4.13 leaves vLLM's default, a
        temperature of 1, if the task sets neither ``do_sample`` nor a temperature.
        """
        settings, until, most_tokens = VLLM.modify_gen_kwargs(gen_kwargs, eos, default_max_gen_toks)
        if not normalize_gen_kwargs(gen_kwargs)["do_sample"]:
            settings["temperature"] = 0.0
        return settings, until, most_tokens

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Returns vLLM's outputs with the texts that ``HFLM`` would return for their tokens."""
        outputs = super()._model_generate(*args, **kwargs)
        for output in outputs:
            answer = output.outputs[0]  # whose text lacks an incomplete character at its end, and has special tokens
            answer.text = self.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        return outputs
