"""Expansion of SmolLM2-135M from 30 to 45 layers, each method compared with the procedure of its paper:

    python -m scripts.benchmarks.expand [--seeds 3] [--device cpu|cuda] [--directory DIR]

LESA is compared with a full SVD and the authors' training loop with batches of 64 (``published_lesa.py``), in time and
in quality: the perplexity of held-out text directly after surgery, the loss on singular directions held out of the
predictor's training, and the norm of the predictions relative to the targets (a predictor of zeros would preserve the
perplexity). OpT-DeUS is compared with the same procedure with POT's log-domain Sinkhorn (float32, torch), since the
authors' plain Sinkhorn returns zeros on this model. Both solve to an L1 marginal error of 1e-3. Methods that copy are
compared with ``cp -r`` of the files they wrote. Times include reading the base and writing the new model's weights.
The self-check and hashing, which the pipeline adds, are not included.

Expected before the first run: LESA's fast variant is 10 times as fast (Gram matrices instead of SVDs 7 times, a fifth
of the steps 10 times), with no difference in any of the three measures beyond that between seeds; OpT-DeUS is 3 times
as fast; copies take 1.2 times as long as cp. Measured: with the authors' initialization of the predictor, fewer steps
gave models whose perplexity varied between seeds by orders of magnitude, because nearly all predictions were the same
vector. With standardized and centered inputs, the models are like the authors'.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ot
import torch
from torch import Tensor

from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.lesa_predictor import Predictor, prediction_loss, train_predictor
from pipeline.expansion.method import LayerWeights, NewTensor, Workspace, from_neighbors, method_of, seed_for, silenced
from pipeline.expansion.methods.lesa import Lesa
from pipeline.expansion.methods.opt_deus import OptDeus, fuse
from pipeline.expansion.surgery import MakeTensors, TensorNames, write_weights
from pipeline.expansion.svd import decompose
from pipeline.models.families import LayerTensor, family_of
from pipeline.models.reading import ModelDirectory
from scripts.benchmarks.expansions import held_out_perplexity, write_model
from scripts.benchmarks.published_lesa import publish_lesa
from scripts.benchmarks.tasks import expand_settings, load_smollm2

NEW_LAYERS = 15
REPEATS = 5  # of operations that take less than a second
HELD_OUT_DIRECTIONS = 10  # one in ten
MARGINAL_ERROR = 1e-3


def main() -> None:
    """Prints three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--directory", type=Path, default=Path("benchmarks-expand"))
    chosen = parser.parse_args()
    torch.set_flush_denormal(True)
    base = load_smollm2(chosen.directory / "base")
    threads = torch.get_num_threads()
    print(f"SmolLM2-135M 30 -> 45 layers, top half; {chosen.device}, {threads} threads, torch {torch.__version__}\n")
    print_copies(base, chosen.directory / "copies")
    print_opt_deus(base, chosen.directory / "opt_deus", torch.device(chosen.device))
    print_lesa(base, chosen.directory / "lesa", torch.device(chosen.device), chosen.seeds)


def names_of(base: Path, method: str, **changes: Any) -> tuple[TensorNames, Any]:
    """Returns the tensors of a base model with a method's layer plan, and the method's settings."""
    settings = method_of(expand_settings(method, **{"new_layers": NEW_LAYERS, "position": "top", **changes}))
    model = ModelDirectory(base)
    return TensorNames(model, family_of("llama"), settings.place(model.config["num_hidden_layers"])), settings


def seconds_of(work: Callable[[], object], out: Path) -> float:
    """Returns how long ``work`` takes, which writes to the new directory ``out``."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def expand_by(made_with: tuple[TensorNames, Any], seed: int, device: torch.device, out: Path) -> Workspace:
    """Writes the weights of a model expanded by one of the pipeline's methods, and returns the method's records."""
    names, method = made_with
    return write_weights(names, method.new_tensors, device, out, seed)


# ------------------------------------------------------------------------------------------ copies


def print_copies(base: Path, directory: Path) -> None:
    """Compares the methods that copy with cp. The two alternate, and medians are printed."""
    print("| method | seconds | cp -r of its output | ratio |\n|---|---:|---:|---:|")
    out, copied = directory / "out", directory / "copied"
    for method in ("llama_pro", "solar", "copy"):
        made_with = names_of(base, method)
        surgery, cp = [], []
        for _ in range(REPEATS):
            surgery.append(seconds_of(lambda: expand_by(made_with, 0, torch.device("cpu"), out), out))  # noqa: B023
            shutil.rmtree(copied, ignore_errors=True)
            started = time.perf_counter()
            subprocess.run(["cp", "-r", str(out), str(copied)], check=True)
            cp.append(time.perf_counter() - started)
        first, second = statistics.median(surgery), statistics.median(cp)
        print(f"| {method} | {first:.2f} | {second:.2f} | {first / second:.2f} |", flush=True)
    shutil.rmtree(directory)


# ---------------------------------------------------------------------------------------- OpT-DeUS


def print_opt_deus(base: Path, directory: Path, device: torch.device) -> None:
    """Compares two solvers for the same fusions, with the same error."""
    errors: list[float] = []
    names, settings = made_with = names_of(base, "opt_deus")
    published = seconds_of(
        lambda: write_weights(names, fuse_with_pot(settings, errors), device, directory / "pot"), directory / "pot"
    )
    works: list[Workspace] = []
    mine = seconds_of(lambda: works.append(expand_by(made_with, 0, device, directory / "ours")), directory / "ours")
    worst = max(facts["marginal_error"] for facts in works[0].records.values())
    print("\n| OpT-DeUS | seconds | largest L1 marginal error | ratio |\n|---|---:|---:|---:|")
    print(f"| POT, log domain, float32 | {published:.1f} | {max(errors):.1e} | 1.00 |")
    print(f"| ours | {mine:.1f} | {worst:.1e} | {published / mine:.2f} |", flush=True)
    shutil.rmtree(directory)


def fuse_with_pot(settings: OptDeus, errors: list[float]) -> MakeTensors:
    """Returns OpT-DeUS with POT's solver.

    POT stops at an L2 error of the column sums. The L1 error is at most sqrt(n) times as large.
    """

    def solve(tensor: LayerTensor, w1: Tensor, w2: Tensor) -> Tensor:
        count = len(w1)
        uniform = torch.full((count,), 1 / count, device=w1.device)
        cost = torch.cdist(w1, w2)
        plan: Tensor = ot.bregman.sinkhorn_log(
            uniform, uniform, cost, settings.regularization, numItermax=10000, stopThr=MARGINAL_ERROR / count**0.5
        )
        errors.append(float((plan.sum(dim=1) - uniform).abs().sum() + (plan.sum(dim=0) - uniform).abs().sum()))
        return plan * count

    def method(layers: list[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        for layer, tensor, value in from_neighbors(
            layers, plan, work, lambda index, lower, upper: fuse(lower, upper, solve)
        ):
            yield NewTensor(layer, tensor, silenced(tensor, value))

    return method


# -------------------------------------------------------------------------------------------- LESA


def print_lesa(base: Path, directory: Path, device: torch.device, seeds: int) -> None:
    """Compares both variants with the authors' procedure: time, perplexity, and quality of the predictors."""
    rows: dict[str, list[tuple[float, float]]] = {"published procedure": [], "ours, reference": [], "ours, fast": []}
    names, reference = authors = names_of(base, "lesa", variant="reference")
    fast = names_of(base, "lesa", variant="fast")
    for seed in range(seeds):
        for name, work in (
            ("published procedure", lambda out: publish_lesa(names, reference, seed, device, out)),  # noqa: B023
            ("ours, reference", lambda out: expand_by(authors, seed, device, out)),  # noqa: B023
            ("ours, fast", lambda out: expand_by(fast, seed, device, out)),  # noqa: B023
        ):
            out = directory / "out"
            seconds = seconds_of(lambda: work(out), out)  # noqa: B023
            write_model(names, base, out)
            rows[name].append((seconds, held_out_perplexity(out)))
    print("\n| LESA | seconds | ratio | held-out perplexity, mean and range over seeds |\n|---|---:|---:|---:|")
    slowest = statistics.mean(seconds for seconds, _ in rows["published procedure"])
    for name, results in rows.items():
        seconds = statistics.mean(seconds for seconds, _ in results)
        perplexities = [perplexity for _, perplexity in results]
        shown = f"{statistics.mean(perplexities):.1f} ({min(perplexities):.1f} to {max(perplexities):.1f})"
        print(f"| {name} | {seconds:.1f} | {slowest / seconds:.1f} | {shown} |", flush=True)
    shutil.rmtree(directory)
    print_predictors(base, seeds)


class PredictionQuality(NamedTuple):
    """Quality of the predictions for directions that were held out of training."""

    loss: float  # as defined by the authors
    size: float  # ‖V̂‖/‖V‖
    shared: float  # norm of the mean prediction over their root mean square norm; 1 if all predictions are equal


def print_predictors(base: Path, seeds: int) -> None:
    """Compares the predictors of both variants on directions that were held out of their training."""
    columns = [f"{variant}: {name}" for name in ("size", "shared") for variant in ("reference", "fast")]
    print("\n| on held-out directions | reference: loss | fast: loss | ratio | " + " | ".join(columns) + " |")
    print("|---" + "|---:" * 7 + "|")
    names, reference = names_of(base, "lesa", variant="reference")
    _, fast = names_of(base, "lesa", variant="fast")
    layers = names.base_layers(torch.device("cpu"))
    ratios = []
    for tensor in names.tensors:
        if tensor.role.kind != "matrix":
            continue
        first, second = (
            evaluate_predictor(tensor, layers, settings, reference, seeds) for settings in (reference, fast)
        )
        ratios.append(second.loss / first.loss)
        print(f"| {tensor.module} | {first.loss:.3e} | {second.loss:.3e} | {ratios[-1]:.3f} ", end="")
        print(f"| {first.size:.3f} | {second.size:.3f} | {first.shared:.2f} | {second.shared:.2f} |", flush=True)
    print(f"| all, geometric mean | | | {math.exp(statistics.mean(map(math.log, ratios))):.3f} | | | | |")


def evaluate_predictor(
    tensor: LayerTensor, layers: Sequence[LayerWeights], settings: Lesa, loss_settings: Lesa, seeds: int
) -> PredictionQuality:
    """Trains on nine directions of ten and returns the quality on the others, averaged over seeds.

    Args:
        settings: of the predictor's training.
        loss_settings: of the loss that is reported.
    """
    spectrum = decompose(lambda index: layers[index][tensor], len(layers), standardized=settings.standardized)
    right, rank = spectrum.right, spectrum.rank
    held_out = torch.arange(0, rank, HELD_OUT_DIRECTIONS)
    trained = torch.tensor([direction for direction in range(rank) if direction % HELD_OUT_DIRECTIONS])
    qualities = []
    for seed in range(seeds):
        predictor = Predictor(right.shape[2], settings.hidden_size, seed_for(seed, tensor.name))
        train_predictor(predictor, right, settings, seed_for(seed, tensor.name), ignore_progress, trained)
        quality = measure_quality(predictor, right[:, held_out], loss_settings)
        qualities.append(quality._replace(loss=quality.loss / spectrum.scale**2))
    return PredictionQuality(*map(statistics.mean, zip(*qualities, strict=True)))


@torch.no_grad()
def measure_quality(predictor: Predictor, right: Tensor, settings: Lesa) -> PredictionQuality:
    """Returns the quality on all inner layers of ``right`` with shape ``[layers, directions, d_in]``."""
    inputs = torch.cat([right[:-2], right[2:]], dim=2).flatten(0, 1)
    target = right[1:-1].flatten(0, 1)
    predicted = predictor(inputs)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    loss = prediction_loss(predicted[order], target[order], settings.norm_loss_weight, settings.norm_batch)
    length = predicted.square().sum(dim=1).mean().sqrt()
    return PredictionQuality(
        float(loss), float(predicted.norm() / target.norm()), float(predicted.mean(dim=0).norm() / length)
    )


def ignore_progress(step: int, steps: int, loss: float) -> None:
    """Does nothing, as the progress callback of training."""


if __name__ == "__main__":
    main()
