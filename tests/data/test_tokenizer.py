"""Encoding in other processes against the tokenizer itself."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from pipeline.data.tokenizer import Encoders, TextTokenizer
from pipeline.errors import WorkersFailed

TEXTS = ["", "größer – 😀", "plain words", "Say <|im_end|> aloud", "line\n\nline\r\n", "x" * 70_000]


@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_llama_with_bos"])
def test_ids_are_the_tokenizers_own(model: str, request: pytest.FixtureRequest) -> None:
    tokenizer = TextTokenizer(request.getfixturevalue(model))
    with tokenizer.encoders() as encoders:
        found = encoders.submit(TEXTS).result()
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    for text, ids in zip(TEXTS, found, strict=True):
        plain = tokenizer.inner(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids.tolist() == [*before, *plain, tokenizer.eos]


def test_many_processes_answer_each_their_own_batch(tiny_llama_dir: Path) -> None:
    tokenizer = TextTokenizer(tiny_llama_dir)
    draw = random.Random(0)
    batches = [[f"{draw.random()}" for _ in range(draw.randrange(40))] for _ in range(60)]
    with Encoders(tokenizer.inner.backend_tokenizer.to_str(), before=[], after=[], processes=3) as encoders:
        found = [future.result() for future in [encoders.submit(batch) for batch in batches]]
    assert [[tokenizer.inner.decode(ids.tolist()) for ids in batch] for batch in found] == batches


def test_a_process_that_dies_is_told(tiny_llama_dir: Path) -> None:
    with pytest.raises(WorkersFailed, match="killed by signal 9"):
        _encode_with_a_kill(TextTokenizer(tiny_llama_dir))


def _encode_with_a_kill(tokenizer: TextTokenizer) -> None:
    with Encoders(tokenizer.inner.backend_tokenizer.to_str(), [], [], processes=1) as encoders:
        encoders.submit(["first"]).result()
        for process in encoders._all:
            os.kill(process._process.pid, signal.SIGKILL)
        encoders.submit(["second"] * 100_000).result()
