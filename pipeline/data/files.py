"""Streams local files as records: text and JSON (also compressed as .gz or .zst), Parquet and Arrow.

A record is a text or a row with named columns. ``sources.py`` converts records to examples.
"""

from __future__ import annotations

import codecs
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from pipeline.data.json_array import CHUNK, BadArray, JsonArray, TooLarge

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
JSON_SPACE = " \t\n\r"  # other white space is not allowed between the values of JSON
ARROW_ROWS = 1024  # rows converted to Python values at a time
ARROW_MAGIC = b"ARROW1"
# An Arrow stream ends with one of these, the second one if it was written before version 0.15.
ARROW_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")

Position = dict[str, Any]  # JSON values from which a stream can be resumed


@dataclass(frozen=True)
class Record:
    """One text or row, and where it is: the file or dataset, and the line or row in it, such as ``line 3``."""

    value: str | dict[str, Any]
    file: str
    place: str = ""

    @property
    def location(self) -> str:
        """For messages, such as ``chats.jsonl, line 3``."""
        return location_of(self.file, self.place)


def location_of(file: str, place: str) -> str:
    """Returns a file or dataset with a place in it, such as ``chats.jsonl, line 3``."""
    return f"{file}, {place}" if place else file


class BadFile(Exception):
    """The content of a file does not match its suffix. The caller adds the setting that named the file.

    Args:
        location: the file, and the line, row or byte.
        rule: what is wrong with it.
        remedy: what to do about it, if that is not to correct the file.
    """

    def __init__(self, location: str, rule: str, remedy: str | None = None) -> None:
        self.location, self.rule, self.remedy = location, rule, remedy
        super().__init__(f"{location}: {rule}")


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        columns: the columns that are needed; Parquet and Arrow files are not decoded any further.
        max_record_bytes: the largest line or record, and the most memory that decompressing a block may take.
    """

    columns: Collection[str]
    max_record_bytes: int

    def too_large(self, location: str, what: str) -> BadFile:
        """Returns the error for something that exceeds ``max_record_bytes``."""
        rule = f"{what} exceeds data.max_record_bytes = {self.max_record_bytes} ({self.max_record_bytes / 2**20:g} MiB)"
        return BadFile(location, rule, "If the file is what it should be, increase data.max_record_bytes.")


class FileStream:
    """The records of several files, one file after another.

    Args:
        paths: files of known formats.
        reading: how they are read.
        position: a value returned by ``position()`` for the same files; the stream resumes there.
    """

    def __init__(self, paths: list[Path], reading: Reading, position: Position | None = None) -> None:
        self._paths, self._reading = paths, reading
        self._file: int = position["file"] if position else 0
        self._records: int = position["records"] if position else 0

    def __iter__(self) -> Iterator[Record]:
        while self._file < len(self._paths):
            # Compressed files do not support seeking, so records before the position are read and skipped.
            records = read_records(self._paths[self._file], self._reading)
            for record in islice(records, self._records, None):
                self._records += 1
                yield record
            self._file, self._records = self._file + 1, 0

    def position(self) -> Position:
        """Returns the position after the last record that was returned."""
        return {"file": self._file, "records": self._records}


def file_format(path: Path) -> str:
    """Returns the suffix that determines how a file is read, without compression: ``.jsonl`` for ``a.jsonl.zst``."""
    inner = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    return inner.suffix.lower()


def read_records(path: Path, reading: Reading) -> Iterator[Record]:
    """Streams the records of a file. Memory is bounded by the longest line, text chunk or batch of rows.

    Raises:
        BadFile: the content does not match the suffix, or a part of it is too large.
    """
    reader = READERS[file_format(path)]
    try:
        yield from reader(path, reading)
    except (gzip.BadGzipFile, EOFError, zlib.error, zstd.ZstdError) as error:
        if "too much memory" in str(error):  # a window larger than the limit; zstd --long writes such files
            raise reading.too_large(str(path), "the memory that decompressing it takes (see zstd --long)") from error
        raise BadFile(
            str(path), f"it is not a complete {path.suffix} file, or it has trailing data ({error})"
        ) from error
    except OSError as error:
        raise BadFile(str(path), f"it cannot be read ({error.strerror or error})") from error


# --------------------------------------------------------------------------------------- text and JSON


def _read_text(path: Path, reading: Reading) -> Iterator[Record]:
    """Yields a text file as one document, or as several if it is long."""
    chunk: list[str] = []
    length = 0
    for number, line in _lines(path, reading, MAX_CHUNK_CHARACTERS):
        if length >= MAX_CHUNK_CHARACTERS or (length >= CHUNK_CHARACTERS and not line.strip()):
            yield Record("".join(chunk), str(path), f"before line {number}")
            chunk, length = [], 0
        chunk.append(line)
        length += len(line)
    yield Record("".join(chunk), str(path))


def _read_json_lines(path: Path, reading: Reading) -> Iterator[Record]:
    limit = reading.max_record_bytes
    for number, line in _lines(path, reading, limit + 1):
        if len(line) > limit:
            raise reading.too_large(f"{path}, line {number}", "the line")
        if line.strip(JSON_SPACE):
            yield _row(_parse(line, path, f"line {number}"), path, f"line {number}")


def _parse(text: str, path: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadFile(f"{path}, {place}", f"the line is not JSON ({error})") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(error, path, place) from error


def _unreadable_json(error: Exception, path: Path, place: str) -> BadFile:
    """Returns the error for a number of thousands of digits, or for thousands of nested lists."""
    nested = isinstance(error, RecursionError)
    rule = "its values are nested too deeply" if nested else f"a value cannot be read ({error})"
    return BadFile(f"{path}, {place}", rule)


def _row(value: Any, path: Path, place: str) -> Record:
    if not isinstance(value, dict):
        what = place.partition(" ")[0]
        raise BadFile(f"{path}, {place}", f"the {what} is not a JSON object with named columns")
    return Record(value, str(path), place)


def _read_json(path: Path, reading: Reading) -> Iterator[Record]:
    """Reads a JSON array of objects, or JSON lines, which also go by this suffix."""
    pieces = (piece for _, piece in _lines(path, reading, CHUNK))
    start = next((piece for piece in pieces if piece.strip(JSON_SPACE)), "").lstrip(JSON_SPACE)
    if not start.startswith("["):
        if start.strip(JSON_SPACE) in ("{", "}") or start[:1] not in ("{", ""):
            raise BadFile(str(path), "it is neither an array of JSON objects nor has it one object per line")
        yield from _read_json_lines(path, reading)
        return
    array = JsonArray(start[1:], pieces, reading.max_record_bytes)
    try:
        for value in array:
            yield _row(value, path, f"element {array.number}")
    except TooLarge as error:
        raise reading.too_large(f"{path}, element {array.number}", "the element") from error
    except BadArray as error:
        raise BadFile(f"{path}, element {array.number}", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(error, path, f"element {array.number}") from error


def _lines(path: Path, reading: Reading, max_bytes: int) -> Iterator[tuple[int, str]]:
    """Yields numbered lines of UTF-8 text without a byte order mark. Lines longer than ``max_bytes`` are split."""
    # Incremental, because a piece of a long line may end inside a character.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 1
    with closing(OPENERS.get(path.suffix.lower(), _open_plain)(path, reading)) as stream:
        while line := stream.readline(max_bytes):
            yield number, _decode(decoder, line, f"{path}, line {number}")
            number += line.endswith(b"\n")
    _decode(decoder, b"", f"{path}, line {number}", final=True)  # raises if the last character is incomplete


def _decode(decoder: codecs.IncrementalDecoder, line: bytes, location: str, final: bool = False) -> str:
    if b"\0" in line:
        raise BadFile(location, "it contains NUL bytes, so it is not text")
    try:
        return decoder.decode(line, final)
    except UnicodeDecodeError as error:
        raise BadFile(location, f"it is not UTF-8 text ({error})") from error


def _open_plain(path: Path, reading: Reading) -> IO[bytes]:
    return open(path, "rb")


def _open_gzip(path: Path, reading: Reading) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _open_zstandard(path: Path, reading: Reading) -> IO[bytes]:
    largest = zstd.DecompressionParameter.window_log_max
    least, most = largest.bounds()
    window = min(max(reading.max_record_bytes.bit_length() - 1, least), most)
    return cast("IO[bytes]", zstd.open(path, "rb", options={largest: window}))


OPENERS: dict[str, Callable[[Path, Reading], IO[bytes]]] = {".gz": _open_gzip, ".zst": _open_zstandard}


# ---------------------------------------------------------------------------------- Parquet and Arrow


def _read_parquet(path: Path, reading: Reading) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path, page_checksum_verification=True)
        columns = _needed(path, table.schema_arrow, reading)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadFile(str(path), f"it is not a Parquet file, or is damaged ({error})") from error
    with table:
        yield from _rows(path, _parquet_batches(path, table, columns, reading), reading)


def _parquet_batches(path: Path, table: Any, columns: list[str], reading: Reading) -> Iterator[pyarrow.RecordBatch]:
    """Yields batches that fit ``max_record_bytes``, according to the sizes that the file states."""
    for group in range(table.num_row_groups):
        stated = table.metadata.row_group(group)
        chunks = [stated.column(number) for number in range(stated.num_columns)]
        size = sum(
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns
        )
        rows = min(ARROW_ROWS, reading.max_record_bytes * stated.num_rows // max(size, 1))
        if rows < 1 and stated.num_rows:
            raise reading.too_large(f"{path}, row group {group}", "the average row")
        yield from table.iter_batches(batch_size=max(rows, 1), row_groups=[group], columns=columns)


def _read_arrow(path: Path, reading: Reading) -> Iterator[Record]:
    """Reads both Arrow formats: the stream format, written by ``datasets``, and the file format (Feather)."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            batches = _arrow_batches(path, source)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise BadFile(str(path), f"it is not an Arrow file ({error})") from error
        yield from _rows(path, batches, reading)


def _arrow_batches(path: Path, source: pyarrow.NativeFile) -> Iterator[pyarrow.RecordBatch]:
    from pyarrow import ipc

    is_file = source.read(len(ARROW_MAGIC)) == ARROW_MAGIC  # only the file format begins with it
    source.seek(0)
    if is_file:
        reader = ipc.open_file(source)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return _whole_stream(path, source, ipc.open_stream(source))


def _whole_stream(path: Path, source: pyarrow.NativeFile, stream: Any) -> Iterator[pyarrow.RecordBatch]:
    """Yields all batches, and verifies that the stream ends where the file does.

    Arrow takes the end of the file, or zeros, for the end of the stream.
    """
    yield from stream
    end, size = source.tell(), source.size()
    source.seek(max(0, end - len(ARROW_ENDS[0])))
    if end < size or not source.read().endswith(ARROW_ENDS):
        rule = f"the last complete batch ends at byte {end} of {size}, and no end of the stream follows"
        raise BadFile(str(path), f"it is damaged or incomplete: {rule}")


def _needed(path: Path, schema: pyarrow.Schema, reading: Reading) -> list[str]:
    """Returns the needed columns that a file has, or all of them if it has none, so that they can be named."""
    names = [name for name in schema.names if name in reading.columns] or list(schema.names)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise BadFile(str(path), f"it has several columns with the name {repeated[0]}")
    return names


def _rows(path: Path, batches: Iterator[pyarrow.RecordBatch], reading: Reading) -> Iterator[Record]:
    import pyarrow

    row = 0
    try:
        for batch in batches:
            needed = _needed(path, batch.schema, reading)
            selected = batch.select([number for number, name in enumerate(batch.schema.names) if name in needed])
            _validate(path, selected, row)
            # A batch may be as large as the file, so it is converted a slice at a time.
            rows = max(1, min(ARROW_ROWS, reading.max_record_bytes * batch.num_rows // max(selected.nbytes, 1)))
            for start in range(0, batch.num_rows, rows):
                for value in _values(path, selected.slice(start, rows), row):
                    row += 1
                    yield Record(value, str(path), f"row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise BadFile(f"{path}, after row {row}", f"it is damaged or incomplete ({error})") from error


def _validate(path: Path, batch: pyarrow.RecordBatch, row: int) -> None:
    """Checks text and offsets, since offsets that point anywhere would crash the process."""
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        batch.validate()  # raises if even the number of rows is wrong
        for number in range(batch.num_rows):
            try:
                batch.slice(number, 1).validate(full=True)
            except pyarrow.ArrowInvalid as reason:
                raise BadFile(f"{path}, row {row + number + 1}", f"it is damaged ({reason})") from error
        raise


def _values(path: Path, batch: pyarrow.RecordBatch, row: int) -> list[dict[str, Any]]:
    """Converts a batch to Python values. ``row`` rows of the file precede it."""
    try:
        return [without_filled_fields(value) for value in batch.to_pylist()]
    except Exception as error:  # text that is not UTF-8, dates and time zones that Python does not have, and more
        if batch.num_rows == 1:
            raise BadFile(f"{path}, row {row + 1}", f"it has a value that cannot be read ({error})") from error
        single = [_values(path, batch.slice(number, 1), row + number) for number in range(batch.num_rows)]
        return [value for values in single for value in values]


def without_filled_fields(value: Any, depth: int = 0) -> Any:
    """Returns a row without the null fields of nested structs. Those of the row and of messages in it are kept.

    All structs of an Arrow column have the same fields, so every tool call has the arguments of all tools, and null for
    those that it was written without.
    """
    if isinstance(value, dict):
        kept = {name: field for name, field in value.items() if field is not None or depth < 2}
        return {name: without_filled_fields(field, depth + 1) for name, field in kept.items()}
    if isinstance(value, list):
        return [without_filled_fields(element, depth) for element in value]
    return value


READERS: dict[str, Callable[[Path, Reading], Iterator[Record]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
