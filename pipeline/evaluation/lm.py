"""lm-eval's Hugging Face model with our rules: explicit dtype, one BOS token, bounded memory, our bar."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.progress import Bar, progress

LOGITS_BYTES = {"cpu": 2**30, "cuda": 8 * 2**30}  # logits and their log-softmax are held at once
FIRST_TOKENS = 8  # of the first request, for the record

Request = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation), and the tokens of each
Answer = tuple[float, bool]  # log likelihood in nats, and whether the continuation is what greedy decoding gives


class Judge(HFLM):
    """Scores one model.

    Attributes:
        label: what the bar says.
        first_tokens: how the first sequence since ``start`` began.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, device: Literal["cpu", "cuda"], batch_size: int) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype)
        model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        first: list[int] = tokenizer("a").input_ids[:1]
        self._adds_bos = first == [tokenizer.bos_token_id]
        self._largest_batch = batch_size
        self._bar: Bar | None = None
        self._started, self._tokens = 0.0, 0
        self.start("")

    def start(self, label: str) -> None:
        """A new task: forgets the first tokens."""
        self.label = label
        self.first_tokens: list[int] = []

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        """As lm-eval's, with our bar for its own."""
        with progress(self.label, len(requests)) as self._bar:
            self._started, self._tokens = time.monotonic(), 0
            answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's, which puts a prefix token before every window: the tokenizer must not add a second one."""
        self.add_bos_token: bool | None = False
        longest = max(len(self.tok_encode(request.args[0])) for request in requests)
        self.batch_size_per_gpu = self._fitting_batch(min(longest, self.max_length))
        with progress(self.label, len(requests)) as self._bar:
            self._started, self._tokens = time.monotonic(), 0
            answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self.add_bos_token = None
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        for _, context, continuation in requests:
            self._check_beginning(context + continuation)
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        self.batch_size_per_gpu = self._fitting_batch(longest)
        answers: list[Answer] = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        return answers

    def _fitting_batch(self, tokens: int) -> int:
        """How many sequences of that length may be scored at once."""
        vocabulary: int = self.model.config.get_text_config().vocab_size
        bytes_each: int = 2 * tokens * vocabulary * self.model.dtype.itemsize
        return max(1, min(self._largest_batch, LOGITS_BYTES[self.device.type] // bytes_each))

    def _check_beginning(self, sequence: list[int]) -> None:
        """Exactly one beginning-of-sequence token where the tokenizer puts one, never two."""
        bos = self.tokenizer.bos_token_id
        assert bos is None or sequence[:2] != [bos, bos], "a sequence begins with two beginning-of-sequence tokens"
        assert not self._adds_bos or sequence[0] == bos, "a sequence lacks its beginning-of-sequence token"
        self.first_tokens = self.first_tokens or sequence[:FIRST_TOKENS]

    def _model_call(self, inps: torch.Tensor, **details: Any) -> torch.Tensor:
        """Logits [batch, sequence, vocabulary]."""
        logits: torch.Tensor = super()._model_call(inps, **details)
        self._tokens += inps.numel()
        if self._bar is not None:
            self._bar.advance(len(inps), tokens_per_second=self._tokens / (time.monotonic() - self._started))
        return logits
