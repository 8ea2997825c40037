"""The tokenizer pool, compared with the tokenizer itself."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from pipeline.data.tokenizer import TextTokenizer, TokenizerPool
from pipeline.errors import WorkersFailed

TEXTS = ["", "größer – 😀", "plain words", "Say <|im_end|> aloud", "line\n\nline\r\n", "x" * 70_000]


@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_llama_with_bos"])
def test_the_pool_returns_the_ids_of_the_tokenizer(model: str, request: pytest.FixtureRequest) -> None:
    tokenizer = TextTokenizer(request.getfixturevalue(model))
    with tokenizer.worker_pool() as pool:
        found = pool.submit(TEXTS).result()
    prefix = [] if tokenizer.bos is None else [tokenizer.bos]
    for text, ids in zip(TEXTS, found, strict=True):
        plain = tokenizer.inner(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids.tolist() == [*prefix, *plain, tokenizer.eos]


def test_every_batch_gets_its_own_answer_from_several_workers(tiny_llama_dir: Path) -> None:
    tokenizer = TextTokenizer(tiny_llama_dir)
    draw = random.Random(0)
    batches = [[f"{draw.random()}" for _ in range(draw.randrange(40))] for _ in range(60)]
    with TokenizerPool(tokenizer.inner.backend_tokenizer.to_str(), prefix=[], suffix=[], workers=3) as pool:
        found = [future.result() for future in [pool.submit(batch) for batch in batches]]
    assert [[tokenizer.inner.decode(ids.tolist()) for ids in batch] for batch in found] == batches


def test_a_killed_worker_is_reported(tiny_llama_dir: Path) -> None:
    with pytest.raises(WorkersFailed, match="killed by signal 9"):
        _tokenize_and_kill(TextTokenizer(tiny_llama_dir))


def _tokenize_and_kill(tokenizer: TextTokenizer) -> None:
    with TokenizerPool(tokenizer.inner.backend_tokenizer.to_str(), [], [], workers=1) as pool:
        pool.submit(["first"]).result()
        for worker in pool._started:
            os.kill(worker._process.pid, signal.SIGKILL)
        pool.submit(["second"] * 100_000).result()
