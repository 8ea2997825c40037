"""Text to token ids on all cores: one process a core, each fed over pipes by a thread of its own.

Processes rather than the tokenizer's own threads: those share a cache behind one lock, and every id they find passes
through this interpreter as a Python number. Here ids arrive as bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np

from pipeline.data import tokenizer_worker as encoder
from pipeline.data.blocks import Ids
from pipeline.errors import UserError, WorkersFailed
from pipeline.files import read_json

MOST_PROCESSES = 16  # about what one process can feed and pack; each takes some 100 MB


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Encoders:
    """A pool of tokenizing processes; each starts with the first batch that finds no idle one.

    Args:
        tokenizer: the fast tokenizer as JSON.
        before, after: ids put around every text.
    """

    def __init__(self, tokenizer: str, before: list[int], after: list[int], processes: int | None = None) -> None:
        self.processes = processes or min(available_cores(), MOST_PROCESSES)
        self._recipe = json.dumps({"tokenizer": tokenizer, "before": before, "after": after}).encode()
        self._threads = ThreadPoolExecutor(self.processes, thread_name_prefix="encoder")
        self._mine = threading.local()  # each thread's process
        self._all: list[_Process] = []

    def submit(self, texts: list[str]) -> Future[list[Ids]]:
        """The texts' ids, sooner or later; what is no Unicode (half of a surrogate pair) is read as a question mark.

        The future raises WorkersFailed where its process died.
        """
        return self._threads.submit(self._encode, texts)

    def _encode(self, texts: list[str]) -> list[Ids]:
        if not hasattr(self._mine, "process"):
            self._mine.process = _Process(self._recipe)
            self._all.append(self._mine.process)
        return cast("_Process", self._mine.process).encode(texts)

    def __enter__(self) -> Encoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the processes, at once where something went wrong."""
        if error is not None:
            for process in self._all:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.close()


class _Process:
    """One worker, see ``encoder.py``. It ends by itself when this process is gone, since its input then ends."""

    def __init__(self, recipe: bytes) -> None:
        command = [sys.executable, "-P", str(Path(encoder.__file__))]
        # The one thread it needs; a process a core is what makes it fast.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._requests, self._answers = cast("BinaryIO", self._process.stdin), cast("BinaryIO", self._process.stdout)
        encoder.write_numbers(self._requests, np.array([len(recipe)], np.uint32))
        self._requests.write(recipe)

    def encode(self, texts: list[str]) -> list[Ids]:
        data = [text.encode("utf-8", "replace") for text in texts]
        try:
            encoder.write_numbers(self._requests, np.array([len(data), *map(len, data)], np.uint32))
            self._requests.write(b"".join(data))
            self._requests.flush()
            lengths = encoder.read_numbers(self._answers, len(data))
            ids = encoder.read_numbers(self._answers, int(lengths.sum(dtype=np.int64)))
        except (BrokenPipeError, EOFError) as error:
            status = self._process.wait()
            how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
            raise WorkersFailed(f"a tokenizing process {how} (out of memory?)") from error
        ends = np.cumsum(lengths, dtype=np.int64)
        return [ids[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Ends the process by ending its input."""
        self._answers.close()
        with suppress(BrokenPipeError):  # it was killed with a request half written
            self._requests.close()
        self._process.wait()


# --------------------------------------------------------------------------------------------------
# The model's tokenizer: its ids, its ends of text, and exactly one beginning-of-sequence token where it has one.
#
# A document is ``[BOS] text EOS``: BOS if the tokenizer puts one before a text itself, EOS always, so that the model
# learns where a text ends.


class TextTokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        UserError: it has ids that the model has no embedding for, no end-of-sequence token, or no fast form.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.inner: Any = AutoTokenizer.from_pretrained(str(directory))
        self.vocab_size = int(_text_config(read_json(directory / "config.json"))["vocab_size"])
        if not self.inner.is_fast:
            raise _misfit(directory, "its tokenizer is none of the tokenizers library's (there is no tokenizer.json)")
        if self.inner.eos_token_id is None:
            raise _misfit(directory, "its tokenizer has no end-of-sequence token")
        largest = max(self.inner.get_vocab().values())
        if largest >= self.vocab_size:
            raise _misfit(directory, f"its tokenizer has the id {largest}, its embeddings end at {self.vocab_size - 1}")
        self.eos: int = self.inner.eos_token_id
        self.bos: int | None = self._added_bos()

    def _added_bos(self) -> int | None:
        """The token that the tokenizer itself puts before a text, if it does."""
        first: list[int] = self.inner("a").input_ids[:1]
        return first[0] if first == [self.inner.bos_token_id] else None

    def encoders(self) -> Encoders:
        """Processes that turn texts into documents, ``[BOS] text EOS``."""
        before = [] if self.bos is None else [self.bos]
        return Encoders(self.inner.backend_tokenizer.to_str(), before=before, after=[self.eos])


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Multimodal models keep the language model's numbers one level down."""
    return config if "vocab_size" in config else config["text_config"]


def _misfit(directory: Path, rule: str) -> UserError:
    return UserError(setting="model.path", value=directory, rule=rule, remedy="Use the tokenizer the model came with.")
