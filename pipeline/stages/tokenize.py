"""tokenize: one data set as memory-mapped token blocks with a held-out part, so that ranks never tokenise."""

from __future__ import annotations

from pipeline.artifact import write_json
from pipeline.config import Tokenize
from pipeline.data.tokenizing import DatasetBuilder, expected_total
from pipeline.data.tokens import TextTokenizer
from pipeline.progress import progress
from pipeline.stage import Metrics, StageTask

DATASET_FILE = "dataset.json"


def run(task: StageTask) -> Metrics:
    """Writes ``{train,held_out}.{input_ids,position_ids,loss_mask}.npy``, ``held_out.jsonl`` and ``dataset.json``.

    For conversations also ``chat_template.jinja``, which the tuned model is to carry.

    Raises:
        UserError: a source cannot be read, or gives an empty split.
    """
    assert isinstance(task.settings, Tokenize)
    tokenizer = TextTokenizer(task.parents["load"])
    total = expected_total(task.settings)
    with progress(task.name, total) as bar, DatasetBuilder(task.out, task.settings, tokenizer) as builder:
        summary = builder.build(bar)
    write_json(task.out / DATASET_FILE, summary)
    return summary
