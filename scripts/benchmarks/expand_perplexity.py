"""Perplexity directly after expansion, for every method and position: python -m scripts.benchmarks.expand_perplexity

SmolLM2-135M is expanded from 30 to 45 layers and scored without training, on 4,096 held-out tokens of the embedded
corpus in float32. LESA draws random numbers and is run with three seeds. SOLAR has its own placement.

Expected before the first run: zero-initialized methods have exactly the base's perplexity; LESA and averaging have a
lower perplexity than copying; every method is better the fewer of the last layers it changes. Measured: the first
holds; LESA is worse than copying and averaging at every position; the best position is the top for methods that change
the logits, except for copying, where it is the middle.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

import torch

from scripts.benchmarks.expand import expand_by, names_of
from scripts.benchmarks.expansions import held_out_perplexity, write_model
from scripts.benchmarks.tasks import load_smollm2

POSITIONS = ("top", "middle", "bottom", "interleaved")
METHODS = ("lesa", "average", "copy", "opt_deus", "llama_pro")
SEEDS = {"lesa": 3}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("benchmarks-perplexity"))
    chosen = parser.parse_args()
    torch.set_flush_denormal(True)
    base = load_smollm2(chosen.directory / "base")
    print(f"base: {held_out_perplexity(base):.2f}\n")
    print(f"| method | {' | '.join(POSITIONS)} |\n|---|{'---:|' * len(POSITIONS)}")
    for method in METHODS:
        cells = [cell(base, method, position, chosen.directory / "out") for position in POSITIONS]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    print(f"| solar (own placement) | {cell(base, 'solar', 'top', chosen.directory / 'out')} | | | |")


def cell(base: Path, method: str, position: str, out: Path) -> str:
    """Returns the mean over the method's seeds, and the range if there are several."""
    perplexities = []
    made_with = names_of(base, method, position=position)
    for seed in range(SEEDS.get(method, 1)):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        expand_by(made_with, seed, torch.device("cpu"), out)
        write_model(made_with[0], base, out)
        perplexities.append(held_out_perplexity(out))
    mean = f"{statistics.mean(perplexities):.2f}"
    return mean if len(perplexities) == 1 else f"{mean} ({min(perplexities):.2f} to {max(perplexities):.2f})"


if __name__ == "__main__":
    main()
