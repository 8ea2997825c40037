"""Counts what would make the host wait for a device, in operations on any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_stack
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.files import write_json

aten = torch.ops.aten
# Their results are numbers on the host, or tensors whose sizes depend on the data.
DATA_DEPENDENT = {
    aten._local_scalar_dense, aten.item, aten.equal, aten.is_nonzero, aten.nonzero, aten.nonzero_numpy, aten.argwhere,
    aten.masked_select, aten.unique_dim, aten.unique_consecutive, aten._unique, aten._unique2, aten.bincount,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy: 0, aten.copy_: 1}  # and the position of the source


class Waits(TorchDispatchMode):
    """Counts, by name: data-dependent operations, indexing by masks, and copies between devices that block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts, and calls the operation."""
        kwargs, packet = kwargs or {}, func.overloadpacket
        self.operations += 1
        if packet in DATA_DEPENDENT or (packet in INDEXING and self._has_mask(args[1])):
            self._count(packet)
        out = func(*args, **kwargs)
        if packet in COPIES:
            blocking = not (kwargs.get("non_blocking") or (packet == aten.copy_ and len(args) > 2 and args[2]))
            if blocking and args[COPIES[packet]].device != out.device:
                self._count(packet)
        return out

    def _count(self, packet: Any) -> None:
        callers = [frame for frame in extract_stack() if "/torch/" not in frame.filename and frame.filename != __file__]
        caller = f"{Path(callers[-1].filename).name}:{callers[-1].lineno}" if callers else ""
        self.counts[f"{packet} at {caller}"] += 1

    @staticmethod
    def _has_mask(indices: Any) -> bool:
        return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in tree_leaves(indices))


@contextmanager
def count_waits_of_steps(file: Path) -> Iterator[None]:
    """Writes the waits between the first and the last micro-batch of all steps but the first, DeepSpeed's included.

    In the first step, DeepSpeed at ZeRO 3 compares across ranks in which order modules run.
    """
    from deepspeed.accelerator import get_accelerator

    from pipeline.training.loop import Loop

    waits, accumulate = Waits(), Loop._accumulate
    steps = 0

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 1:
            return accumulate(*arguments)

        def synchronize(*details: Any) -> None:
            waits.counts["synchronize"] += 1

        with waits, patch.object(get_accelerator(), "synchronize", synchronize):
            return accumulate(*arguments)

    with patch.object(Loop, "_accumulate", counted):
        yield
    write_json(file, {"steps": steps, "operations": waits.operations, "waits": waits.counts})
