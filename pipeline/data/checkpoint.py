"""How far tokenizing got: written now and then beside what was written, so that a killed attempt loses seconds.

Hashes of what was seen are appended to a file of their own; everything else is a few kilobytes of JSON, replaced as a
whole and last.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from pathlib import Path

from pipeline.artifact import read_json, write_json
from pipeline.data.blocks import State


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
