"""Linear algebra of LESA and OpT-DeUS on one device: python -m scripts.benchmarks.gpu_algebra cuda|cpu

The decomposition of several layers' matrices side by side is compared with the matrices themselves, and Sinkhorn's
transport plan with its marginals. Both are what the methods run, at the size of their largest matrix.
"""

from __future__ import annotations

import argparse
import time

import torch

from pipeline.expansion.sinkhorn import sinkhorn_log
from pipeline.expansion.svd import decompose
from pipeline.models.matrix_products import synchronize
from scripts.benchmarks.pretrain import row, say


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shape", type=int, nargs=2, default=[14336, 4096])
    parser.add_argument("--transport", type=int, default=14336)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    layers = [torch.randn(*options.shape) * 0.02 for _ in range(options.layers)]
    say("", row("operation", "size", "seconds", "error"), row(*["---"] * 4))

    started = time.perf_counter()
    parts = decompose(lambda index: layers[index].to(device), options.layers)
    synchronize(device)
    seconds = time.perf_counter() - started
    errors = [
        ((parts.left @ parts.right[index]).cpu() - layer).norm().item() / layer.norm().item()
        for index, layer in enumerate(layers)
    ]
    size = f"{options.layers} × {options.shape}"
    say(row("decomposition", size, f"{seconds:.2f}", f"{max(errors):.1e} of the norm"))

    started = time.perf_counter()
    moved = decompose(lambda index: layers[index].to(device), options.layers, lambda shape, _: torch.empty(shape))
    seconds = time.perf_counter() - started
    equal = torch.equal(moved.right, parts.right.cpu()) and torch.equal(moved.left, parts.left)
    say(row("decomposition, V on the host", size, f"{seconds:.2f}", "same bits" if equal else "other bits"))
    del parts, moved

    cost = torch.rand(options.transport, options.transport, device=device)
    started = time.perf_counter()
    solved = sinkhorn_log(cost, 0.06, 100, 1e-9)  # OpT-DeUS's settings
    synchronize(device)
    seconds = time.perf_counter() - started
    name, size = f"Sinkhorn, {solved.iterations} iterations", f"{options.transport}²"
    say(row(name, size, f"{seconds:.2f}", f"{solved.marginal_error:.1e} of the marginals"))


if __name__ == "__main__":
    main()
