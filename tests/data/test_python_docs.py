"""The embedded corpus is deterministic, public, and split without leaks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from pipeline.config.data import Source
from pipeline.data import python_docs, stdlib_harvest
from pipeline.data.python_docs import (
    TOPICS,
    Entry,
    OverlapIndex,
    documents,
    entries,
    instruction_pairs,
    question_entries,
    subset_of,
    topics,
    words,
)
from pipeline.data.records import Drops
from pipeline.data.sources import ExampleStream
from pipeline.data.splits import Deduplicator
from tests.processes import seconds_of_children


def _entries_of(subset: str) -> list[Entry]:
    return [entry for entry in entries() if entry.subset == subset]


def _harvested(**environment: str) -> bytes:
    command = [sys.executable, "-I", "-S", "-B", str(Path(stdlib_harvest.__file__))]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment, cwd="/").stdout


def test_the_harvest_is_the_same_in_any_environment() -> None:
    """Locale, home, secrets and hash seed do not affect it, although ``os.environ`` is a default of ``cgi.parse``."""
    plain = _harvested(PATH=os.environ["PATH"])
    other = _harvested(PATH="/bin", LC_ALL="C", HOME="/nowhere", COLUMNS="20", API_KEY="secret-key", PYTHONHASHSEED="7")
    assert plain == other
    assert b"secret-key" not in other
    assert not re.search(rb" at 0x", plain)


def test_it_is_built_within_seconds() -> None:
    program = "from pipeline.data import python_docs as p; p.documents(False); p.instruction_pairs(False)"
    before = seconds_of_children()
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    assert seconds_of_children() - before < 20.0  # about 3


def test_well_known_objects_have_signature_and_docstring() -> None:
    text = "\n".join(documents(held_out=False) + documents(held_out=True))
    assert re.search(r"^json\.dumps\(obj, \*, skipkeys=False.*\n    Serialize ``obj``", text, re.MULTILINE)
    assert "math.sqrt(x, /)\n    Return the square root of x." in text  # a C function
    assert "class collections.OrderedDict" in text
    assert "os.path.join" in text and "posixpath.join" not in text


def test_private_names_and_modules_with_side_effects_are_left_out() -> None:
    assert not [entry.name for entry in entries() if re.search(r"(^|\.)_(?!_init__)", entry.name)]
    assert not {"this", "antigravity", "idlelib", "tkinter"} & {entry.module for entry in entries()}


def test_documents_are_unique_and_in_a_fixed_order() -> None:
    texts = documents(held_out=False) + documents(held_out=True)
    assert len(set(texts)) == len(texts)
    plain = [" ".join(words(entry.doc)) for entry in entries()]
    assert len(set(plain)) == len(plain)


def test_every_subset_is_large_enough() -> None:
    sizes = {subset: sum(len(entry.doc) for entry in _entries_of(subset)) for subset in python_docs.SUBSETS}
    assert sizes["taught"] > sizes["asked"] > sizes["held_out"] > 80_000


def test_related_modules_are_in_the_same_subset() -> None:
    assert subset_of("json") == subset_of("json.decoder") == subset_of("_json")
    assert subset_of("os") == subset_of("os.path") == subset_of("posix")
    assert subset_of("math") == subset_of("cmath")  # their docstrings are nearly the same


# Ways in which held-out text could leak into training, and asked text into the instruction pairs.


def test_no_held_out_text_leaks_into_the_corpus() -> None:
    """Not by a re-export, a quotation in a topic, or a repeated docstring."""
    corpus = documents(held_out=False)
    seen = OverlapIndex(corpus)
    assert not [entry.name for entry in _entries_of("held_out") if seen.overlaps(entry.doc)]
    lines = {line.strip() for text in corpus for line in text.splitlines()}
    assert not [entry.name for entry in _entries_of("held_out") if entry.name + (entry.signature or "") in lines]


def test_validation_documents_are_about_other_modules_than_those_trained_on() -> None:
    """They are to show how well held-out modules will be known."""
    empty = {"path": None, "config_name": None, "split": None, "revision": None, "text_field": None}
    source = Source(kind="python_docs", weight=1.0, **empty)
    deduplicator = Deduplicator(0.0, validation_fraction=0.1)
    groups: dict[str | None, set[str | None]] = defaultdict(set)
    for example in ExampleStream(source, "corpus", "data.corpus", max_record_bytes=1):
        groups[deduplicator.assign(example, Drops())].add(example.group)
    assert len(groups["validation"]) > 5 and not groups["validation"] & (groups["train"] | {TOPICS})
    assert not groups["held_out"] & (groups["train"] | groups["validation"])


def test_no_topic_names_a_held_out_module() -> None:
    held_out = {entry.module.partition(".")[0] for entry in _entries_of("held_out")}
    for text in topics().values():
        assert not [name for name in held_out if re.search(rf'"{name}\.\w|\bimport {name}\b', text)]


def test_no_held_out_or_asked_text_leaks_into_the_instruction_pairs() -> None:
    messages = [message["content"] for pair in instruction_pairs(held_out=False) for message in pair]
    names = set(re.findall(r"[\w.]+", "\n".join(messages)))
    known = OverlapIndex(messages)
    for entry in _entries_of("held_out"):
        assert entry.kind == "module" or entry.name not in names, entry.name
    for entry in question_entries():
        assert entry.kind == "module" or entry.name not in names, entry.name
        assert len(words(entry.summary)) < 5 or not known.overlaps(entry.summary), entry.name


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
    assert "{}.{}.{}".format(*sys.version_info[:3]) in python_docs.interpreter_fingerprint()
    assert python_docs.interpreter_fingerprint() == python_docs.interpreter_fingerprint()


def test_there_are_two_kinds_of_pairs() -> None:
    pairs = instruction_pairs(held_out=False)
    answers = {pair[0]["content"]: pair[1]["content"] for pair in pairs}
    assert all([message["role"] for message in pair] == ["user", "assistant"] for pair in pairs)
    assert not any(answer.startswith("re.compile(") for answer in answers.values())  # signatures are not asked for
    assert "re.compile" in answers.values()
    assert any(answer.startswith("Compile a regular expression") for answer in answers.values())
    assert len({question.split()[0] for question in answers}) >= 6  # phrasings
