"""The one training loop: tokens in, loss out. pretrain and sft differ in their data and settings only.

A step's loss is the sum over supervised tokens divided by their number in the whole global batch, so neither ragged
masks nor the number of ranks or micro-batches change it. Random numbers are seeded by (seed, step, rank) at every
step, so they need no state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import deepspeed
import numpy as np
import torch
from torch import distributed

from pipeline.config import Train
from pipeline.flops import TrainingFlops
from pipeline.tracking import Tracker
from pipeline.training.batches import Blocks, global_batch, held_out_indices, micro_batches
from pipeline.training.schedule import evaluation_steps, learning_rate

Status = Literal["done", "stopped"]


class TrainingDiverged(ArithmeticError):
    """A loss or gradient norm is not finite; nothing was saved over the last good state."""


@dataclass
class Progress:
    """Where training stands; all of it is JSON and survives in checkpoints."""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0  # of training steps alone
    loss: float | None = None  # of the last step
    held_out: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain values; ``Progress(**values)`` is the inverse."""
        return asdict(self)


@dataclass
class Loop:
    """One rank's part in training.

    Attributes:
        section: "pretrain" or "sft", for messages.
        wants_stop: asked once a step; any rank may say yes, and then all stop after the same step.
        save: writes a checkpoint of the current progress; called by all ranks together.
        tracker: where numbers go; None on all ranks but the first.
    """

    section: str
    train: Train
    seed: int
    steps: int
    blocks: Blocks
    held_out: Blocks
    engine: deepspeed.DeepSpeedEngine
    flops: TrainingFlops
    device: torch.device
    progress: Progress
    wants_stop: Callable[[], bool]
    save: Callable[[Progress], None]
    tracker: Tracker | None

    def run(self) -> Status:
        """Trains to the last step, or to where a stop was asked for; the state is saved either way.

        Raises:
            TrainingDiverged: a loss or gradient norm is not finite.
        """
        self._evaluate_if_due()
        while self.progress.step < self.steps:
            stop = self._step()
            self._evaluate_if_due()
            last = self.progress.step == self.steps
            if stop or last or self.progress.step % self.train.checkpoint_every_steps == 0:
                self.save(self.progress)
            if stop and not last:
                return "stopped"
        return "done"

    # ------------------------------------------------------------------------------------- one step

    def _step(self) -> bool:
        """One optimizer step; returns whether some rank wants to stop after it."""
        started = time.perf_counter()
        step = self.progress.step + 1
        self._seed(step)
        rate = learning_rate(self.train, step, self.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        indices = global_batch(self.seed, step, len(self.blocks), self.train.global_batch)
        supervised = self.blocks.supervised_tokens(indices)
        loss, stop = self._accumulate(indices, supervised)
        self._check(loss, "loss", step)
        norm = self._update()
        self._check(norm, "gradient norm", step)
        self._count(step, loss, supervised, time.perf_counter() - started)
        self._log_step(loss, rate, norm, time.perf_counter() - started)
        return stop

    def _seed(self, step: int) -> None:
        words = np.random.SeedSequence([self.seed, step, distributed.get_rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))

    def _accumulate(self, indices: np.ndarray, supervised: int) -> tuple[float, bool]:
        """Forward and backward over this rank's micro-batches.

        Returns:
            The global batch's loss, and whether some rank wants to stop.
        """
        ranks, rank = distributed.get_world_size(), distributed.get_rank()
        count = max(1, supervised)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        shares = list(micro_batches(indices, self.train.micro_batch, rank, ranks))
        for number, share in enumerate(shares, start=1):
            batch = self.blocks.batch(share, self.device)
            loss = self.engine(batch.input_ids, batch.position_ids, batch.loss_mask)
            # DeepSpeed averages gradients over ranks; the sum is wanted.
            self.engine.backward(loss * (ranks / count), scale_wrt_gas=False)
            if number < len(shares):
                self.engine.step()  # inside the accumulation it only counts micro-batches
            total += loss.detach()
        summed, stops = self._all_reduce(total.item(), float(self.wants_stop()))
        return summed / count, stops > 0

    def _update(self) -> float:
        """Applies the accumulated gradients; returns their norm before clipping."""
        norm = self._plain_gradient_norm()
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _plain_gradient_norm(self) -> torch.Tensor | None:
        """ZeRO 0 in DeepSpeed clips without telling the norm, so it is taken here; None at other stages."""
        if not isinstance(self.engine.optimizer, torch.optim.Optimizer):
            return None
        return torch.nn.utils.get_total_norm(p.grad for p in self.engine.module.parameters() if p.grad is not None)

    def _check(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            rate = learning_rate(self.train, step, self.steps)
            raise TrainingDiverged(
                f"the {what} is {value} at step {step} (learning rate {rate:.3g}, last loss {self.progress.loss}); "
                f"the last saved state is kept. Lower {self.section}.learning_rate or {self.section}.max_grad_norm, "
                f"or raise {self.section}.warmup_fraction."
            )

    def _count(self, step: int, loss: float, supervised: int, seconds: float) -> None:
        tokens = self.train.global_batch * self.blocks.sequence_length
        self.progress.step = step
        self.progress.loss = loss
        self.progress.tokens += tokens
        self.progress.flops += self.flops.of_tokens(tokens, supervised)
        self.progress.seconds += seconds

    def _log_step(self, loss: float, rate: float, norm: float, seconds: float) -> None:
        if self.tracker is None:
            return
        tokens = self.train.global_batch * self.blocks.sequence_length
        numbers = {"loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens_per_second": tokens / seconds}
        self.tracker.log({**numbers, **self._spent()}, step=self.progress.step)

    def _spent(self) -> dict[str, float]:
        progress = self.progress
        return {"tokens": progress.tokens, "flops": progress.flops, "seconds": progress.seconds}

    # ------------------------------------------------------------------------------------- held out

    def _evaluate_if_due(self) -> None:
        step = self.progress.step
        fraction = evaluation_steps(self.train, self.steps).get(step)
        if fraction is None or any(entry["step"] == step for entry in self.progress.held_out):
            return
        loss = self.held_out_loss()
        self._check(loss, "held-out loss", step or 1)
        self.progress.held_out.append({"fraction": fraction, "step": step, "loss": loss, **self._spent()})
        if self.tracker is not None:
            numbers = {"held_out_loss": loss, "held_out_perplexity": math.exp(min(loss, 700.0))}
            self.tracker.log({**numbers, **self._spent()}, step=step)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss a supervised token on the held-out blocks, the same blocks every time."""
        ranks, rank = distributed.get_world_size(), distributed.get_rank()
        indices = held_out_indices(len(self.held_out), self.train.held_out_blocks)
        round_size = ranks * self.train.micro_batch
        # Every rank runs equally many forward passes, as ZeRO 3 needs; repeated blocks are masked.
        padded = np.resize(indices, -(-len(indices) // round_size) * round_size)
        real = torch.from_numpy(np.arange(len(padded)) < len(indices)).to(self.device)
        places = np.arange(len(padded))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.engine.eval()
        for share in micro_batches(places, self.train.micro_batch, rank, ranks):
            batch = self.held_out.batch(padded[share], self.device)
            total += self.engine(batch.input_ids, batch.position_ids, batch.loss_mask & real[share, None])
        self.engine.train()
        (summed,) = self._all_reduce(total.item())
        return summed / max(1, self.held_out.supervised_tokens(indices))

    def _all_reduce(self, *values: float) -> list[float]:
        """Sums over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        summed: list[float] = tensor.tolist()
        return summed
