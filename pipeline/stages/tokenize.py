"""tokenize: one data set as memory-mapped token blocks with a held-out part, so that ranks never tokenise."""

from __future__ import annotations

from pipeline.artifact import write_json
from pipeline.config import Tokenize
from pipeline.data.dataset import DatasetWriter
from pipeline.data.sources import expected_bytes, pin
from pipeline.data.tokens import TextTokenizer
from pipeline.progress import progress
from pipeline.stage import Metrics, StageTask

DATASET_FILE = "dataset.json"


def run(task: StageTask) -> Metrics:
    """Writes ``{train,held_out}.{input_ids,position_ids,loss_mask}.npy``, ``held_out.jsonl`` and ``dataset.json``.

    For conversations also ``chat_template.jinja``, which the tuned model is to carry.

    Raises:
        UserError: the source cannot be read, or gives an empty split.
    """
    assert isinstance(task.settings, Tokenize)
    source = pin(task.settings.source, task.settings.purpose)
    settings = task.settings.model_copy(update={"source": source})
    tokenizer = TextTokenizer(task.parents["load"])
    total = expected_bytes(settings.source, settings.purpose)
    with progress(task.name, total) as bar, DatasetWriter(task.out, settings, tokenizer) as writer:
        writer.write(bar)
    summary = writer.summary()
    write_json(task.out / DATASET_FILE, summary)
    return summary
