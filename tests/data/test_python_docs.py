"""The embedded corpus: deterministic, public, and split so that nothing leaks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data import instruction_pairs, python_docs, stdlib_harvest
from pipeline.data.python_docs import Entry, Text, askable, documents, entries, part_of, topics, words
from tests.processes import seconds_of_children


def _of(part: str) -> list[Entry]:
    return [entry for entry in entries() if entry.part == part]


def _harvested(**environment: str) -> bytes:
    command = [sys.executable, "-I", "-S", "-B", str(Path(stdlib_harvest.__file__))]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment, cwd="/").stdout


def test_the_harvest_is_the_same_in_any_environment() -> None:
    """No locale, home, secret or hash seed gets in; ``cgi.parse`` has the environment as a default argument."""
    plain = _harvested(PATH=os.environ["PATH"])
    other = _harvested(PATH="/bin", LC_ALL="C", HOME="/nowhere", COLUMNS="20", API_KEY="secret-key", PYTHONHASHSEED="7")
    assert plain == other
    assert b"secret-key" not in other
    assert not re.search(rb" at 0x", plain)


def test_everything_of_it_is_made_within_seconds() -> None:
    program = "from pipeline.data import instruction_pairs as i, python_docs as p; p.documents(False); i.pairs(False)"
    before = seconds_of_children()
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    assert seconds_of_children() - before < 20.0  # about 3


def test_well_known_things_are_there_with_signature_and_docstring() -> None:
    text = "\n".join(documents(held_out=False) + documents(held_out=True))
    assert re.search(r"^json\.dumps\(obj, \*, skipkeys=False.*\n    Serialize ``obj``", text, re.MULTILINE)
    assert "math.sqrt(x, /)\n    Return the square root of x." in text  # a C function
    assert "class collections.OrderedDict" in text
    assert "os.path.join" in text and "posixpath.join" not in text


def test_nothing_private_and_no_side_effects() -> None:
    assert not [entry.name for entry in entries() if re.search(r"(^|\.)_(?!_init__)", entry.name)]
    assert not {"this", "antigravity", "idlelib", "tkinter"} & {entry.module for entry in entries()}


def test_documents_are_unique_and_in_a_fixed_order() -> None:
    texts = documents(held_out=False) + documents(held_out=True)
    assert len(set(texts)) == len(texts)
    plain = [" ".join(words(entry.doc)) for entry in entries()]
    assert len(set(plain)) == len(plain)


def test_every_part_has_enough() -> None:
    sizes = {part: sum(len(entry.doc) for entry in _of(part)) for part in python_docs.PARTS}
    assert sizes["taught"] > sizes["asked"] > sizes["held_out"] > 80_000


def test_the_split_is_by_family_of_modules() -> None:
    assert part_of("json") == part_of("json.decoder") == part_of("_json")
    assert part_of("os") == part_of("os.path") == part_of("posix")
    assert part_of("math") == part_of("cmath")  # their docstrings are nearly the same


# The doors by which held-out text could get into training, and asked text into the instruction pairs.


def test_no_door_leads_from_the_held_out_modules_into_the_corpus() -> None:
    """Neither a re-export, nor a quotation in a topic, nor the same docstring elsewhere."""
    corpus = documents(held_out=False)
    seen = Text(corpus)
    assert not [entry.name for entry in _of("held_out") if seen.shares(entry.doc)]
    lines = {line.strip() for text in corpus for line in text.splitlines()}
    assert not [entry.name for entry in _of("held_out") if entry.name + (entry.signature or "") in lines]


def test_no_topic_names_a_held_out_module() -> None:
    held_out = {entry.module.partition(".")[0] for entry in _of("held_out")}
    for text in topics().values():
        assert not [name for name in held_out if re.search(rf'"{name}\.\w|\bimport {name}\b', text)]


def test_no_door_leads_from_held_out_or_asked_modules_into_the_instruction_pairs() -> None:
    spoken = [message["content"] for pair in instruction_pairs.pairs(held_out=False) for message in pair]
    names = set(re.findall(r"[\w.]+", "\n".join(spoken)))
    known = Text(spoken)
    for entry in _of("held_out"):
        assert entry.kind == "module" or entry.name not in names, entry.name
    for entry in askable():
        assert entry.kind == "module" or entry.name not in names, entry.name
        assert len(words(entry.summary)) < 5 or not known.shares(entry.summary), entry.name


def test_a_reexported_function_belongs_to_the_module_that_defines_it() -> None:
    names = {entry.name for entry in entries()}
    assert "collections.namedtuple" in names
    assert not {name for name in names if name.endswith(".namedtuple")} - {"collections.namedtuple"}


# ---------------------------------------------------------------------------------- details


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        ("Return x. Then more.", "Return x."),
        ("get(key) -> value\n\nLook a key\nup.\n\nMore.", "Look a key up."),
        ("max(a, b) -> value", "max(a, b) -> value"),
        ("close() -> None.  Close the file.", "Close the file."),
        ("No full stop here\n\nMore.", "No full stop here"),
    ],
)
def test_the_summary_is_the_first_sentence(doc: str, summary: str) -> None:
    assert Entry("m.f", "function", "m", None, doc).summary == summary


def test_the_fingerprint_names_this_interpreter() -> None:
    assert "{}.{}.{}".format(*sys.version_info[:3]) in python_docs.fingerprint()
    assert python_docs.fingerprint() == python_docs.fingerprint()


def test_pairs_come_in_two_kinds() -> None:
    pairs = instruction_pairs.pairs(held_out=False)
    answers = {pair[0]["content"]: pair[1]["content"] for pair in pairs}
    assert all([message["role"] for message in pair] == ["user", "assistant"] for pair in pairs)
    assert not any(answer.startswith("re.compile(") for answer in answers.values())  # no signatures
    assert "re.compile" in answers.values()
    assert any(answer.startswith("Compile a regular expression") for answer in answers.values())
    assert len({question.split()[0] for question in answers}) >= 6  # phrasings
