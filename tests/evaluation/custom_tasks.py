"""A directory of lm-eval task YAMLs with local data, for tests of ``evaluate.include_path``."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = """
task: capitals
include: _base.yaml
dataset_kwargs: {data_files: {test: data/capitals.jsonl}}
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: options
doc_to_target: answer
tag: geography
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATIVE = """
task: repeat
include: _base.yaml
dataset_kwargs: {data_files: {test: data/words.jsonl}}
output_type: generate_until
doc_to_text: !function utils.prompt
doc_to_target: "{{word}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
GROUP = """
group: own_suite
task: [capitals, repeat]
"""
BASE = """
dataset_path: json
test_split: test
num_fewshot: 0
metadata: {version: 1}
"""
UTILS = """
def prompt(document):
    return f"Repeat: {document['word']}\\nAnswer:"
"""


def write_custom_tasks(directory: Path) -> Path:
    """Writes a multiple-choice task, a generative one, a group of both and a tag."""
    (directory / "data").mkdir(parents=True)
    for name, text in {
        "capitals.yaml": CHOICES, "repeat.yaml": GENERATIVE, "own_suite.yaml": GROUP, "_base.yaml": BASE,
        "utils.py": UTILS,
    }.items():  # fmt: skip
        (directory / name).write_text(text)
    capitals = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Peru": "Lima"}
    rows = [{"country": country, "options": list(capitals.values()), "answer": index}
            for index, country in enumerate(capitals)]  # fmt: skip
    write_rows(directory / "data" / "capitals.jsonl", rows)
    write_rows(directory / "data" / "words.jsonl", [{"word": word} for word in ("apple", "pear", "plum")])
    return directory


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
