"""lm-eval's Hugging Face model with an explicit dtype, exactly one BOS token, bounded memory and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from pipeline.data.tokenizer import added_bos
from pipeline.models.built import load_language_model
from pipeline.progress import ProgressBar, progress

LOGITS_BYTES = {"cpu": 2**30, "cuda": 8 * 2**30}  # for the logits and their log-softmax, which exist at the same time
FIRST_TOKENS = 8  # of the first request, kept for the record

Request = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation), and the token ids of each
Answer = tuple[float, bool]  # log likelihood in nats, and whether greedy decoding gives the continuation


class LanguageModel(HFLM):
    """A model as lm-eval scores it.

    Args:
        directory: a Hugging Face model directory.
        batch_size: sequences; long sequences are scored in smaller batches, see ``LOGITS_BYTES``.

    Raises:
        IncompleteModelError: the directory does not hold all parameters of the model.

    Attributes:
        label: the label of the progress bar.
        first_tokens: the first token ids of the first sequence scored since ``start``.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, device: Literal["cpu", "cuda"], batch_size: int) -> None:
        model: Any = load_language_model(directory, dtype)
        model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        # In bfloat16, log likelihoods of answers would be rounded to three digits, and differ by chance or not at all.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
        self._adds_bos = added_bos(tokenizer) is not None
        self._largest_batch = batch_size
        self._bar: ProgressBar | None = None
        self._started, self._tokens = 0.0, 0
        self.start("")

    def start(self, label: str) -> None:
        """Begins a new task and forgets the first tokens of the previous one."""
        self.label = label
        self.first_tokens: list[int] = []

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Scores continuations; see ``lm_eval.api.model.LM.loglikelihood``."""
        with self._progress(len(requests)):
            answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Scores complete texts; see ``lm_eval.api.model.LM.loglikelihood_rolling``."""
        # lm-eval puts a prefix token before every window, so the tokenizer must not add a second one.
        self.add_bos_token: bool | None = False
        longest = max(len(self.tok_encode(request.args[0])) for request in requests)
        self.batch_size_per_gpu = self._fitting_batch(min(longest, self.max_length))
        with self._progress(len(requests)):
            answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self.add_bos_token = None
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates continuations; see ``lm_eval.api.model.LM.generate_until``."""
        self.batch_size_per_gpu = self._largest_batch  # an earlier task may have reduced it
        with self._progress(len(requests)):
            answers: list[str] = super().generate_until(requests, disable_tqdm=True)
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

    def _model_call(self, inps: torch.Tensor, **details: Any) -> torch.Tensor:
        """Returns logits [batch, sequence, vocabulary] for token ids [batch, sequence]."""
        logits: torch.Tensor = super()._model_call(inps, **details)
        self._advance(inps)
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, **details: Any) -> torch.Tensor:
        """Returns token ids [batch, <= max_length], the context [batch, sequence] included."""
        tokens: torch.Tensor = super()._model_generate(context, max_length, **details)
        if not self.first_tokens:
            first = context[0][details["attention_mask"][0].bool()]  # shorter contexts are padded on the left
            self.first_tokens = first[:FIRST_TOKENS].tolist()
        self._advance(tokens)
        return tokens

    def _fitting_batch(self, tokens: int) -> int:
        """Returns how many sequences of ``tokens`` tokens may be scored at once."""
        vocabulary: int = self.model.config.get_text_config().vocab_size
        width: int = self.model.dtype.itemsize
        # The log-softmax is in float32, as are the logits that torch computes it from.
        bytes_each: int = tokens * vocabulary * (8 if width == 4 else width + 8)
        return max(1, min(self._largest_batch, LOGITS_BYTES[self.device.type] // bytes_each))

    def _check_beginning(self, sequence: list[int]) -> None:
        """Asserts that a sequence begins with one BOS token where the tokenizer adds one, and never with two."""
        bos = self.tokenizer.bos_token_id
        assert bos is None or sequence[:2] != [bos, bos], "a sequence begins with two beginning-of-sequence tokens"
        assert not self._adds_bos or sequence[0] == bos, "a sequence lacks its beginning-of-sequence token"
        self.first_tokens = self.first_tokens or sequence[:FIRST_TOKENS]

    @contextmanager
    def _progress(self, sequences: int) -> Iterator[None]:
        with progress(self.label, sequences) as self._bar:
            self._started, self._tokens = time.monotonic(), 0
            yield

    def _advance(self, tokens: torch.Tensor) -> None:
        """Advances the bar by a batch [batch, sequence]."""
        self._tokens += tokens.numel()
        if self._bar is not None:
            self._bar.advance(len(tokens), tokens_per_second=self._tokens / (time.monotonic() - self._started))
