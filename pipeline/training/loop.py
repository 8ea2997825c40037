"""The one training loop: tokens in, loss out. pretrain and sft differ in their data and settings only.

A step's loss is the sum over supervised tokens divided by their number in the whole global batch, so neither ragged
masks nor the number of ranks or micro-batches change it. Random numbers are seeded by (seed, step, rank) at every
step, so they need no state.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import deepspeed
import numpy as np
import torch
from torch import distributed

from pipeline.config import Train
from pipeline.errors import TrainingFailure
from pipeline.models.flops import TrainingFlops
from pipeline.tracking import Tracker
from pipeline.training.batches import Blocks, global_batch, held_out_indices, micro_batches
from pipeline.training.gradients import WHOLE, GradientNorms
from pipeline.training.mfu import Peak, memory_in_use
from pipeline.training.optimizer import MULTIPLE
from pipeline.training.schedule import evaluation_steps, fractions_at, learning_rate

Status = Literal["done", "stopped"]


@dataclass
class Progress:
    """Where training stands; all of it is JSON and survives in checkpoints."""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0  # of training steps alone
    loss: float | None = None  # of the last step
    recent_losses: list[float] = field(default_factory=list)  # what a spike is measured against
    spikes: list[dict[str, float]] = field(default_factory=list)
    saves: int = 0  # checkpoints written, this one too
    save_seconds: float = 0.0  # of those before this one
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
        save_snapshot: saves the current model as the snapshot of a fraction of the steps; called by all ranks together.
        tracker: where numbers go; None on all ranks but the first.
    """

    section: str
    train: Train
    seed: int
    steps: int
    blocks: Blocks
    held_out: Blocks
    engine: deepspeed.DeepSpeedEngine
    gradients: GradientNorms
    flops: TrainingFlops
    peak: Peak
    device: torch.device
    progress: Progress
    wants_stop: Callable[[], bool]
    save: Callable[[Progress], None]
    save_snapshot: Callable[[float], None]
    tracker: Tracker | None

    def run(self) -> Status:
        """Trains to the last step, or to where a stop was asked for; the state is saved either way.

        Raises:
            TrainingFailure: a loss or gradient norm is not finite.
        """
        self._look_if_due()
        while self.progress.step < self.steps:
            stop = self._step()
            self._look_if_due()
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
            group["lr"] = rate * group[MULTIPLE]
        indices = global_batch(self.seed, step, len(self.blocks), self.train.global_batch)
        supervised = self.blocks.supervised_tokens(indices)
        loss, stop = self._accumulate(indices, supervised)
        self._check(loss, "loss", step)
        norms = self.gradients.read()
        self._check(norms[WHOLE], "gradient norm", step)
        self.engine.step()
        seconds = time.perf_counter() - started
        flops = self._count(step, loss, supervised, seconds)
        self._log_step(loss, rate, norms, flops, seconds)
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

    def _check(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            rate = learning_rate(self.train, step, self.steps)
            raise TrainingFailure(
                f"the {what} is {value} at step {step} (learning rate {rate:.3g}, last loss {self.progress.loss}); "
                f"the last saved state is kept. Lower {self.section}.learning_rate or {self.section}.max_grad_norm, "
                f"or raise {self.section}.warmup_fraction."
            )

    def _count(self, step: int, loss: float, supervised: int, seconds: float) -> int:
        """Adds a step to the progress; returns its operations."""
        progress = self.progress
        tokens = self.train.global_batch * self.blocks.sequence_length
        flops = self.flops.of_tokens(tokens, supervised)
        if is_spike(loss, progress.recent_losses):
            progress.spikes.append({"step": step, "loss": loss})
        progress.recent_losses = [*progress.recent_losses, loss][-WINDOW:]
        progress.step, progress.loss = step, loss
        progress.tokens += tokens
        progress.flops += flops
        progress.seconds += seconds
        return flops

    def _log_step(self, loss: float, rate: float, norms: dict[str, float], flops: int, seconds: float) -> None:
        if self.tracker is None:
            return
        spiked = any(spike["step"] == self.progress.step for spike in self.progress.spikes)
        numbers = {
            "loss": loss,
            "learning_rate": rate,
            **{f"grad_norm/{part}" if part else "grad_norm": norm for part, norm in norms.items()},
            "tokens_per_second": self.train.global_batch * self.blocks.sequence_length / seconds,
            "mfu": flops / seconds / self.peak.rate,
            "memory_bytes": memory_in_use(self.device),
            **({"loss_spike": 1} if spiked else {}),
        }
        self.tracker.log({**numbers, **self._spent()}, step=self.progress.step)

    def _spent(self) -> dict[str, float]:
        progress = self.progress
        return {"tokens": progress.tokens, "flops": progress.flops, "seconds": progress.seconds}

    # --------------------------------------------------------------------- evaluation and snapshots

    def _look_if_due(self) -> None:
        """What is to be known or kept of the model as it is now."""
        self._evaluate_if_due()
        for fraction in fractions_at(self.train.snapshot_at, self.progress.step, self.steps):
            self.save_snapshot(fraction)

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


# --------------------------------------------------------------------------------------------------
# When a step's loss counts as a spike.
#
# A loss is a spike when it lies more than ``DEVIATIONS`` standard deviations above the mean of the up to ``WINDOW``
# steps before it, and there are at least ``LEAST`` of those. The measure is OLMo 2's spike score (arXiv 2501.00656),
# over a window short enough for runs of some hundred steps.

WINDOW, LEAST, DEVIATIONS = 128, 16, 7.0


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether ``loss`` is a spike after the losses ``before`` it, oldest first."""
    window = before[-WINDOW:]
    if len(window) < LEAST:
        return False
    return loss > statistics.fmean(window) + DEVIATIONS * statistics.pstdev(window)
