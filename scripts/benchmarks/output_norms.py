"""Whether models whose blocks end in a norm learn from zeroed outputs as fast as others: a run of five minutes.

    python -m scripts.benchmarks.output_norms [--families gemma2 glm4] [--plain]

New layers of Gemma 2 and 3, OLMo 2 and similar families are silenced by the scales of those norms. These and the
projections before them learn at multiples of the learning rate (docs/training.md). For every family, a small model is
trained from scratch on CPython's documentation, expanded by LLaMA Pro's method, and its new layers are trained for 50
steps on the source code of CPython's library. Apart from norms, all models have the sizes of the Llama that they are
compared with. ``--plain`` repeats the last training with the learning rate for all tensors.

Printed: the loss on held-out source files before and after the 50 steps, how far it fell relative to the Llama's, and
its largest value relative to the one before. Expected before the first run: every family loses at least 80 % of what
the Llama loses, and no loss rises above the base's. Measured: see docs/training.md. With only the scales at a multiple,
sqrt(n), as it was then, they lost half. Higher multiples of the scales alone gain little from 10 sqrt(n) on.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts.task import StageTask
from pipeline.config import Source
from pipeline.data import python_docs
from pipeline.stages import expand, tokenize
from scripts.benchmarks.gpu_checks import run_plan
from scripts.benchmarks.machine import machine
from scripts.benchmarks.pretrain import row, say
from scripts.benchmarks.tasks import (
    corpus_settings,
    expand_settings,
    expand_task,
    pretrain_settings,
    quickstart,
    stage_task,
    text_files,
    training_task,
)

REFERENCE = "llama"
FAMILIES = ("gemma2", "gemma3_text", "olmo2")
VOCABULARY, LENGTH = 512, 64
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
    "max_position_embeddings": LENGTH, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
RECIPE = {
    "sequence_length": LENGTH, "global_batch": 16, "micro_batch": 16, "precision": "float32", "held_out_blocks": 64,
    "checkpoint_every_steps": 10_000,
}  # fmt: skip
BASE_RECIPE = {"trainable": "all", "learning_rate": 3e-3, "evaluate_at": []}
STEPS = 50
NEW_LAYERS = 2
FILES = 60  # of the library; every eighth one is held out by its hash
PLAIN = dict.fromkeys(("attention_output_norm", "mlp_output_norm", "o", "down"), 1.0)


@dataclass(frozen=True)
class Result:
    """The training of the new layers of one model."""

    family: str
    plain: bool
    losses: list[float]  # on held-out files, the first one before the first step

    @property
    def fell(self) -> float:
        """By how much the loss fell."""
        return self.losses[0] - self.losses[-1]

    @property
    def highest(self) -> float:
        """The largest loss, relative to the first one."""
        return max(self.losses) / self.losses[0] - 1


def measure(work: Path, families: Sequence[str], base_steps: int, plain: bool = False) -> Iterator[Result]:
    """Trains the models in an empty directory and yields their results, the reference's first."""
    families = [REFERENCE, *families]
    tokenizer = _make_tokenizer()
    random = {family: _write_random(family, tokenizer, work / f"{family}-random") for family in families}
    docs = _tokenized(work / "docs", quickstart().data.corpus, random[REFERENCE])
    code = _tokenized(work / "code", [text_files(str(_write_library(work / "library.jsonl")))], random[REFERENCE])

    settings = pretrain_settings(**RECIPE, **BASE_RECIPE, steps=base_steps)
    bases = {
        family: _training(settings, {"model": random[family], "data": docs}, work / f"{family}-base")
        for family in families
    }
    _run(list(bases.values()), work / "base-logs")

    settings = pretrain_settings(**RECIPE, steps=STEPS, evaluate_at=[part / 10 for part in range(11)])
    grown = {}
    for family, base in bases.items():
        model = _expanded(base.out, work / f"{family}-expanded")
        for rates in [{}, PLAIN] if plain and family != REFERENCE else [{}]:
            changed = settings.model_copy(update={"role_learning_rates": rates})
            out = work / f"{family}-{'plain' if rates else 'grown'}"
            grown[family, bool(rates)] = _training(changed, {"model": model, "data": code}, out)
    _run(list(grown.values()), work / "logs")
    for (family, is_plain), task in grown.items():
        yield Result(family, is_plain, _held_out_losses(task.out))


def _make_tokenizer() -> Any:
    """Trains a byte-level BPE on the documentation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(python_docs.documents(held_out=False), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>")


def _write_random(family: str, tokenizer: Any, out: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES), dtype=torch.float32)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _write_library(out: Path) -> Path:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:FILES]
    out.write_text("".join(json.dumps({"text": file.read_text(errors="replace")}) + "\n" for file in files))
    return out


def _tokenized(out: Path, sources: list[Source], tokenizer: Path) -> Path:
    out.mkdir()
    tokenize.run(stage_task("tokenize/corpus", corpus_settings(sources, LENGTH, 1 / 8), {"load": tokenizer}, out))
    return out


def _training(settings: Any, parents: dict[str, Path], out: Path) -> StageTask:
    out.mkdir()
    return training_task(settings, parents, out, "cpu")


def _run(tasks: Sequence[StageTask], logs: Path) -> None:
    logs.mkdir()
    run_plan([(task, None) for task in tasks], "cpu", logs, threads=1)  # more would be slower for tensors this small


def _expanded(base: Path, out: Path) -> Path:
    out.mkdir()
    settings = expand_settings("llama_pro", new_layers=NEW_LAYERS, position="interleaved")
    expand.run(expand_task(settings, base, out))
    return out


def _held_out_losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=FAMILIES, help=f"compared with {REFERENCE}")
    parser.add_argument("--base-steps", type=int, default=600, help="from scratch")
    parser.add_argument("--plain", action="store_true", help="also without multiples of the learning rate")
    options = parser.parse_args()
    say(f"{options.base_steps} steps from scratch; {machine('torch', 'transformers')}", "")
    say(row("family", "rates", "loss before", "after", "fell by", f"of {REFERENCE}'s", "largest loss"))
    say(row(*["---"] * 7))
    with tempfile.TemporaryDirectory(prefix="output-norms-") as directory:
        reference = 0.0
        for result in measure(Path(directory), options.families, options.base_steps, options.plain):
            reference = reference or result.fell  # the first one is the reference's
            first, last = (f"{result.losses[index]:.3f}" for index in (0, -1))
            rates = "plain" if result.plain else "default"
            share = f"{result.fell / reference:.0%}"
            say(row(result.family, rates, first, last, f"{result.fell:.3f}", share, f"{result.highest:+.2%}"))


if __name__ == "__main__":
    main()
