"""tokenize: one data set as memory-mapped token blocks with a held-out part, so that ranks never tokenise."""

from __future__ import annotations

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.config import Tokenize
from pipeline.data.tokenizer import TextTokenizer
from pipeline.data.tokenizing import DatasetBuilder, expected_total, forget_checkpoint
from pipeline.files import fsync_directory, read_json, write_json
from pipeline.progress import progress

DATASET_FILE = "dataset.json"


def run(task: StageTask) -> Metrics:
    """Writes ``{train,held_out}.{input_ids,position_ids,loss_mask}.npy``, ``held_out.jsonl`` and ``dataset.json``.

    For conversations also ``chat_template.jinja``, which the tuned model is to carry.

    Raises:
        UserError: a source cannot be read, or gives an empty split.
    """
    assert isinstance(task.settings, Tokenize)
    done = task.out / DATASET_FILE
    if not done.exists():  # else an attempt that was killed when only its files' hashes were missing
        write_json(done, _build(task, task.settings))
    forget_checkpoint(task.out)
    summary: Metrics = read_json(done)
    return summary


def _build(task: StageTask, settings: Tokenize) -> Metrics:
    tokenizer = TextTokenizer(task.parents["load"])
    total = expected_total(settings)
    with progress(task.name, total) as bar, DatasetBuilder(task.out, settings, tokenizer) as builder:
        summary = builder.build(bar)
    fsync_directory(task.out)  # before the file that says that all is there
    return summary
