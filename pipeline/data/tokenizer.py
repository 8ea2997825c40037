"""The model's tokenizer, and a pool of processes that tokenize text with it on all cores.

A document is tokenized as ``[BOS] text EOS``. BOS is added if the tokenizer itself adds one to a text. EOS is always
added, so that the model learns where a text ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np

from pipeline.data import tokenizer_worker
from pipeline.data.blocks import Ids
from pipeline.errors import UserError, WorkersFailed, bad_model, one_line
from pipeline.files import read_json
from pipeline.launch.child import close_pipes
from pipeline.launch.machine import usable_cores
from pipeline.models.source import PROCESSOR_TEMPLATE

# About as many workers as this process can feed while it also packs their results. Each takes about 100 MB.
MAX_WORKERS = 16


class TextTokenizer:
    """The tokenizer of a Hugging Face model directory.

    Attributes:
        inner: the ``transformers`` tokenizer.
        chat_template: one template, or several by name; None if the model has none.
        vocab_size: number of rows of the model's embedding matrix.
        eos: id of the end-of-sequence token.
        bos: id of the beginning-of-sequence token if the tokenizer adds one, otherwise None.

    Raises:
        UserError: the tokenizer cannot be used, or has ids without an embedding, no end-of-sequence token, or no fast
            implementation.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.inner: Any = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
            self.bos = added_bos(self.inner)
        except Exception as error:  # libraries raise whatever a damaged file leads to
            rule = f"its tokenizer cannot be used ({type(error).__name__}: {one_line(error)})"
            raise _unsuitable(directory, rule) from error
        config = read_json(directory / "config.json")
        # Multimodal models nest the configuration of the language model.
        self.vocab_size = int((config if "vocab_size" in config else config["text_config"])["vocab_size"])
        if not self.inner.is_fast:
            name = type(self.inner).__name__
            raise _unsuitable(
                directory, f"its tokenizer, {name}, is only implemented in Python, without a tokenizer.json"
            )
        if self.inner.eos_token_id is None:
            raise _unsuitable(directory, "its tokenizer has no end-of-sequence token")
        largest = max(self.inner.get_vocab().values())
        if largest >= self.vocab_size:
            rule = f"its tokenizer has the id {largest}, but its embeddings end at {self.vocab_size - 1}"
            raise _unsuitable(directory, rule)
        self.eos: int = self.inner.eos_token_id
        self.chat_template = saved_chat_template(self.inner, directory)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The variables that ``apply_chat_template`` passes to a template besides the messages."""
        return {name: token for name, token in self.inner.special_tokens_map.items() if isinstance(token, str)}

    def worker_pool(self) -> TokenizerPool:
        """Returns a pool of processes that tokenize documents as ``[BOS] text EOS``."""
        prefix = [] if self.bos is None else [self.bos]
        return TokenizerPool(self.inner.backend_tokenizer.to_str(), prefix=prefix, suffix=[self.eos])


def added_bos(tokenizer: Any) -> int | None:
    """Returns the beginning-of-sequence token that a ``transformers`` tokenizer adds to a text, or None.

    This is determined by a trial, because ``add_bos_token`` is missing or has no effect for many fast tokenizers.
    """
    first: list[int] = tokenizer("a").input_ids[:1]
    return first[0] if first == [tokenizer.bos_token_id] else None


def begin_with_bos(ids: list[int], bos: int | None) -> list[int]:
    """Returns the ids of a conversation with the beginning-of-sequence token, which some chat templates do not write.

    Args:
        ids: the ids of the text that the template has rendered.
        bos: the token that the tokenizer adds to a text, see ``added_bos``.
    """
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def saved_chat_template(tokenizer: Any, directory: Path) -> Any:
    """Returns the chat template of a model, several by name, or None.

    Args:
        tokenizer: its ``transformers`` tokenizer, which does not read the template of a processor.
        directory: its Hugging Face model directory.
    """
    if not tokenizer.chat_template and (processor := directory / PROCESSOR_TEMPLATE).is_file():
        return read_json(processor).get("chat_template")
    return tokenizer.chat_template


def _unsuitable(directory: Path, rule: str) -> UserError:
    return bad_model(directory, rule, "Use the model's original tokenizer.")


class TokenizerPool:
    """A pool of tokenizer workers, one process per core, each fed over pipes by its own thread.

    Processes are used because the threads of the ``tokenizers`` library share a cache behind a lock, and because ids
    that it returns to this process pass through the interpreter as Python integers. Workers return them as bytes.

    Args:
        tokenizer: a fast tokenizer, serialized as JSON.
        prefix, suffix: ids added before and after every text.
        workers: number of processes; one per core by default. Each is started by the first batch that needs it.
    """

    def __init__(self, tokenizer: str, prefix: list[int], suffix: list[int], workers: int | None = None) -> None:
        self.workers = workers or min(usable_cores(), MAX_WORKERS)
        # The keys are those of the worker's protocol.
        self._setup = json.dumps({"tokenizer": tokenizer, "prefix": prefix, "suffix": suffix}).encode()
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="tokenizer")
        self._thread_local = threading.local()  # holds the worker of each thread
        self._started: list[_TokenizerWorker] = []

    def submit(self, texts: list[str]) -> Future[list[Ids]]:
        """Tokenizes texts in the background. A lone surrogate, which UTF-8 cannot encode, is replaced by ``?``.

        Returns:
            A future of the ids of each text. It raises WorkersFailed if the worker dies.
        """
        return self._threads.submit(self._tokenize, texts)

    def _tokenize(self, texts: list[str]) -> list[Ids]:
        if not hasattr(self._thread_local, "worker"):
            self._thread_local.worker = _TokenizerWorker(self._setup)
            self._started.append(self._thread_local.worker)
        return cast("_TokenizerWorker", self._thread_local.worker).tokenize(texts)

    def __enter__(self) -> TokenizerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the workers. After an exception they are killed, without waiting for pending batches."""
        if error is not None:
            for worker in self._started:
                worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._started:
            worker.close()


class _TokenizerWorker:
    """One process running ``tokenizer_worker.py``. It exits when its input ends, even if this process is killed."""

    def __init__(self, setup: bytes) -> None:
        command = [sys.executable, "-P", str(Path(tokenizer_worker.__file__))]
        # One thread per worker, because there is one worker per core.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._requests, self._answers = cast("BinaryIO", self._process.stdin), cast("BinaryIO", self._process.stdout)
        tokenizer_worker.write_numbers(self._requests, np.array([len(setup)], np.uint32))
        self._requests.write(setup)

    def tokenize(self, texts: list[str]) -> list[Ids]:
        data = [text.encode("utf-8", "replace") for text in texts]
        try:
            tokenizer_worker.write_numbers(self._requests, np.array([len(data), *map(len, data)], np.uint32))
            self._requests.write(b"".join(data))
            self._requests.flush()
            lengths = tokenizer_worker.read_numbers(self._answers, len(data))
            ids = tokenizer_worker.read_numbers(self._answers, int(lengths.sum(dtype=np.int64)))
        except (BrokenPipeError, EOFError) as error:
            status = self._process.wait()
            cause = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
            raise WorkersFailed(f"a tokenizer worker {cause} (out of memory?)") from error
        ends = np.cumsum(lengths, dtype=np.int64)
        return [ids[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Ends the process by closing its input."""
        close_pipes(self._process)
