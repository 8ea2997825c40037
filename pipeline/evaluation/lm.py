"""lm-eval's Hugging Face model with an explicit dtype, exactly one BOS token, bounded memory and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from pipeline.data.tokenizer import added_bos
from pipeline.evaluation.shared_prompts import (
    Answer,
    Request,
    batches_of,
    can_share_prompts,
    score_options,
    shared_prompts_of,
)
from pipeline.evaluation.sharing import BatchTurns, ScoringRanks, own_requests
from pipeline.models.loading import load_for_inference
from pipeline.progress import ProgressBar, progress

LOGITS_BYTES = {"cpu": 2**30, "cuda": 8 * 2**30}  # for the logits and their log-softmax, which exist at the same time
FIRST_TOKENS = 8  # of the first request, kept for the record


class LanguageModel(HFLM):
    """A model as lm-eval scores it.

    Args:
        directory: a Hugging Face model directory.
        batch_size: sequences; long sequences are scored in smaller batches, see ``LOGITS_BYTES``.
        ranks: the processes that score the model together. All of them get all answers.

    Raises:
        IncompleteModelError: the directory does not hold all parameters of the model.

    Attributes:
        label: the label of the progress bar.
        first_tokens: the first token ids of the first sequence scored since ``start``.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype,
        device: Literal["cpu", "cuda"],
        batch_size: int,
        ranks: ScoringRanks | None = None,
    ) -> None:
        model = load_for_inference(directory, dtype, device)
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        # In bfloat16, log likelihoods of answers would be rounded to three digits, and differ by chance or not at all.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
        self._directory = directory
        self._adds_bos = added_bos(tokenizer) is not None
        self._largest_batch = batch_size
        self._ranks = ranks or ScoringRanks()
        self._turns = BatchTurns(self._ranks)
        self._bar: ProgressBar | None = None
        self._started, self._tokens, self._scored = 0.0, 0, 0
        self.start("")

    @property
    def scoring_backend(self) -> str:
        """The program that computes likelihoods, with its version."""
        return f"hf {transformers.__version__}"

    @property
    def generating_backend(self) -> str:
        """The program that generates answers, with its version."""
        return self.scoring_backend

    def release_weights(self) -> None:
        """Prepares for tasks that only generate answers."""

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
        # lm-eval puts a prefix token before every text, so the tokenizer must not add a second one. What exceeds the
        # context is scored in further windows, which begin with the last token of the window before.
        self.add_bos_token: bool | None = False
        texts = [request.args[0] for request in requests]
        encoded = [self.tok_encode(text) for text in texts]
        for text, ids in zip(texts, encoded, strict=True):
            self._check_beginning([self.prefix_token_id, *ids], text)
        self.batch_size_per_gpu = self._fitting_batch(min(max(map(len, encoded)), self.max_length))
        answers: list[float] = self._in_turns(super().loglikelihood_rolling, requests)
        self.add_bos_token = None
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates continuations; see ``lm_eval.api.model.LM.generate_until``."""
        self.batch_size_per_gpu = self._largest_batch  # an earlier task may have reduced it
        answers: list[str] = self._in_turns(super().generate_until, requests)
        return answers

    def _in_turns(self, method: Callable[..., Any], requests: Sequence[Any]) -> Any:
        self._turns = BatchTurns(self._ranks)
        with self._progress(len(requests)):
            return self._turns.run(partial(method, requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if override_bs is None:  # otherwise loglikelihood_rolling has checked its texts
            for _, context, continuation in requests:
                self._check_beginning(context + continuation)
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        self.batch_size_per_gpu = self._fitting_batch(longest)
        compute = partial(super()._loglikelihood_tokens, disable_tqdm=True)
        if override_bs is not None:  # one of the batches of loglikelihood_rolling
            answers: list[Answer] = self._turns.result_of(partial(compute, requests), [(0.0, False)] * len(requests))
            return answers
        computed, others = self._score_shared_prompts(requests)
        own = [others[n] for n in own_requests([requests[n] for n in others], self.batch_size_per_gpu, self._ranks)]
        computed.update(zip(own, compute([requests[number] for number in own]), strict=True))
        parts = self._ranks.gather([[number, *answer] for number, answer in computed.items()], "scoring")
        found = {number: (value, greedy) for part in parts for number, value, greedy in part}
        return [found[number] for number in range(len(requests))]

    def _score_shared_prompts(self, requests: Sequence[Request]) -> tuple[dict[int, Answer], list[int]]:
        """Scores the requests whose prompt is computed once for several of them, in this process's turns.

        Returns:
            The answers by the number of the request, and the numbers of the requests that share no prompt.
        """
        prompts = shared_prompts_of(requests, self.max_length)
        if prompts and not can_share_prompts(self.model):
            prompts = []
        answers: dict[int, Answer] = {}
        batches = batches_of(prompts, int(self.batch_size_per_gpu))
        for batch in islice(batches, self._ranks.rank, None, self._ranks.count):
            numbers = [number for prompt in batch for number in prompt.numbers]
            answers.update(zip(numbers, score_options(self.model, batch), strict=True))
            self._advance(len(numbers), sum(len(each.prompt) + sum(map(len, each.options)) for each in batch))
        sharing = {number for prompt in prompts for number in prompt.numbers}
        return answers, [number for number in range(len(requests)) if number not in sharing]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns token ids and mask [batch, sequence] of prompts, whose beginnings are truncated if necessary."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        for row, is_text in zip(ids, mask, strict=True):
            self._check_beginning(row[is_text.bool()].tolist())
        kept = slice(-left_truncate_len if left_truncate_len else None, None)
        return ids[:, kept], mask[:, kept]

    def _model_call(self, inps: torch.Tensor, **details: Any) -> torch.Tensor:
        """Returns logits [batch, sequence, vocabulary] for token ids [batch, sequence]."""
        logits: torch.Tensor = super()._model_call(inps, **details)
        self._advance(len(inps), inps.numel())
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, **details: Any) -> torch.Tensor:
        """Returns token ids [batch, <= max_length], the context [batch, sequence] included."""
        generate = super()._model_generate

        def compute() -> list[list[int]]:
            tokens: torch.Tensor = generate(context, max_length, **details)
            self._advance(len(tokens), tokens.numel())
            ids: list[list[int]] = tokens.tolist()
            return ids

        # Samples depend on the random numbers that earlier batches have drawn.
        return torch.tensor(self._turns.result_of(compute, context.tolist(), in_order=bool(details.get("do_sample"))))

    def _fitting_batch(self, tokens: int) -> int:
        """Returns how many sequences of ``tokens`` tokens may be scored at once."""
        vocabulary: int = self.model.config.get_text_config().vocab_size
        width: int = self.model.dtype.itemsize
        # The log-softmax is in float32, as are the logits that torch computes it from.
        bytes_each: int = tokens * vocabulary * (8 if width == 4 else width + 8)
        return max(1, min(self._largest_batch, LOGITS_BYTES[self.device.type] // bytes_each))

    def _check_beginning(self, sequence: list[int], text: str = "") -> None:
        """Asserts that a sequence begins with one BOS token where the tokenizer adds one, and never with two.

        Args:
            sequence: token ids.
            text: a complete text after the first token; it may begin with BOS, as scraped text sometimes does.
        """
        bos = self.tokenizer.bos_token_id
        may_repeat = bos is None or text.startswith(self.tokenizer.bos_token)
        assert may_repeat or sequence[:2] != [bos, bos], "a sequence begins with two beginning-of-sequence tokens"
        assert not self._adds_bos or sequence[0] == bos, "a sequence lacks its beginning-of-sequence token"
        self.first_tokens = self.first_tokens or sequence[:FIRST_TOKENS]

    @contextmanager
    def _progress(self, sequences: int) -> Iterator[None]:
        self._ranks.enter(f"scoring {self.label}")
        with progress(self.label, sequences / self._ranks.count) as self._bar:
            self._started, self._tokens, self._scored = time.monotonic(), 0, 0
            yield

    def _advance(self, sequences: int, tokens: int) -> None:
        """Advances the bar by some sequences of that many tokens in all."""
        self._tokens += tokens
        self._scored += sequences
        self._ranks.describe(f"scoring {self.label}, after {self._scored} sequences")
        if self._bar is not None:
            self._bar.advance(sequences, tokens_per_second=self._tokens / (time.monotonic() - self._started))
