"""Of files of data, what json and pyarrow read is taught. The rest is refused, or dropped and counted."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from pipeline.config import Source
from pipeline.data import chat_worker, files, json_array
from pipeline.data.chat import ChatTokenizer
from pipeline.data.records import CHAT_ROLES, Drops, Example
from pipeline.data.sources import ExampleStream, Purpose
from pipeline.data.splits import Deduplicator
from pipeline.data.templates import PLAIN_TEMPLATE
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError
from tests.fuzz.limits import examples, outcome
from tests.fuzz.strategies import damaged, encoded, literals, object_text, texts, values

LIMIT = 20_000  # data.max_record_bytes
UNREADABLE = (ValueError, TypeError, RecursionError, OverflowError, EOFError, OSError, zlib.error,
    pyarrow.ArrowException,
              files.zstd.ZstdError)  # fmt: skip


def _read(path: Path, purpose: Purpose) -> list[Example]:
    text_field = "text" if purpose == "corpus" else None
    source = Source(
        kind="files", path=str(path), config_name=None, split=None, revision=None, text_field=text_field, weight=1.0
    )
    return list(ExampleStream(source, purpose, f"data.{purpose}", LIMIT))


def _document(row: Any) -> str | None:
    """The text of a row, "" for one to be dropped as blank, and None for one to be dropped as faulty."""
    if not isinstance(row, dict):
        raise TypeError("not a row")
    text = row.get("text", 0)
    return "" if text is None else text if isinstance(text, str) else None


def _check(path: Path, expected: Callable[[], list[str | None]]) -> None:
    """Compares what is read with an oracle, which raises an error for a file that must be refused."""
    read = outcome(lambda: _read(path, "corpus"))
    try:
        texts_ = expected()
    except UNREADABLE:
        assert isinstance(read, UserError), read
        return
    if not isinstance(read, UserError):
        event("read")
        assert [None if example.fault else example.content for example in read] == texts_
    elif "nested" not in read.rule:  # a value that is not needed may be too deep for one reader or the other
        faulty = None in texts_ and not any(texts_)  # not one record can be used
        zeros = any(text and (not text.strip("\0") or "\0" * 16 in text) for text in texts_)
        assert faulty or zeros or "NUL bytes" in read.rule or "max_record_bytes" in read.rule, read


# ------------------------------------------------------------------------------------------------- JSON


@st.composite
def _row(draw: st.DrawFn) -> bytes:
    """A line of JSON, or almost."""
    text = draw(literals() | st.builds(json.dumps, texts))
    pairs = [
        ("text", text),
        *draw(st.lists(st.tuples(st.sampled_from(["id", "text", "", "x"]), literals()), max_size=2)),
    ]
    if draw(st.integers(0, 6)) == 0:
        pairs = draw(st.permutations(pairs))
    written = object_text(pairs) if draw(st.integers(0, 15)) else draw(literals())
    return encoded(draw(st.sampled_from([""] * 9 + [" ", "\ufeff", "\t", "\xa0"])) + written)


@st.composite
def _lines(draw: st.DrawFn) -> bytes:
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"\n \n", b"\xe2\x80\xa8", b"\n\xc2\xa0\n"]))
    return draw(damaged(end.join(draw(st.lists(_row(), max_size=5)))))


@st.composite
def _compressed(draw: st.DrawFn, content: bytes, suffix: str) -> bytes:
    if not suffix:
        return content
    compress = gzip.compress if suffix == ".gz" else files.zstd.compress
    at = draw(st.integers(0, len(content)))
    parts = [content[:at], content[at:]] if draw(st.booleans()) else [content]
    whole = b"".join(map(compress, parts))
    return draw(damaged(whole)) if draw(st.integers(0, 3)) == 0 else whole


def _decompressed(path: Path) -> bytes:
    opened: Any = {".gz": gzip.open, ".zst": files.zstd.open}.get(path.suffix, open)(path, "rb")
    with opened as stream:
        content: bytes = stream.read()
    return content


def _by_line(path: Path) -> list[str | None]:
    lines = _decompressed(path).decode("utf-8-sig").split("\n")
    return [_document(json.loads(line)) for line in lines if line.strip(" \t\r\n")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@examples(100)
@given(st.data(), st.sampled_from(["", "", ".gz", ".zst"]))
def test_json_lines(place: Path, data: st.DataObject, suffix: str) -> None:
    path = place / f"a.jsonl{suffix}"
    path.write_bytes(data.draw(_compressed(data.draw(_lines()), suffix)))
    _check(path, lambda: _by_line(path))


@st.composite
def _array(draw: st.DrawFn) -> bytes:
    space = st.sampled_from([b"", b"", b" ", b"\n", b"\r\n\t", b"\xc2\xa0", b"\x0b"])
    comma = draw(space) + draw(st.sampled_from([b","] * 9 + [b"", b",,", b";"])) + draw(space)
    first, last = draw(st.sampled_from([(b"[", b"]")] * 9 + [(b"[", b""), (b"[", b",]"), (b"", b""), (b"{", b"}")]))
    rows = comma.join(draw(st.lists(_row(), max_size=4)))
    return draw(damaged(draw(space) + first + draw(space) + rows + draw(space) + last + draw(space)))


def _elements(path: Path) -> list[str | None]:
    text = _decompressed(path).decode("utf-8-sig")
    if not text.lstrip(" \t\r\n").startswith("["):
        return _by_line(path)
    return [_document(row) for row in json.loads(text)]


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of what has been read falls into every kind of token."""
    monkeypatch.setattr(files, "CHUNK", 7)
    monkeypatch.setattr(json_array, "CHUNK", 5)


@examples(80)
@given(content=_array())
@pytest.mark.usefixtures("_small_chunks")
def test_json_arrays(place: Path, content: bytes) -> None:
    path = place / "a.json"
    path.write_bytes(content)
    _check(path, lambda: _elements(path))


# ------------------------------------------------------------------------------------ Parquet and Arrow

COLUMN_TYPES = {
    "string": st.text(max_size=5), "large_string": st.text(max_size=5), "binary": st.binary(max_size=5),
    "int64": st.integers(-(2**63), 2**63 - 1), "double": st.floats(allow_subnormal=False), "bool": st.booleans(),
    "date32": st.integers(-(2**31), 2**31 - 1),
    "timestamp[ns]": st.integers(-(2**63), 2**63 - 1), "timestamp[us]": st.integers(-(2**63), 2**63 - 1),
    "null": st.none(),
}  # fmt: skip


@st.composite
def _column(draw: st.DrawFn, rows: int) -> pyarrow.Array:
    kind = draw(st.sampled_from(["string"] * 4 + [*COLUMN_TYPES]))
    content = draw(st.lists(st.none() | COLUMN_TYPES[kind], min_size=rows, max_size=rows))
    storage = {"date32": "int32", "timestamp[ns]": "int64", "timestamp[us]": "int64"}.get(kind, kind)
    array = pyarrow.array(content, pyarrow.type_for_alias(storage))
    if storage != kind:
        array = array.view(pyarrow.type_for_alias(kind))
    match draw(st.sampled_from(["plain"] * 3 + ["dictionary", "list", "struct"])):
        case "dictionary" if kind in ("string", "int64"):
            return array.dictionary_encode()
        case "list":
            return pyarrow.FixedSizeListArray.from_arrays(array, 1)
        case "struct":
            return pyarrow.StructArray.from_arrays([array], ["text"])
    return array


@st.composite
def _table(draw: st.DrawFn) -> pyarrow.Table:
    names = draw(st.lists(st.sampled_from(["text", "text", "id", "a.text", "text.a", "", "é"]), min_size=1, max_size=3))
    rows = draw(st.integers(1, 6))
    return pyarrow.table([draw(_column(rows)) for _ in names], names=names)


def _write(table: pyarrow.Table, path: Path, kind: str, rows: int) -> None:
    match kind:
        case "parquet":
            parquet.write_table(table, path, row_group_size=rows)
        case "stream":
            with ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table, max_chunksize=rows)
        case "file":
            feather.write_feather(table, path, chunksize=rows)


def _rows(path: Path) -> list[str | None]:
    if path.suffix == ".parquet":
        table = parquet.ParquetFile(path, page_checksum_verification=True).read()
    elif path.read_bytes().startswith(files.ARROW_MAGIC):
        table = ipc.open_file(path.read_bytes()).read_all()
    else:
        table = ipc.open_stream(path.read_bytes()).read_all()
    needed = [name for name in table.column_names if name == "text"] or table.column_names
    if len(set(needed)) < len(needed):
        raise ValueError("names repeat")
    return [_document(row) for row in table.select(needed).to_pylist()]


@examples(50)
@given(st.data(), st.sampled_from(["parquet", "stream", "file"]), _table(), st.integers(1, 4))
def test_parquet_and_arrow(place: Path, data: st.DataObject, kind: str, table: pyarrow.Table, rows: int) -> None:
    path = place / ("a.parquet" if kind == "parquet" else "a.arrow")
    path.unlink(missing_ok=True)
    try:
        _write(table, path, kind, rows)
    except (pyarrow.ArrowException, ValueError):
        event("cannot be written")
        return
    _check(path, lambda: _rows(path))


# ------------------------------------------------------------------------------------------ conversations

MESSAGE_NAMES = ("role", "from", "content", "value", "name", "tool_calls", "tool_call_id")
ROLES = (*CHAT_ROLES, "human", "gpt", "tool", "Assistant", "")
sound_messages = st.fixed_dictionaries({"role": st.sampled_from(CHAT_ROLES), "content": texts})
arguments = (
    values
    | st.builds(json.dumps, values)
    | literals()
    | st.sampled_from([300, 900, 980]).map(lambda depth: "[" * depth + "]" * depth)
)
calls = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts},
    optional={"arguments": arguments})}), min_size=1, max_size=2)  # fmt: skip
odd_messages = st.dictionaries(
    st.sampled_from(MESSAGE_NAMES), st.sampled_from(ROLES) | values | calls, max_size=4
) | st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES)},
    optional={
        "content": texts | values | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts | values})),
        "tool_calls": calls | values,
        "name": values,
    },
)
messages = st.lists(sound_messages | sound_messages | odd_messages, max_size=4)
conversations = st.fixed_dictionaries({}, optional={
    "messages": messages | values, "conversations": messages | values, "system": values, "instruction": texts | values,
    "input": texts | values, "output": texts | values, "prompt": texts | messages | values,
    "completion": texts | messages | values,
})  # fmt: skip


def _strings(value: Any) -> str:
    """All texts within a value, in order."""
    if isinstance(value, str):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return "\0".join(map(_strings, inner))


@examples(80)
@given(st.lists(st.builds(lambda text: {"prompt": text, "completion": "sound"}, texts) | conversations, max_size=4))
def test_conversations(place: Path, tiny_llama_dir: Path, rows: list[dict[str, Any]]) -> None:
    """Every conversation is kept or counted, and what is kept was written."""
    path = place / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = outcome(lambda: _read(path, "instructions"))
    if isinstance(read, UserError):
        return
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(read) == len(rows)
    for example, row in zip(read, written, strict=True):
        for message in example.content if isinstance(example.content, list) else ():
            assert all(line in _strings(row) for line in message["content"].split("\n\n")) or message[
                "content"
            ] in _strings(row).replace("\0", "")
    kept, dropped = outcome(lambda: _prepare(read, tiny_llama_dir))
    assert len(kept) + dropped.total() == len(rows)


TOKENIZERS: dict[Path, TextTokenizer] = {}


def _prepare(read: list[Example], model: Path) -> tuple[list[Example], Drops]:
    """What building a dataset does with examples, without its processes."""
    dropped, kept = Drops(), []
    tokenizer = TOKENIZERS.get(model) or TOKENIZERS.setdefault(model, TextTokenizer(model))
    renderer = chat_worker.Renderer(PLAIN_TEMPLATE, tokenizer.special_tokens)
    chat, deduplicator = ChatTokenizer(tokenizer, renderer, 10_000, dropped), Deduplicator(0.2)
    for example in read:
        if deduplicator.assign(example, dropped) is not None:
            json.dumps(example.content, ensure_ascii=False).encode()  # as in held_out.jsonl
            json.loads(json.dumps(example.content))  # as sent to the process of the template
            kept += [example] if chat.tokenize(example) else []
    event("kept" if kept else "nothing kept")
    return kept, dropped
