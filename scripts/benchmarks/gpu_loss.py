"""Seconds and memory of the loss by rows of logits per chunk: python -m scripts.benchmarks.gpu_loss cuda|cpu

The hidden states are those of one micro-batch, and the head is frozen or trains. "Products alone" is the time of the
same matrix products without the softmax. Liger's fused linear cross entropy is measured too where liger-kernel is
installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pipeline.models.matrix_products import synchronize
from pipeline.training import loss
from pipeline.training.loss import chunked_cross_entropy
from pipeline.training.precision import chunk_rows
from scripts.benchmarks.pretrain import row, say

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOGITS = (2**24, 2**26, 2**28)  # per chunk
REPEATS = 5


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Returns the fastest of several calls after a first one, in seconds."""
    times = []
    for _ in range(REPEATS + 1):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def peak_of(function: Callable[[], object], device: torch.device) -> str:
    """Returns the GPU memory in GiB that a call allocates beyond what is in use."""
    if device.type != "cuda":
        return "–"
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return f"{(torch.cuda.max_memory_allocated(device) - before) / 2**30:.2f}"


def ours(rows: int, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns our loss, with so many rows of logits per chunk."""
    with patch.object(loss, "chunk_rows", lambda *_: rows):
        return chunked_cross_entropy(x, weight, targets)


def backward(function: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Computes a loss and its gradients."""
    x.grad = weight.grad = None
    function(x, weight, targets).backward()


def products(x: Tensor, weight: Tensor, rows: int, trains: bool) -> None:
    """The products of the loss: logits, the gradient of the hidden states and, if it trains, that of the head."""
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        logits = part @ weight.T
        logits @ weight
        if trains:
            logits.T @ part


def liger() -> Loss | None:
    """Returns Liger's function, or None if it is not installed."""
    with suppress(ImportError):
        functions: Any = import_module("liger_kernel.transformers.functional")
        return partial(functions.liger_fused_linear_cross_entropy, reduction="sum")
    return None


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(options.vocabulary, options.hidden, device=device, dtype=torch.bfloat16) * 0.02
    targets = torch.randint(0, options.vocabulary, (options.tokens,), device=device)
    used = chunk_rows(device.type, options.vocabulary)
    say(f"{options.tokens} tokens, hidden size {options.hidden}, vocabulary {options.vocabulary}, bfloat16.", "")
    say(row("loss", "rows per chunk", "head", "ms", "products alone, ms", "memory, GiB"), row(*["---"] * 6))
    sizes = sorted({max(1, logits // options.vocabulary) for logits in LOGITS} | {used})
    for trains in (False, True):
        head, place = weight.clone().requires_grad_(trains), "trains" if trains else "frozen"
        for rows in sizes:
            step = partial(backward, partial(ours, rows), x, head, targets)
            alone = seconds_of(partial(products, x.detach(), weight, rows, trains), device)
            name = f"{rows}{', the default' if rows == used else ''}"
            cells = [f"{seconds_of(step, device) * 1e3:.2f}", f"{alone * 1e3:.2f}", peak_of(step, device)]
            say(row("ours", name, place, *cells))
        if (fused := liger()) is not None:
            step = partial(backward, fused, x, head, targets)
            say(row("liger", "its own", place, f"{seconds_of(step, device) * 1e3:.2f}", "–", peak_of(step, device)))


if __name__ == "__main__":
    main()
