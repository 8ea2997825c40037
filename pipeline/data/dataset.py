"""Writes the files of a dataset: token blocks per split, the held-out text, and a checkpoint for resuming."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from pipeline.config import Split, Tokenize
from pipeline.data.blocks import COLUMN_DTYPES, BlockWriter, DocumentPacker, ExamplePacker, Ids, State
from pipeline.data.chat import TokenizedConversation
from pipeline.data.records import Conversation
from pipeline.files import read_record, report_once, sha256_json, write_json

HELD_OUT_FILE = "held_out.jsonl"
CHUNK_BYTES = 2**20  # at a time


class DatasetWriter:
    """Packs examples into blocks, and also writes the held-out ones as text, for evaluation.

    Args:
        directory: existing directory for the files; files of the same names are overwritten.
        settings: the sequence length, and the purpose, which determines how examples are packed.
        padding: id that fills up blocks.
        state: a value returned by ``save()``; writing resumes there, and whatever was written later is cut off.

    Attributes:
        blocks: the block writer of each split, which counts blocks and target tokens.
    """

    def __init__(self, directory: Path, settings: Tokenize, padding: int, state: State | None = None) -> None:
        length = settings.sequence_length
        packer = DocumentPacker if settings.purpose == "corpus" else ExamplePacker
        self._files = ExitStack()
        self.blocks: dict[Split, BlockWriter] = {}
        self._packers: dict[Split, DocumentPacker | ExamplePacker] = {}
        for split in settings.splits:
            blocks = BlockWriter(directory, split, length, state["blocks"][split] if state else None)
            self.blocks[split] = self._files.enter_context(blocks)
            self._packers[split] = packer(blocks, length, padding, state["packers"][split] if state else None)
        self._held_out = self._files.enter_context(open(directory / HELD_OUT_FILE, "r+b" if state else "wb"))
        self._held_out.truncate(state["held_out_bytes"] if state else 0)
        self._held_out.seek(0, os.SEEK_END)

    def add_document(self, split: Split, source: str, text: str, ids: Ids) -> None:
        """Adds a document. Every token but its first is a target.

        Args:
            source: dotted name of the source, for example ``data.corpus.1``.
        """
        packer = self._packers[split]
        assert isinstance(packer, DocumentPacker)
        packer.add(ids)
        self._write_held_out(split, {"text": text, "source": source})

    def add_conversation(
        self, split: Split, source: str, conversation: Conversation, examples: Sequence[TokenizedConversation]
    ) -> None:
        """Adds a conversation that was tokenized as one or more examples. Examples are not truncated."""
        packer = self._packers[split]
        assert isinstance(packer, ExamplePacker)
        for example in examples:
            packer.add(example.input_ids, example.loss_mask)
        self._write_held_out(split, {"messages": conversation, "source": source})

    def _write_held_out(self, split: Split, row: dict[str, str | Conversation]) -> None:
        if split == "held_out":
            self._held_out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def save(self) -> State:
        """Flushes everything to disk and returns the state to resume from, as JSON values."""
        # The packers come first, because document packers write their full blocks when their state is requested.
        packers = {split: packer.state() for split, packer in self._packers.items()}
        self._held_out.flush()
        os.fsync(self._held_out.fileno())
        return {
            "packers": packers,
            "blocks": {split: blocks.save() for split, blocks in self.blocks.items()},
            "held_out_bytes": self._held_out.tell(),
        }

    def finish(self) -> None:
        """Writes the blocks that are not full yet."""
        for packer in self._packers.values():
            packer.finish()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)


class _GrowingFile:
    """The running hash of a file to which data is appended. The header of an array is left out, since it changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash, self._end = hashlib.sha256(), 0

    def resume(self, end: int, expected: str) -> bool:
        """Hashes the file up to ``end``. Returns whether its hash is as expected."""
        try:
            self._read(end)
        except OSError:
            return False
        return (self._end, self._hash.hexdigest()) == (end, expected)

    def hashed(self) -> tuple[int, str]:
        """Hashes what was appended. Returns the size of the file and its hash."""
        self._read(self.path.stat().st_size)
        return self._end, self._hash.hexdigest()

    def _read(self, end: int) -> None:
        with open(self.path, "rb") as stream:
            if not self._end and self.path.suffix == ".npy":
                np.lib.format.read_magic(stream)
                np.lib.format.read_array_header_1_0(stream)
                self._end = stream.tell()
            stream.seek(self._end)
            while chunk := stream.read(min(CHUNK_BYTES, end - self._end)):
                self._hash.update(chunk)
                self._end += len(chunk)


class TokenizeCheckpoint:
    """The progress of tokenization, saved regularly next to the output so that a killed attempt loses only seconds.

    Hashes of the examples seen are appended to a separate file, since they can take gigabytes. Everything else is a few
    kilobytes of JSON, which is replaced atomically after the hashes have been written.

    The checkpoint has hashes of all files as they were when it was saved. If one has been damaged since, tokenizing
    starts over.

    Args:
        directory: the partial directory of the artifact; the checkpoint is a directory inside it.
        splits: the splits of the dataset.

    Attributes:
        state: the state that the last attempt saved, or None if there is nothing to resume from.
        hashes: 64-bit hashes of the examples that the last attempt had seen.
    """

    def __init__(self, directory: Path, splits: Sequence[Split]) -> None:
        self._directory = directory / "checkpoint"
        self._directory.mkdir(exist_ok=True)
        self._state_file, self._hashes_file = self._directory / "progress.json", self._directory / "hashes.uint64"
        blocks = [directory / f"{split}.{name}.npy" for split in splits for name in COLUMN_DTYPES]
        self._files = [_GrowingFile(path) for path in (*blocks, directory / HELD_OUT_FILE, self._hashes_file)]
        self.state: State | None = None
        self.hashes = array("Q")
        self._saved_hashes = 0
        state = read_record(self._state_file, lambda value: isinstance(value["hashes"], int) and value["blocks"])
        if state is not None and (damaged := self._damaged(state)) is not None:
            report_once(f"{damaged} is damaged: tokenizing restarts")
        elif state is not None:
            self._load(state)

    def _damaged(self, state: State) -> Path | None:
        """Returns a file that is not as it was when the state was saved, or None."""
        if "files" not in state:  # of an earlier version
            return None
        if state.pop("sha256", None) != sha256_json(state):
            return self._state_file
        for file in self._files:
            if not file.resume(*state["files"][file.path.name]):
                self._files = [_GrowingFile(each.path) for each in self._files]
                return file.path
        return None

    def _load(self, state: State) -> None:
        hashes = array("Q")
        try:
            # The file may contain more hashes than this, if the attempt was killed between the two writes.
            with open(self._hashes_file, "rb") as stream:
                hashes.fromfile(stream, state["hashes"])
        except (FileNotFoundError, EOFError, ValueError) as error:  # starting over costs only time
            report_once(f"{self._hashes_file} is missing or truncated ({type(error).__name__}): tokenizing restarts")
            return
        self.state, self.hashes, self._saved_hashes = state, hashes, state["hashes"]

    def save(self, state: State, new_hashes: array[int]) -> None:
        """Saves the state and appends ``new_hashes``, which is emptied."""
        with open(self._hashes_file, "r+b" if self._saved_hashes else "wb") as stream:
            stream.truncate(self._saved_hashes * new_hashes.itemsize)
            stream.seek(0, os.SEEK_END)
            new_hashes.tofile(stream)
            stream.flush()
            os.fsync(stream.fileno())
        self._saved_hashes += len(new_hashes)
        del new_hashes[:]
        files = {file.path.name: file.hashed() for file in self._files}
        content = {"hashes": self._saved_hashes, **state, "files": files}
        write_json(self._state_file, {**content, "sha256": sha256_json(content)})

    def remove(self) -> None:
        """Removes the checkpoint of a finished dataset."""
        # The state is removed first. Without it the other files are ignored, so a crash in between is harmless.
        self._state_file.unlink(missing_ok=True)
        shutil.rmtree(self._directory)
