"""The tokenize stage: turns one dataset into memory-mapped token blocks of every split."""

from __future__ import annotations

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.config import Tokenize
from pipeline.data.dataset import HELD_OUT_FILE, TokenizeCheckpoint
from pipeline.data.dataset_builder import DatasetBuilder
from pipeline.data.sources import expected_bytes
from pipeline.data.tokenizer import TextTokenizer
from pipeline.files import fsync_directory, is_intact, read_json, seal, write_json
from pipeline.models.source import CHAT_TEMPLATE
from pipeline.progress import progress

DATASET_FILE = "dataset.json"
FILES = ("*.npy", HELD_OUT_FILE, DATASET_FILE, CHAT_TEMPLATE)
DATASET_SEAL = ".dataset.sha256"


def run(task: StageTask) -> Metrics:
    """Writes ``{train,held_out}.{input_ids,position_ids,loss_mask}.npy``, ``held_out.jsonl`` and ``dataset.json``.

    Validation and forgetting splits have the same arrays, if they were asked for. For conversations it also writes
    ``chat_template.jinja``, which the tuned model is saved with.

    Raises:
        UserError: a source cannot be read, or a split is empty.
    """
    assert isinstance(task.settings, Tokenize)
    dataset_file = task.out / DATASET_FILE
    # The files exist if an earlier attempt was killed after this stage, while the driver was hashing them.
    if is_intact(task.out / DATASET_SEAL):
        summary: Metrics = read_json(dataset_file)
    else:
        summary = _build(task, task.settings)
        write_json(dataset_file, summary)
        written = (path for pattern in FILES for path in task.out.glob(pattern))
        seal(task.out / DATASET_SEAL, written)
    TokenizeCheckpoint(task.out, task.settings.splits).remove()  # not part of the artifact
    return summary


def _build(task: StageTask, settings: Tokenize) -> Metrics:
    tokenizer = TextTokenizer(task.parents["load"])
    sizes = expected_bytes(settings.sources, settings.purpose)
    if settings.forgetting is not None:
        sizes = [*sizes, *expected_bytes(settings.forgetting, "forgetting")]
    total = 0 if 0 in sizes else sum(sizes)  # 0: unknown, and the bar shows no total
    with progress(task.name, total) as bar, DatasetBuilder(task.out, settings, tokenizer) as builder:
        summary = builder.build(bar)
    fsync_directory(task.out)  # everything must be on disk before the file that marks the dataset as complete
    return summary
