"""Sources: what is read from files, the Hub and python_docs, and how malformed input is refused."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import huggingface_hub.constants  # noqa: F401 (reads HF_HUB_OFFLINE when first imported: before a test sets it)
import pytest

from pipeline.artifacts.fingerprints import Fingerprints
from pipeline.config import Source
from pipeline.data import files, json_array, python_docs
from pipeline.data.sources import (
    SOURCE_READERS,
    ExampleStream,
    Purpose,
    check_sources,
    fingerprint_sources,
    pin_sources,
)
from pipeline.errors import UserError
from tests.fake_hub import serve


def _source(path: object, **changes: Any) -> Source:
    values = {"kind": "files", "path": path and str(path), "config_name": None, "split": None, "revision": None}
    return Source(**{**values, "text_field": "text", "weight": 1.0, **changes})


LIMIT = 2**20  # data.max_record_bytes


def _stream(source: Source, purpose: Purpose, position: Any = None) -> ExampleStream:
    return ExampleStream(source, purpose, f"data.{purpose}", LIMIT, position)


def _texts(source: Source) -> list[Any]:
    return [example.content for example in _stream(source, "corpus")]


def _refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def _rows(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_every_kind_in_the_settings_has_a_reader() -> None:
    assert set(get_args(Source.model_fields["kind"].annotation)) == set(SOURCE_READERS)


# ----------------------------------------------------------------------------------------- reading


def _plain(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _gzip(path: Path, data: bytes) -> Path:
    return _plain(path.with_name(path.name + ".gz"), gzip.compress(data))


def _zstandard(path: Path, data: bytes) -> Path:
    frames = (files.zstd.compress(part) for part in (data[:30], data[30:]))
    return _plain(path.with_name(path.name + ".zst"), b"".join(frames))


@pytest.mark.parametrize("write", [_plain, _gzip, _zstandard])
def test_json_lines_and_text_are_read_compressed_or_not(write: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in ("größer", "two\nlines", "  ", "last"))
    assert _texts(_source(write(tmp_path / "a.jsonl", rows.encode()))) == ["größer", "two\nlines", "  ", "last"]
    text = "Ein Text – mit Umlaut: ö\nzweite Zeile\n" * 3
    assert _texts(_source(write(tmp_path / "b.txt", text.encode()))) == [text]


def test_a_long_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {number}\n{'word ' * 400}\n\n" for number in range(100))
    found = _texts(_source(_plain(tmp_path / "long.txt", text.encode())))
    assert "".join(found) == text
    assert len(found) > 1 and max(map(len, found)) < files.CHUNK_CHARACTERS + 3000
    assert all(document.lstrip().startswith("Paragraph") for document in found)


@pytest.mark.parametrize(
    "line", ["a sentence – so lang\n", "ä" * 3 * files.MAX_CHUNK_CHARACTERS], ids=["sentences", "endless"]
)
def test_a_long_text_file_without_blank_lines_is_split_too(line: str, tmp_path: Path) -> None:
    """One sentence per line, and a single long line whose pieces end within characters."""
    text = "x" + line * (3 * files.MAX_CHUNK_CHARACTERS // len(line) or 1)
    found = _texts(_source(_plain(tmp_path / "long.txt", text.encode())))
    assert "".join(found) == text
    assert len(found) >= 3 and max(map(len, found)) < files.MAX_CHUNK_CHARACTERS + files.CHUNK_CHARACTERS


def test_parquet_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"row {number}" for number in range(3000)]
    parquet.write_table(pyarrow.table({"text": texts, "id": range(3000)}), tmp_path / "a.parquet")
    assert _texts(_source(tmp_path)) == texts


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_with_the_same_name_are_refused(name: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import feather, parquet

    table = pyarrow.table([["a"], ["b"], ["c"]], names=["text", "id", "text"])
    (parquet.write_table if name == "a.parquet" else feather.write_feather)(table, tmp_path / name)
    assert "several columns with the name text" in _refusal(lambda: _texts(_source(tmp_path / name)))
    assert _texts(_source(tmp_path / name, text_field="id")) == ["b"]


def test_arrow_is_read_in_the_stream_and_the_file_format(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    from pyarrow import feather

    texts = [f"row {number}" for number in range(3000)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    assert _texts(_source(tmp_path / "saved")) == texts
    feather.write_feather(pyarrow.table({"text": texts}), str(tmp_path / "file.arrow"), chunksize=700)
    assert _texts(_source(tmp_path / "file.arrow")) == texts


def test_files_of_a_directory_or_glob_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "notes.md").write_text("not of a supported format")
    assert _texts(_source(tmp_path)) == ["a.txt", "b.txt", "deep/c.txt"]
    assert _texts(_source(tmp_path / "?.txt")) == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n\n1 2"), ("assistant", "3")]),
        ({"instruction": "Hi.", "input": "", "output": "Ho."}, [("user", "Hi."), ("assistant", "Ho.")]),
        ({"prompt": "Hi.", "completion": "Ho."}, [("user", "Hi."), ("assistant", "Ho.")]),
        (
            {"messages": [{"role": "system", "content": "S", "x": 1}, {"role": "user", "content": "U"}], "id": 3},
            [("system", "S"), ("user", "U")],
        ),
        (
            {"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}], "system": "S"},
            [("system", "S"), ("user", "U"), ("assistant", "A")],
        ),
        (
            {"instruction": "U2", "output": "A2", "history": [["U1", "A1"]], "system": "S"},
            [("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2")],
        ),
        ({"messages": [{"role": "user", "content": "U"}], "system": "S"}, [("system", "S"), ("user", "U")]),
        ({"messages": [{"role": "system", "content": "S"}], "system": "S"}, [("system", "S")]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            [("user", "ab")],
        ),
        (
            {"prompt": [{"role": "user", "content": "U"}], "completion": [{"role": "assistant", "content": "A"}]},
            [("user", "U"), ("assistant", "A")],
        ),
        (
            {"messages": [{"role": "developer", "content": "D"}, {"role": "tool", "content": "T"}]},
            [("developer", "D"), ("tool", "T")],
        ),
        ({"messages": None, "prompt": "U", "completion": "A"}, [("user", "U"), ("assistant", "A")]),
        ({"instruction": "U", "input": None, "output": "A"}, [("user", "U"), ("assistant", "A")]),
    ],
    ids=["alpaca", "alpaca without input", "completion", "messages", *map(str, range(9))],
)
def test_conversation_formats_are_recognized(row: object, messages: list[tuple[str, str]], tmp_path: Path) -> None:
    source = _source(_rows(tmp_path / "chats.jsonl", row), text_field=None)
    expected = [{"role": role, "content": content} for role, content in messages]
    assert [example.content for example in _stream(source, "instructions")] == [expected]


def test_tool_calls_are_kept_as_templates_expect_them(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
    ]
    source = _source(_rows(tmp_path / "chats.jsonl", {"messages": messages}), text_field=None)
    (example,) = _stream(source, "instructions")
    called = {**call, "function": {"name": "add", "arguments": {"a": 1}}}
    assert example.content == [{"role": "assistant", "content": "", "tool_calls": [called]}, messages[1]]


def test_reasoning_and_declared_tools_are_kept(tmp_path: Path) -> None:
    question, add = {"role": "user", "content": "1 + 1?"}, {"name": "add", "parameters": {}}
    answer = {"role": "assistant", "content": "2", "reasoning_content": "Add."}
    filled = {**add, "function": None, "strict": None}  # by Arrow
    declared: tuple[object, ...] = ([add], [{"type": "function", "function": add}], json.dumps([add]), [filled])
    rows = [{"messages": [question, answer], "tools": tools} for tools in (*declared, None, "", [])]
    found = [example.content for example in _stream(_source(_rows(tmp_path / "a.jsonl", *rows)), "instructions")]
    declaring = {**question, "tools": [{"type": "function", "function": add}]}
    assert found == [[declaring, answer]] * 4 + [[question, answer]] * 3


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow", "hub"])
def test_tool_calls_have_only_the_arguments_that_they_were_written_with(suffix: str, tmp_path: Path) -> None:
    """Arrow, and datasets that are streamed from the Hub, have the arguments of all calls in every one, most null."""
    import pyarrow
    from pyarrow import feather, parquet

    called: list[dict[str, Any]] = [{"a": 1, "b": 2}, {"city": "Rome"}]
    calls = [[{"function": {"name": "f", "arguments": one}}] for one in called]
    rows = [{"messages": [{"role": "assistant", "content": "x", "tool_calls": each}]} for each in calls]
    path = tmp_path / f"chats{suffix}"
    match suffix:
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".arrow":
            feather.write_feather(pyarrow.Table.from_pylist(rows), path)
        case "hub":
            _rows(tmp_path / "a.jsonl", *rows)
        case _:
            _rows(path, *rows)
    hub: dict[str, Any] = {"kind": "hub", "split": "train"} if suffix == "hub" else {}
    found = _stream(_source(tmp_path if hub else path, text_field=None, **hub), "instructions")
    messages: list[Any] = [message for example in found for message in example.content]
    assert [message["tool_calls"][0]["function"]["arguments"] for message in messages] == called


def test_only_what_was_meant_is_read_of_a_directory(tmp_path: Path) -> None:
    """No hidden files, no copies by macOS, no descriptions in JSON; every linked directory once."""
    for name in ("in/a.txt", "in/._a.txt", "in/.cache/b.txt", "in/__MACOSX/c.txt", "in/info.json", "elsewhere/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(Path(name).name)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "link2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "in")
    for path in ("in", "i*", "in/**", "**/*.txt", "in/**/*.txt"):
        assert sorted(_texts(_source(tmp_path / path))) == ["a.txt", "d.txt"], path
    assert _texts(_source(tmp_path / "in" / ".cache")) == ["b.txt"]  # named by the user


def test_a_saved_dataset_is_read_without_its_caches_and_one_split_of_several(tmp_path: Path) -> None:
    import datasets

    parts = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    shutil.copy(tmp_path / "test" / "data-00000-of-00001.arrow", tmp_path / "train" / "cache-1.arrow")
    assert "splits train, test" in _refusal(lambda: _texts(_source(tmp_path)))
    assert "no split dev" in _refusal(lambda: _texts(_source(tmp_path, split="dev")))
    assert _texts(_source(tmp_path, split="test")) == ["test"]
    assert _texts(_source(tmp_path / "train")) == ["train"]
    message = _refusal(lambda: _texts(_source(tmp_path / "train", split="train")))
    assert message.startswith("data.corpus.split = train") and "Set data.corpus.split=null" in message
    (tmp_path / "test" / "state.json").write_text('{"_data_files": [{"filename": "../secret.txt"}]}')
    assert "../secret.txt" in _refusal(lambda: _texts(_source(tmp_path / "test")))


@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_what_is_not_a_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "gone")
    for source in (path, tmp_path):
        assert kind in _refusal(lambda source=source: _texts(_source(source)))


@pytest.mark.parametrize(
    "content",
    ['[{"text": "a"}, {"text": "b"}]', '\n [\n{"text":\n"a"}\n,{"text": "b"}\n]\n', '{"text": "a"}\n{"text": "b"}\n'],
)
def test_json_files_hold_an_array_or_lines(content: str, tmp_path: Path) -> None:
    assert _texts(_source(_plain(tmp_path / "a.json", content.encode()))) == ["a", "b"]


def test_a_json_array_is_read_in_pieces_of_any_size() -> None:
    rows = [{"text": "größer \\ud83d\\ude00" * number, "n": [number, None, 1.5e3]} for number in range(20)]
    text = json.dumps(rows, indent=1)
    for size in (1, 7, 4096):
        pieces = iter([text[1:][at : at + size] for at in range(0, len(text), size)])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(json_array, "CHUNK", size)
            assert list(json_array.JsonArray("", pieces, LIMIT)) == rows


def test_only_the_needed_columns_are_decoded(tmp_path: Path) -> None:
    """The others have a date, a time zone and bytes that Python cannot represent."""
    import pyarrow
    from pyarrow import feather, parquet

    far = pyarrow.array([2**62], pyarrow.timestamp("us"))
    latin = pyarrow.array([b"\xe9"], pyarrow.binary()).view(pyarrow.string())
    odd = {"far": far, "mars": far.cast(pyarrow.timestamp("us", "Mars/Olympus")), "latin": latin}
    table = pyarrow.table({"text": ["a"], **odd})
    parquet.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, str(tmp_path / "a.arrow"))
    for name in ("a.parquet", "a.arrow"):
        assert _texts(_source(tmp_path / name)) == ["a"]
        for column in odd:
            assert f"{name}, row 1" in _refusal(
                lambda name=name, column=column: _texts(_source(tmp_path / name, text_field=column))
            )


def test_odd_records_are_counted_and_named_unless_all_are_odd(tmp_path: Path) -> None:
    rows = [
        *({"instruction": value, "output": "x"} for value in (3, None, ["a"], {"a": 1}, float("nan"), True)),
        {"instruction": "x", "input": 3, "output": "x"}, {"instruction": "x", "output": 3},
        {"messages": [{"role": "robot", "content": "x"}]}, {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, {"other": "x"},
    ]  # fmt: skip
    path = _rows(tmp_path / "chats.jsonl", *rows, {"prompt": "fine", "completion": "x"})
    examples = list(_stream(_source(path, text_field=None), "instructions"))
    assert [example.fault for example in examples] == [
        "not_text", None, *["not_text"] * 6, "unknown_role", "not_text", "not_text", "unknown_format", None,
    ]  # fmt: skip
    assert examples[1].is_blank  # the null
    assert examples[3].location == f"{path}, line 4"
    bad = _rows(tmp_path / "bad.jsonl", *[{"text": 3}] * 99, {"text": "fine"})
    assert [example.fault for example in _stream(_source(bad), "corpus")] == ["not_text"] * 99 + [None]
    all_bad = _rows(tmp_path / "bad.jsonl", *[{"text": 3}] * 100, {"text": "fine"})
    assert "line 1" in _refusal(lambda: _texts(_source(all_bad)))


# ----------------------------------------------------------------------------------- malformed input


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"good line\nbad \xff\xfe line\n", ["line 2", "UTF-8"]),
        ("a.txt", b"one\n\0\0binary\n", ["line 2", "NUL"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', ["line 2", "not JSON"]),
        ("a.jsonl", b"[1, 2]\n", ["line 1", "not a JSON object"]),
        ("a.jsonl", b'{"body": "x", "title": "y"}\n', ["text_field = text", "body, title"]),
        ("a.jsonl", b'{"text": 3}\n', ["text_field", "int"]),
        ("a.txt.gz", b"not gzip", ["complete .gz file"]),
        ("a.txt.gz", gzip.compress(b"text " * 10000, mtime=0)[:40], ["complete .gz file"]),
        ("a.jsonl.zst", b"not zstd", ["complete .zst file"]),
        ("a.txt.zst", files.zstd.compress(b"text " * 10000)[:-5], ["complete .zst file"]),
        ("a.txt", "größer".encode()[:-3], ["line 1", "UTF-8"]),
        ("a.parquet", b"not parquet", ["Parquet"]),
        ("a.arrow", b"not arrow, but long enough to look at", ["Arrow"]),
        ("a.arrow", bytes(1000), ["Arrow"]),
        ("a.jsonl", b'{"text": "x"}\n{"n": ' + b"9" * 5000 + b"}\n", ["line 2", "digits"]),
        ("a.jsonl", b'{"n": ' + b"[" * 99999 + b"]" * 99999 + b"}\n", ["line 1", "nested"]),
        ("a.json", b'[{"text": "x"}, {"text": "y"', ["element 2"]),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', ["element 1", "comma"]),
        ("a.json", b'[{"text": "x"}, 3]', ["element 2", "not a JSON object"]),
        ("a.json", b'[{"text": "x"}] x', ["follows the end"]),
        ("a.json", b'{\n"data": []}', ["neither an array"]),
        ("a.json", "\xa0[]".encode(), ["neither an array"]),  # white space, but not in JSON
        ("a.jsonl", '{"text": "x"}\n\xa0\n'.encode(), ["line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "' + b"x" * LIMIT + b'"}\n', ["line 1", "data.max_record_bytes"]),
        ("a.json", b'[{"text": "' + b"x" * LIMIT + b'"}]\n', ["element 1", "data.max_record_bytes"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "' + b"x" * 9 * LIMIT), ["line 1", "data.max_record_bytes"]),
        ("a.txt.zst", b"(\xb5/\xfd\0\xa0\1\0\0", ["data.max_record_bytes", "zstd --long"]),  # a window of 2 GiB
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_file_is_reported_with_line_and_reason(
    name: str, content: bytes, words: list[str], tmp_path: Path
) -> None:
    source = _source(_plain(tmp_path / name, content))
    message = _refusal(lambda: _texts(source))
    assert message.startswith("data.corpus.") and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "x", "answer": "y"}, ["question, answer", "known conversation format"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, ["'robot'", "user"]),
        ({"messages": [{"role": "user", "content": 3}]}, ["must be text"]),
        ({"messages": [{"role": "assistant", "content": "x", "thinking": ["y"]}]}, ["thinking", "must be text"]),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "search"}, ["tools must be a list"]),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "x"}]}, ["function with a name"]),
        ({"messages": [{"role": "user", "text": "x"}]}, ["must be text"]),
        ({"messages": "hello"}, ["list of objects"]),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 200 + "]" * 200}]}]},
            ["more than 64 levels"],
        ),
    ],
)
def test_a_malformed_conversation_is_refused(row: object, words: list[str], tmp_path: Path) -> None:
    source = _source(_rows(tmp_path / "chats.jsonl", row), text_field=None)
    message = _refusal(lambda: list(_stream(source, "instructions")))
    assert message.startswith("data.instructions.path") and all(word in message for word in words), message


@pytest.mark.parametrize("purpose", ["corpus", "instructions"])
@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_source_is_refused_before_anything_starts(purpose: Purpose, content: bytes, tmp_path: Path) -> None:
    message = _refusal(lambda: check_sources([_source(_plain(tmp_path / "a.jsonl", content))], purpose, LIMIT))
    assert message.startswith(f"data.{purpose}.path") and "empty" in message


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    assert "no such file" in _refusal(lambda: check_sources([_source(tmp_path / "nothing.txt")], "corpus", LIMIT))
    assert "no file of a supported format" in _refusal(lambda: check_sources([_source(tmp_path)], "corpus", LIMIT))


def test_the_check_reads_only_the_first_record(tmp_path: Path) -> None:
    check_sources([_source(_plain(tmp_path / "a.jsonl", b'{"text": "fine"}\nbroken\n'))], "corpus", LIMIT)


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_an_unreachable_hub_is_refused_at_once(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    message = _refusal(lambda: check_sources([_source("org/data", kind="hub", split="train")], "corpus", LIMIT))
    assert time.monotonic() - started < 10.0
    assert message.startswith("data.corpus.path = org/data") and "kind: files" in message


def test_a_gated_dataset_is_refused_with_where_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path, tmp_path / "cache", monkeypatch) as hub:
        hub.datasets, hub.gated = {"org/data": ["train.parquet"]}, {"org/data"}
        message = _refusal(lambda: check_sources([_source("org/data", kind="hub", split="train")], "corpus", LIMIT))
    assert "requested from its authors" in message and "https://huggingface.co/datasets/org/data" in message


def test_a_hub_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.hub.TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(30))
    message = _refusal(lambda: check_sources([_source("org/data", kind="hub", split="train")], "corpus", LIMIT))
    assert "cannot be reached" in message


def test_a_hub_dataset_is_streamed_row_by_row(tmp_path: Path) -> None:
    """A local directory replaces the repository, so that the test needs no network."""
    _rows(tmp_path / "train.jsonl", *({"text": f"row {number}"} for number in range(3)))
    assert _texts(_source(tmp_path, kind="hub", split="train")) == [f"row {number}" for number in range(3)]
    wrong_column = _source(tmp_path, kind="hub", split="train", text_field="body")
    assert "row 1" in _refusal(lambda: _texts(wrong_column))
    missing = _source(tmp_path, kind="hub", split="nowhere")
    assert "nowhere" in _refusal(lambda: _texts(missing))


def test_a_local_directory_is_not_read_in_place_of_a_hub_dataset_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/data").mkdir(parents=True)
    _rows(Path("org/data/a.jsonl"), {"text": "local"})
    pinned = _source("org/data", kind="hub", split="train", revision="0" * 40)
    for read in (lambda: _texts(pinned), lambda: check_sources([pinned], "corpus", LIMIT)):
        message = _refusal(read)
        assert message.startswith("data.corpus.path = org/data") and str(tmp_path / "org" / "data") in message


def test_only_the_needed_part_of_a_hub_dataset_is_read(tmp_path: Path) -> None:
    """All files after the first two are malformed."""
    for number in range(2):
        _rows(tmp_path / f"part-{number:02}.jsonl", *({"text": f"{number} {row}"} for row in range(50)))
    for number in range(2, 40):
        _plain(tmp_path / f"part-{number:02}.jsonl", b"{broken")
    source = _source(tmp_path, kind="hub", split="train")
    assert len(list(islice(_stream(source, "corpus"), 80))) == 80
    message = _refusal(lambda: _texts(source))
    assert message.startswith("data.corpus.path") and "after row 100" in message and "JSON parse error" in message


def test_a_row_without_text_is_blank_and_does_not_end_the_stream(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "a.jsonl", {"text": "first"}, {"text": None}, {"text": "last"})
    assert [example.is_blank for example in _stream(_source(rows), "corpus")] == [False, True, False]
    called = {"messages": [{"role": "user", "content": "Call it."}, {"role": "assistant", "content": None}]}
    (chat,) = _stream(_source(_rows(tmp_path / "b.jsonl", called), text_field=None), "instructions")
    assert chat.is_blank


# ----------------------------------------------------------------------------------------- resuming


def _several_files(directory: Path) -> Source:
    for number in range(3):
        _rows(directory / f"{number}.jsonl", *({"text": f"{number} {row}"} for row in range(7)))
    _gzip(directory / "text.txt", b"compressed")
    return _source(directory)


def _hub_dataset(directory: Path) -> Source:
    return _several_files(directory).model_copy(update={"kind": "hub", "split": "train", "path": f"{directory}"})


def _python_docs(directory: Path) -> Source:
    return _source(None, kind="python_docs")


@pytest.mark.parametrize("make", [_several_files, _hub_dataset, _python_docs])
def test_a_stream_resumes_at_the_position_of_another_one(make: Callable[[Path], Source], tmp_path: Path) -> None:
    source = make(tmp_path)
    complete = _texts(source)
    for taken in (0, 1, 6, 7, 8, 20, len(complete)):
        stream = _stream(source, "corpus")
        examples = iter(stream)
        first = [example.content for example in islice(examples, taken)]
        position = json.loads(json.dumps(stream.position()))
        rest = [example.content for example in _stream(source, "corpus", position)]
        assert first + rest == complete, taken


# -------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_depends_on_content_only(tmp_path: Path) -> None:
    memo = Fingerprints(tmp_path / "memo" / "known.json")

    def of(*found: Source) -> str:
        return fingerprint_sources(found, "corpus", memo)

    path = _plain(tmp_path / "a.txt", b"one")
    before = of(_source(path))
    moved = _plain(tmp_path / "elsewhere.txt", b"one").replace(tmp_path / "memo" / "a.txt")
    assert of(_source(moved)) == before
    path.write_bytes(b"other")
    assert of(_source(path)) != before
    commit = "0123456789" * 4
    pinned = _source("org/data", kind="hub", split="train", revision=commit)
    assert pin_sources([pinned], "corpus") == [pinned]  # without a network
    assert of(pinned) == f"hub org/data {commit}"
    docs = _source(None, kind="python_docs")
    assert of(docs) == python_docs.interpreter_fingerprint()
    assert len({of(docs, pinned), of(pinned, docs), of(docs), of(pinned)}) == 4


def test_an_error_in_one_of_several_sources_names_it(tmp_path: Path) -> None:
    good = _source(_plain(tmp_path / "a.txt", b"good"))
    for bad in (_source(tmp_path / "nowhere"), _source(_plain(tmp_path / "b.txt", b" "))):
        assert _refusal(lambda bad=bad: check_sources([good, bad], "corpus", LIMIT)).startswith("data.corpus.1.path")
    check_sources([good, good], "corpus", LIMIT)


@pytest.mark.parametrize("damage", ["cut", "zeros", "zero block", "cut at a batch", "zero text"])
def test_damaged_arrow_streams_are_refused(damage: str, tmp_path: Path) -> None:
    """Arrow itself takes the end of the file, and zeros, for the end of the stream."""
    import pyarrow

    batches = pyarrow.table({"text": [f"row {number}" for number in range(3000)]}).to_batches(max_chunksize=1000)
    sink = pyarrow.BufferOutputStream()
    ends = []
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            ends.append(sink.tell())
    data = bytearray(sink.getvalue().to_pybytes())
    if damage == "cut":
        del data[-500:]
    elif damage == "cut at a batch":
        del data[ends[1] :]
    elif damage == "zeros":
        data[ends[1] :] = bytes(len(data) - ends[1])
    elif damage == "zero text":
        at = data.index(b"row 1500")
        data[at : at + 100] = bytes(100)
    else:
        data[ends[0] + 2000 : ends[0] + 3000] = bytes(1000)
    message = _refusal(lambda: _texts(_source(_plain(tmp_path / "a.arrow", bytes(data)))))
    assert "a.arrow" in message and ("damaged" in message or "block of zeros" in message)
    assert "row" in message or "byte" in message


def test_a_large_row_of_parquet_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["x" * 2 * LIMIT]}), tmp_path / "a.parquet", compression="zstd")
    assert "data.max_record_bytes" in _refusal(lambda: _texts(_source(tmp_path / "a.parquet")))
