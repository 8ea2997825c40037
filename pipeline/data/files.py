"""Local files as records: text, JSON lines (also .gz and .zst), Parquet and Arrow, streamed.

A record is a text, or a row with named columns. Nothing here knows what the records are for.
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

TEXT_PIECE = 32_768  # characters after which a text file is cut at the next blank line into another document
LONGEST_TEXT = 8 * TEXT_PIECE  # where no blank line comes, it is cut at the next line's end; a longer line is cut up
ARROW_ROWS = 1024  # made into Python values at a time

Position = dict[str, Any]  # JSON values that say where a stream stands


@dataclass(frozen=True)
class Record:
    """One text or row, and where it stands, for messages."""

    value: str | dict[str, Any]
    where: str  # "chats.jsonl, line 3"


class BadFile(Exception):
    """A file's content is not what its name says; the caller knows the setting it came from."""

    def __init__(self, where: str, rule: str) -> None:
        self.where, self.rule = where, rule
        super().__init__(f"{where}: {rule}")


def find_files(path: str, setting: str) -> list[Path]:
    """The readable files that a path, directory (recursively) or glob names, sorted.

    Raises:
        UserError: it names none.
    """
    path = os.path.expanduser(path)
    place = Path(path)
    if place.is_dir():
        candidates = [str(found) for found in place.rglob("*")]
    else:
        candidates = [path] if place.exists() else glob.glob(path, recursive=True)
    if not candidates and not place.is_dir():
        raise UserError(
            setting=setting,
            value=path,
            rule="there is no such file or directory, and no file matches it as a pattern",
            remedy=f"Set {setting} to an existing file, directory or glob.",
        )
    files = sorted(Path(name) for name in candidates if Path(name).is_file() and kind_of(Path(name)) in READERS)
    if not files:
        raise UserError(
            setting=setting,
            value=path,
            rule="it holds no file of a known kind",
            remedy=f"Known are {', '.join(READERS)}; .txt and .jsonl may also end in .gz or .zst.",
        )
    return files


def kind_of(path: Path) -> str:
    """The suffix that says how to read a file, without a compression suffix: ``.jsonl`` for ``a.jsonl.zst``."""
    inner = path.with_suffix("") if path.suffix in OPENERS else path
    return inner.suffix.lower()


class FileStream:
    """The records of files, one after the other.

    Args:
        position: what ``position()`` said of an earlier stream over the same files: it goes on there.
    """

    def __init__(self, paths: list[Path], position: Position | None = None) -> None:
        self._paths = paths
        self._file: int = position["file"] if position else 0
        self._records: int = position["records"] if position else 0

    def __iter__(self) -> Iterator[Record]:
        while self._file < len(self._paths):
            for record in islice(read_records(self._paths[self._file]), self._records, None):
                self._records += 1
                yield record
            self._file, self._records = self._file + 1, 0

    def position(self) -> Position:
        """Behind the record that was given last."""
        return {"file": self._file, "records": self._records}


def read_records(path: Path) -> Iterator[Record]:
    """Streams a file's records; memory is bounded by the longest line or piece.

    Raises:
        BadFile: the content is not what the name says.
    """
    reader = READERS[kind_of(path)]
    try:
        yield from reader(path)
    except (gzip.BadGzipFile, EOFError, zlib.error, zstd.ZstdError) as error:
        raise BadFile(path.name, f"it is not a whole {path.suffix} file ({error})") from error


# --------------------------------------------------------------------------------------------- text


def _read_text(path: Path) -> Iterator[Record]:
    """A text file is one document, or several where it is long."""
    piece: list[str] = []
    length = 0
    for number, line in _lines(path, longest=LONGEST_TEXT):
        if length >= LONGEST_TEXT or (length >= TEXT_PIECE and not line.strip()):
            yield Record("".join(piece), f"{path.name}, before line {number}")
            piece, length = [], 0
        piece.append(line)
        length += len(line)
    yield Record("".join(piece), path.name)


def _read_json_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadFile(where, f"the line is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise BadFile(where, "the line is JSON but no object with named columns")
        yield Record(row, where)


def _lines(path: Path, longest: int = -1) -> Iterator[tuple[int, str]]:
    """Numbered lines of UTF-8 text, a line of more than ``longest`` bytes in pieces; a byte order mark is dropped."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a piece may end within a character
    number = 1
    with closing(OPENERS.get(path.suffix, _open_plain)(path)) as stream:
        while line := stream.readline(longest):
            yield number, _decoded(decoder, line, f"{path.name}, line {number}")
            number += line.endswith(b"\n")
    _decoded(decoder, b"", f"{path.name}, line {number}", final=True)


def _decoded(decoder: codecs.IncrementalDecoder, line: bytes, where: str, final: bool = False) -> str:
    if b"\0" in line:
        raise BadFile(where, "it holds NUL bytes, so it is not text")
    try:
        return decoder.decode(line, final)
    except UnicodeDecodeError as error:
        raise BadFile(where, f"it is not UTF-8 text ({error})") from error


def _open_plain(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _open_gzip(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _open_zstandard(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", zstd.open(path, "rb"))


OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": _open_gzip, ".zst": _open_zstandard}

# ---------------------------------------------------------------------------------- parquet and arrow


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise BadFile(path.name, f"it is not a Parquet file ({error})") from error
    yield from _rows(path, table.iter_batches(batch_size=ARROW_ROWS))


def _read_arrow(path: Path) -> Iterator[Record]:
    """Both of Arrow's formats: the stream that ``datasets`` saves, and the file, also known as Feather."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            batches = _arrow_batches(source)
        except pyarrow.ArrowInvalid as error:
            raise BadFile(path.name, f"it is not an Arrow file ({error})") from error
        yield from _rows(path, batches)


def _arrow_batches(source: pyarrow.NativeFile) -> Iterator[pyarrow.RecordBatch]:
    from pyarrow import ipc

    is_file = source.read(len(ARROW_MAGIC)) == ARROW_MAGIC
    source.seek(0)
    if not is_file:
        return iter(ipc.open_stream(source))
    reader = ipc.open_file(source)
    return (reader.get_batch(number) for number in range(reader.num_record_batches))


def _rows(path: Path, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Record]:
    row = 0
    for batch in _readable(path, batches):
        for start in range(0, batch.num_rows, ARROW_ROWS):
            for value in batch.slice(start, ARROW_ROWS).to_pylist():
                row += 1
                yield Record(value, f"{path.name}, row {row}")


def _readable(path: Path, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """The batches; one that cannot be read is the file's fault."""
    import pyarrow

    try:
        yield from batches
    except (pyarrow.ArrowException, OSError) as error:
        raise BadFile(path.name, f"it is damaged, or not whole ({error})") from error


ARROW_MAGIC = b"ARROW1"
READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
