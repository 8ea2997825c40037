"""The files of one tokenize artifact, open for writing: token blocks by split, and the held-out text itself."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from pipeline.config import Tokenize
from pipeline.data.blocks import BlockWriter, DocumentPacker, ExamplePacker, Ids, State
from pipeline.data.chat import Rendered
from pipeline.data.conversations import Conversation
from pipeline.data.sources import SPLITS, Split

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
