"""Streams local files as records: text and JSON lines (also compressed as .gz or .zst), Parquet and Arrow.

A record is a text or a row with named columns. ``sources.py`` converts records to examples.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from pipeline.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    import pyarrow

# A text file longer than CHUNK_CHARACTERS is split into documents at the next blank line. If none follows before
# MAX_CHUNK_CHARACTERS, it is split at the end of a line, and a line longer than that is split anywhere.
CHUNK_CHARACTERS = 32_768
MAX_CHUNK_CHARACTERS = 8 * CHUNK_CHARACTERS
ARROW_ROWS = 1024  # rows converted to Python values at a time
ARROW_MAGIC = b"ARROW1"

Position = dict[str, Any]  # JSON values from which a stream can be resumed


@dataclass(frozen=True)
class Record:
    """One text or row, and its location for messages, such as ``chats.jsonl, line 3``."""

    value: str | dict[str, Any]
    location: str


class BadFile(Exception):
    """The content of a file does not match its suffix. The caller adds the setting that named the file."""

    def __init__(self, location: str, rule: str) -> None:
        self.location, self.rule = location, rule
        super().__init__(f"{location}: {rule}")


class FileStream:
    """The records of several files, one file after another.

    Args:
        paths: files of known formats.
        position: a value returned by ``position()`` for the same files; the stream resumes there.
    """

    def __init__(self, paths: list[Path], position: Position | None = None) -> None:
        self._paths = paths
        self._file: int = position["file"] if position else 0
        self._records: int = position["records"] if position else 0

    def __iter__(self) -> Iterator[Record]:
        while self._file < len(self._paths):
            # Compressed files do not support seeking, so records before the position are read and skipped.
            for record in islice(read_records(self._paths[self._file]), self._records, None):
                self._records += 1
                yield record
            self._file, self._records = self._file + 1, 0

    def position(self) -> Position:
        """Returns the position after the last record that was returned."""
        return {"file": self._file, "records": self._records}


def find_files(path: str, setting: str) -> list[Path]:
    """Returns the files of supported formats at a path, in a directory (recursively) or matching a glob, sorted.

    Raises:
        UserError: there are none.
    """
    path = os.path.expanduser(path)
    root = Path(path)
    if root.is_dir():
        candidates = [str(found) for found in root.rglob("*")]
    else:
        # An existing path is taken literally even if it contains glob characters.
        candidates = [path] if root.exists() else glob.glob(path, recursive=True)
    if not candidates and not root.is_dir():
        raise UserError(
            setting=setting,
            value=path,
            rule="there is no such file or directory, and no file matches it as a glob",
            remedy=f"Set {setting} to an existing file, directory or glob.",
        )
    files = sorted(Path(name) for name in candidates if Path(name).is_file() and file_format(Path(name)) in READERS)
    if not files:
        raise UserError(
            setting=setting,
            value=path,
            rule="it contains no file of a supported format",
            remedy=f"Provide files ending in {', '.join(READERS)}; .txt and .jsonl may be followed by .gz or .zst.",
        )
    return files


def file_format(path: Path) -> str:
    """Returns the suffix that determines how a file is read, without compression: ``.jsonl`` for ``a.jsonl.zst``."""
    inner = path.with_suffix("") if path.suffix in OPENERS else path
    return inner.suffix.lower()


def read_records(path: Path) -> Iterator[Record]:
    """Streams the records of a file. Memory is bounded by the longest line, text chunk or row group.

    Raises:
        BadFile: the content does not match the suffix.
    """
    reader = READERS[file_format(path)]
    try:
        yield from reader(path)
    except (gzip.BadGzipFile, EOFError, zlib.error, zstd.ZstdError) as error:
        raise BadFile(path.name, f"it is not a complete {path.suffix} file ({error})") from error


# --------------------------------------------------------------------------------- text and JSON lines


def _read_text(path: Path) -> Iterator[Record]:
    """Yields a text file as one document, or as several if it is long."""
    chunk: list[str] = []
    length = 0
    for number, line in _lines(path, max_bytes=MAX_CHUNK_CHARACTERS):
        if length >= MAX_CHUNK_CHARACTERS or (length >= CHUNK_CHARACTERS and not line.strip()):
            yield Record("".join(chunk), f"{path.name}, before line {number}")
            chunk, length = [], 0
        chunk.append(line)
        length += len(line)
    yield Record("".join(chunk), path.name)


def _read_json_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        location = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadFile(location, f"the line is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise BadFile(location, "the line is not a JSON object with named columns")
        yield Record(row, location)


def _lines(path: Path, max_bytes: int = -1) -> Iterator[tuple[int, str]]:
    """Yields numbered lines of UTF-8 text without a byte order mark. Lines longer than ``max_bytes`` are split."""
    # Incremental, because a piece of a long line may end inside a character.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 1
    with closing(OPENERS.get(path.suffix, _open_plain)(path)) as stream:
        while line := stream.readline(max_bytes):
            yield number, _decode(decoder, line, f"{path.name}, line {number}")
            number += line.endswith(b"\n")
    _decode(decoder, b"", f"{path.name}, line {number}", final=True)  # raises if the last character is incomplete


def _decode(decoder: codecs.IncrementalDecoder, line: bytes, location: str, final: bool = False) -> str:
    if b"\0" in line:
        raise BadFile(location, "it contains NUL bytes, so it is not text")
    try:
        return decoder.decode(line, final)
    except UnicodeDecodeError as error:
        raise BadFile(location, f"it is not UTF-8 text ({error})") from error


def _open_plain(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _open_gzip(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _open_zstandard(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", zstd.open(path, "rb"))


OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": _open_gzip, ".zst": _open_zstandard}


# ---------------------------------------------------------------------------------- Parquet and Arrow


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise BadFile(path.name, f"it is not a Parquet file ({error})") from error
    yield from _rows(path, table.iter_batches(batch_size=ARROW_ROWS))


def _read_arrow(path: Path) -> Iterator[Record]:
    """Reads both Arrow formats: the stream format, written by ``datasets``, and the file format (Feather)."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            batches = _arrow_batches(source)
        except pyarrow.ArrowInvalid as error:
            raise BadFile(path.name, f"it is not an Arrow file ({error})") from error
        yield from _rows(path, batches)


def _arrow_batches(source: pyarrow.NativeFile) -> Iterator[pyarrow.RecordBatch]:
    from pyarrow import ipc

    is_file = source.read(len(ARROW_MAGIC)) == ARROW_MAGIC  # only the file format begins with it
    source.seek(0)
    if not is_file:
        return iter(ipc.open_stream(source))
    reader = ipc.open_file(source)
    return (reader.get_batch(number) for number in range(reader.num_record_batches))


def _rows(path: Path, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Record]:
    import pyarrow

    row = 0
    try:
        for batch in batches:
            # A batch may be as large as the file, so it is converted a slice at a time.
            for start in range(0, batch.num_rows, ARROW_ROWS):
                for value in batch.slice(start, ARROW_ROWS).to_pylist():
                    row += 1
                    yield Record(value, f"{path.name}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise BadFile(path.name, f"it is damaged or incomplete ({error})") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
