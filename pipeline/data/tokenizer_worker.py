"""One worker of ``encoders.py``: texts in on standard input, token ids out on standard output, until the input ends.

Runs on its own, as ``python -P encoder.py``: it needs neither this project nor transformers, so that it is there within
a second and small. Numbers are little-endian uint32.

    first       its length, then JSON: {"tokenizer": ..., "before": [ids], "after": [ids]}
    request     how many texts, the length of each in bytes, the texts in UTF-8
    answer      the length of each in tokens, the ids of all

Control tokens spelled out in a text stay plain characters.
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


def write_numbers(stream: BinaryIO, *numbers: Numbers) -> None:
    """Writes arrays one after the other."""
    for array_ in numbers:
        stream.write(array_.astype(NUMBER, copy=False).tobytes())


def read_numbers(stream: BinaryIO, count: int) -> Numbers:
    """Reads ``count`` numbers.

    Raises:
        EOFError: the other side is gone.
    """
    return np.frombuffer(read(stream, count * NUMBER.itemsize), NUMBER)


def read(stream: BinaryIO, size: int) -> bytes:
    """Reads exactly so many bytes.

    Raises:
        EOFError: the other side is gone.
    """
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"{len(data)} bytes of {size}")
    return data


def main() -> None:
    """Answers requests until standard input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    recipe = json.loads(read(requests, int(read_numbers(requests, 1)[0])))
    tokenizer = Tokenizer.from_str(recipe["tokenizer"])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    while first := requests.read(NUMBER.itemsize):
        lengths = read_numbers(requests, int(np.frombuffer(first, NUMBER)[0]))
        texts = [str(read(requests, int(length)), "utf-8") for length in lengths]
        write_numbers(answers, *_encode(tokenizer, texts, recipe["before"], recipe["after"]))
        answers.flush()


def _encode(tokenizer: Tokenizer, texts: list[str], before: list[int], after: list[int]) -> tuple[Numbers, Numbers]:
    """Tokens of each text, and the ids of all."""
    ids = array("I")
    lengths = np.empty(len(texts), NUMBER)
    for number, encoding in enumerate(tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
        start = len(ids)
        ids.extend(before)
        ids.extend(encoding.ids)
        ids.extend(after)
        lengths[number] = len(ids) - start
    return lengths, np.frombuffer(ids, np.uint32)


if __name__ == "__main__":
    main()
