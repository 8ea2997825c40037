"""Perplexity right after surgery, every method at every position: ``python -m scripts.benchmarks.expand_perplexity``.

SmolLM2-135M from 30 to 45 layers, untrained, on 4,096 held-out tokens of the embedded corpus in float32. LESA, which
draws random numbers, is made with three seeds. SOLAR has a placement of its own.

Expected before the first run: zero-initialised methods at the base's perplexity to the last digit; LESA and averaging
lower than copying; everything better the fewer of the last layers it touches. Found: the first holds; LESA is worse
than copying and averaging at every position; what changes logits is best at the top, copying in the middle.
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
    """Prints one table."""
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
    print(f"| solar (its own overlap) | {cell(base, 'solar', 'top', chosen.directory / 'out')} | | | |")


def cell(base: Path, method: str, position: str, out: Path) -> str:
    """Mean over the method's seeds, with its spread where there are several."""
    found = []
    made_with = names_of(base, method, position=position)
    for seed in range(SEEDS.get(method, 1)):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        expand_by(made_with, seed, torch.device("cpu"), out)
        write_model(made_with[0], base, out)
        found.append(held_out_perplexity(out))
    mean = f"{statistics.mean(found):.2f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.2f} to {max(found):.2f})"


if __name__ == "__main__":
    main()
