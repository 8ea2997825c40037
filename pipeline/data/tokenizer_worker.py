"""A tokenizer worker: reads texts from standard input and writes token ids to standard output until the input ends.

Run as a script (``python -P tokenizer_worker.py``) by ``tokenizer.py``. It imports neither this project nor
transformers, so that it starts within a second and takes little memory. Numbers are little-endian uint32.

    setup       length of the JSON in bytes, then {"tokenizer": ..., "prefix": [ids], "suffix": [ids]}
    request     number of texts, length of each in bytes, then the texts in UTF-8
    answer      length of each text in tokens, then the ids of all texts

Control tokens that occur in a text are tokenized as plain characters.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Numbers = npt.NDArray[np.uint32]
NUMBER = np.dtype("<u4")


def main() -> None:
    """Answers requests until standard input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    setup = json.loads(read_exactly(requests, int(read_numbers(requests, 1)[0])))
    tokenizer = Tokenizer.from_str(setup["tokenizer"])
    # A saved tokenizer may pad or truncate, and by default turns "<|im_end|>" in a text into a control token.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    while first := requests.read(NUMBER.itemsize):
        lengths = read_numbers(requests, int(np.frombuffer(first, NUMBER)[0]))
        texts = [str(read_exactly(requests, int(length)), "utf-8") for length in lengths]
        write_numbers(answers, *_tokenize(tokenizer, texts, setup["prefix"], setup["suffix"]))
        answers.flush()


def _tokenize(tokenizer: Tokenizer, texts: list[str], prefix: list[int], suffix: list[int]) -> tuple[Numbers, Numbers]:
    """Returns the length of each text in tokens, and the ids of all texts."""
    ids = array("I")  # grows without one Python integer object per id
    lengths = np.empty(len(texts), NUMBER)
    for number, encoding in enumerate(tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
        start = len(ids)
        ids.extend(prefix)
        ids.extend(encoding.ids)
        ids.extend(suffix)
        lengths[number] = len(ids) - start
    return lengths, np.frombuffer(ids, np.uint32)


def write_numbers(stream: BinaryIO, *arrays: Numbers) -> None:
    """Writes arrays one after another."""
    for numbers in arrays:
        stream.write(numbers.astype(NUMBER, copy=False).tobytes())


def read_numbers(stream: BinaryIO, count: int) -> Numbers:
    """Reads ``count`` numbers.

    Raises:
        EOFError: the stream ended before.
    """
    return np.frombuffer(read_exactly(stream, count * NUMBER.itemsize), NUMBER)


def read_exactly(stream: BinaryIO, size: int) -> bytes:
    """Reads exactly ``size`` bytes.

    Raises:
        EOFError: the stream ended before.
    """
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"{len(data)} bytes of {size}")
    return data


if __name__ == "__main__":
    main()
