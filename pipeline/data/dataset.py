"""The files of one tokenize artifact, open for writing: token blocks by split, and the held-out text itself."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from pipeline.config import Tokenize
from pipeline.data.blocks import BlockWriter, DocumentPacker, ExamplePacker, Ids, State
from pipeline.data.chat import Rendered
from pipeline.data.records import Conversation
from pipeline.data.sources import SPLITS, Split
from pipeline.files import read_json, write_json

HELD_OUT_FILE = "held_out.jsonl"


class DatasetWriter:
    """Packs examples into blocks and keeps the held-out ones as text beside them.

    Args:
        directory: where the files go; what lies there under their names is overwritten.
        padding: the token that fills blocks up.
        state: what ``save()`` gave: writing goes on there, and what was written since is cut off.
    """

    def __init__(self, directory: Path, settings: Tokenize, padding: int, state: State | None = None) -> None:
        length = settings.sequence_length
        packer = DocumentPacker if settings.purpose == "corpus" else ExamplePacker
        self._files = ExitStack()
        self.blocks: dict[Split, BlockWriter] = {}
        self._packers: dict[Split, DocumentPacker | ExamplePacker] = {}
        for split in SPLITS:
            blocks = BlockWriter(directory, split, length, state["blocks"][split] if state else None)
            self.blocks[split] = self._files.enter_context(blocks)
            self._packers[split] = packer(blocks, length, padding, state["packers"][split] if state else None)
        self._held_out = self._files.enter_context(open(directory / HELD_OUT_FILE, "r+b" if state else "wb"))
        self._held_out.truncate(state["held_out_bytes"] if state else 0)
        self._held_out.seek(0, os.SEEK_END)

    def add_document(self, split: Split, source: str, text: str, ids: Ids) -> None:
        """A text, and the setting it came by, such as ``data.corpus.1``; every token but its first is a target."""
        packer = self._packers[split]
        assert isinstance(packer, DocumentPacker)
        packer.add(ids)
        self._keep(split, {"text": text, "source": source})

    def add_conversation(
        self, split: Split, source: str, conversation: Conversation, rendered: Sequence[Rendered]
    ) -> None:
        """A conversation as it was rendered, in one example or several; each stays whole."""
        packer = self._packers[split]
        assert isinstance(packer, ExamplePacker)
        for example in rendered:
            packer.add(example.input_ids, example.loss_mask)
        self._keep(split, {"messages": conversation, "source": source})

    def _keep(self, split: Split, row: dict[str, str | Conversation]) -> None:
        if split == "held_out":
            self._held_out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def save(self) -> State:
        """Puts everything on the disk and says how much that is, as JSON values."""
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


# --------------------------------------------------------------------------------------------------
# How far tokenizing got: written now and then beside what was written, so that a killed attempt loses seconds.
#
# Hashes of what was seen are appended to a file of their own; everything else is a few kilobytes of JSON, replaced as a
# whole and last.


class Checkpoint:
    """The checkpoint in one artifact's partial directory.

    Attributes:
        state: what the last attempt saved, or None where there is nothing to go on from.
        hashes: what it had seen.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "checkpoint"
        self._directory.mkdir(exist_ok=True)
        self._json, self._hashes = self._directory / "progress.json", self._directory / "hashes.uint64"
        self.state: State | None = None
        self.hashes = array("Q")
        self._saved_hashes = 0
        if self._json.exists():
            self._load()

    def _load(self) -> None:
        try:
            self.state = read_json(self._json)
        except json.JSONDecodeError:  # the machine itself went down in mid-save; nothing is lost but time
            return
        assert self.state is not None
        self._saved_hashes = self.state["hashes"]
        with open(self._hashes, "rb") as stream:
            self.hashes.fromfile(stream, self._saved_hashes)

    def save(self, state: State, news: array[int]) -> None:
        """Saves the state, and the hashes that were not saved yet, which it empties."""
        with open(self._hashes, "r+b" if self._saved_hashes else "wb") as stream:
            stream.truncate(self._saved_hashes * news.itemsize)
            stream.seek(0, os.SEEK_END)
            news.tofile(stream)
            stream.flush()
            os.fsync(stream.fileno())
        self._saved_hashes += len(news)
        del news[:]
        write_json(self._json, {"hashes": self._saved_hashes, **state})

    def remove(self) -> None:
        """Everything is written. The state goes first: without it, what is left over is not looked at."""
        self._json.unlink(missing_ok=True)
        shutil.rmtree(self._directory)
