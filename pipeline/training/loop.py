"""The training loop, shared by pretrain and sft, which differ in their data and settings only.

The loss of a step is the sum over supervised tokens divided by their number in the global batch. Therefore it depends
neither on ragged masks nor on the number of ranks or micro-batches. Random numbers are seeded by (seed, step, rank) at
every step, so they need no state in checkpoints.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import deepspeed
import numpy as np
import torch
from torch import distributed

from pipeline.config import Split, Train
from pipeline.errors import Diverged
from pipeline.models.flops import TrainingFlops
from pipeline.tracking import Tracker
from pipeline.training.batches import (
    Indices,
    MicroBatch,
    StepReader,
    TokenBlocks,
    evenly_spaced,
    micro_batches,
)
from pipeline.training.block_losses import LOSS_OF, BlockLosses, perplexity
from pipeline.training.gradients import TOTAL, GradientNorms
from pipeline.training.mfu import Peak, memory_in_use
from pipeline.training.optimizer import LR_MULTIPLE
from pipeline.training.process_group import enter
from pipeline.training.routing import COLLAPSED_STEPS, RouterStatistics, Routing
from pipeline.training.schedule import evaluation_steps, fractions_at, learning_rate
from pipeline.training.sequence_parallel import ALONE, SequenceGroup

Status = Literal["done", "stopped"]

# A loss is a spike if it exceeds the mean of the previous steps by more than ``SPIKE_DEVIATIONS`` standard deviations.
# This is the spike score of OLMo 2 (arXiv 2501.00656), over a window short enough for runs of a few hundred steps.
SPIKE_DEVIATIONS = 7.0
SPIKE_WINDOW = 128  # steps
SPIKE_MIN_STEPS = 16  # in the window; with fewer, nothing is a spike


@dataclass
class Progress:
    """The progress of training, as JSON values that are saved in checkpoints."""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0  # of training steps only
    loss: float | None = None  # of the last step
    recent_losses: list[float] = field(default_factory=list)  # the window for detecting spikes, oldest first
    spikes: list[dict[str, float]] = field(default_factory=list)
    concentrated_steps: dict[str, int] = field(default_factory=dict)  # up to now, by layer whose router may collapse
    collapsed_routers: dict[str, int] = field(default_factory=dict)  # the step at which each was found, by layer
    saves: int = 0  # checkpoints, including the one being saved
    save_seconds: float = 0.0  # of earlier checkpoints, until they were complete
    stall_seconds: float = 0.0  # for which training waited for them
    held_out: list[dict[str, Any]] = field(default_factory=list)  # of every evaluated split by ``LOSS_OF``

    def to_json(self) -> dict[str, Any]:
        """Returns plain values. ``Progress(**values)`` is the inverse."""
        return asdict(self)


@dataclass
class Loop:
    """Runs training on one rank.

    Attributes:
        section: "pretrain" or "sft", for messages.
        evaluated: the splits whose loss is computed, the held-out one first.
        wants_stop: called once per step. If it returns True on any rank, all ranks stop after that step.
        save: saves a checkpoint of the current progress, which is written while training continues. Collective. The
            second argument says whether training ends here.
        save_snapshot: saves the current model as the snapshot at a fraction of the steps. Collective.
        tracker: receives the metrics; None on all ranks but the first.
        routing: of a mixture of experts; None for other models.
        sequence: the ranks that share sequences with this one.
    """

    section: str
    train: Train
    seed: int
    steps: int
    blocks: TokenBlocks
    evaluated: Mapping[Split, TokenBlocks]
    engine: deepspeed.DeepSpeedEngine
    gradients: GradientNorms
    flops: TrainingFlops
    peak: Peak
    device: torch.device
    progress: Progress
    wants_stop: Callable[[], bool]
    save: Callable[[Progress, bool], None]
    save_snapshot: Callable[[float], None]
    tracker: Tracker | None
    routing: Routing | None = None
    sequence: SequenceGroup = ALONE

    def run(self) -> Status:
        """Trains until the last step or a stop request. A checkpoint is saved in both cases.

        Raises:
            Diverged: a loss or gradient norm is not finite.
        """
        self._evaluate_and_snapshot()
        with StepReader(self.blocks, self._shares, self.steps, self.device, self.sequence) as reader:
            while self.progress.step < self.steps:
                stop = self._step(reader)
                self._evaluate_and_snapshot()
                last = self.progress.step == self.steps
                if stop or last or self.progress.step % self.train.checkpoint_every_steps == 0:
                    self.save(self.progress, stop or last)
                if stop and not last:
                    return "stopped"
        return "done"

    # ------------------------------------------------------------------------------------- one step

    def _shares(self, step: int) -> list[Indices]:
        """Returns the blocks of this rank's micro-batches for a step."""
        indices = self.blocks.of_step(self.seed, step, self.train.global_batch)
        return list(micro_batches(indices, self.train.micro_batch, *self.sequence.place()))

    def _step(self, reader: StepReader) -> bool:
        """Takes one optimizer step. Returns whether any rank wants to stop after it."""
        started = time.perf_counter()
        step = self.progress.step + 1
        words = np.random.SeedSequence([self.seed, step, distributed.get_rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))
        rate = learning_rate(self.train, step, self.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group[LR_MULTIPLE]
        enter(f"reading the batches of step {step}")
        batches = reader.read(step)
        # The numbers stay on the device: to read them here, the host would wait for the previous optimizer step.
        real = sum(int(batch.real.sum()) for batch in batches)
        counted = self._on_device([sum(batch.supervised for batch in batches), real])
        distributed.all_reduce(counted)
        total = self._accumulate(batches, counted.clamp(min=1.0))
        enter(f"adding the losses of step {step}")
        # The stop requests are reduced together with the loss, which saves a collective per step.
        summed = torch.cat([counted, self._on_device([float(self.wants_stop())]), total])
        distributed.all_reduce(summed[2:])
        supervised, tokens, stops, loss_sum, *routed = summed.tolist()
        loss, stop = loss_sum / max(1, supervised), stops > 0
        # Both checks come before the optimizer step: a non-finite gradient would overwrite good weights.
        self._check_finite(loss, "loss", step)
        enter(f"computing the gradient norm of step {step}")
        norms = self.gradients.read()
        self._check_finite(norms[TOTAL], "gradient norm", step)
        enter(f"updating the weights of step {step}")
        self.engine.step()
        seconds = time.perf_counter() - started
        flops = self._update_progress(step, loss, int(supervised), seconds)
        self._log_step(loss, rate, norms, flops, seconds, self._routing_metrics(routed, tokens))
        return stop

    def _accumulate(self, batches: Sequence[MicroBatch], count: torch.Tensor) -> torch.Tensor:
        """Runs the forward and backward passes of this rank's micro-batches. The host never waits for the device.

        Args:
            batches: the micro-batches.
            count: [2] in float64: the numbers of supervised and of real tokens in the global batch.

        Returns:
            The sums of this rank, in float64: of the loss, then of what is observed of routers.
        """
        factor, factor_of_real = distributed.get_world_size() / count
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for number, batch in enumerate((batch.on(self.device) for batch in batches), start=1):
            where = f"micro-batch {number} of step {self.progress.step + 1}"
            enter(f"in the forward pass of {where}")
            if self.routing is not None:
                self.routing.prepare(batch.real, factor_of_real)
            loss = self.engine(batch.input_ids, batch.position_ids, indices=batch.indices)
            enter(f"in the backward pass of {where}")
            # DeepSpeed averages gradients over ranks, but the sum is needed: the loss is already divided by the number
            # of supervised tokens in the global batch. For the same reason DeepSpeed must not divide by the number of
            # accumulation steps.
            self.engine.backward(loss * factor.to(loss.dtype), scale_wrt_gas=False)
            if number < len(batches):
                self.engine.step()  # before the last micro-batch this only advances DeepSpeed's counter
            sums = loss.detach().double()[None]
            if self.routing is not None:
                sums = torch.cat([sums, self.routing.observed()])
            total = total + sums
        return total

    def _check_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            rate = learning_rate(self.train, step, self.steps)
            raise Diverged(
                f"the {what} is {value} at step {step} (learning rate {rate:.3g}, last loss {self.progress.loss}); "
                f"the last checkpoint is intact. Lower {self.section}.learning_rate or {self.section}.max_grad_norm, "
                f"or raise {self.section}.warmup_fraction."
            )

    def _update_progress(self, step: int, loss: float, supervised: int, seconds: float) -> int:
        """Adds a step to the progress. Returns the step's FLOPs."""
        progress = self.progress
        tokens = self.train.global_batch * self.blocks.sequence_length
        flops = self.flops.of_step(tokens, supervised)
        if is_spike(loss, progress.recent_losses):
            progress.spikes.append({"step": step, "loss": loss})
        progress.recent_losses = [*progress.recent_losses, loss][-SPIKE_WINDOW:]
        progress.step, progress.loss = step, loss
        progress.tokens += tokens
        progress.flops += flops
        progress.seconds += seconds
        return flops

    def _routing_metrics(self, sums: list[float], tokens: float) -> dict[str, float]:
        """Returns what is logged of the routers in a step, and records those that have collapsed."""
        if self.routing is None:
            return {}
        metrics = {"router_aux_loss": self.routing.loss(sums, tokens)} if self.routing.has_loss else {}
        for layer, found in self.routing.statistics(sums, tokens).items():
            metrics[f"expert_load_max/{layer}"], metrics[f"expert_load_min/{layer}"] = max(found.load), min(found.load)
            metrics[f"router_entropy/{layer}"] = found.entropy
            self._record_collapse(str(layer), found)
        return metrics

    def _record_collapse(self, layer: str, found: RouterStatistics) -> None:
        progress = self.progress
        if not found.is_concentrated:
            progress.concentrated_steps.pop(layer, None)
            return
        steps = progress.concentrated_steps[layer] = progress.concentrated_steps.get(layer, 0) + 1
        if steps == COLLAPSED_STEPS:
            progress.collapsed_routers.setdefault(layer, progress.step)

    def _log_step(
        self,
        loss: float,
        rate: float,
        norms: dict[str, float],
        flops: int,
        seconds: float,
        routing: dict[str, float],
    ) -> None:
        if self.tracker is None:
            return
        spiked = any(spike["step"] == self.progress.step for spike in self.progress.spikes)
        metrics = {
            "loss": loss,
            "learning_rate": rate,
            **{f"grad_norm/{group}" if group else "grad_norm": norm for group, norm in norms.items()},
            "tokens_per_second": self.train.global_batch * self.blocks.sequence_length / seconds,
            "mfu": flops / seconds / self.peak.rate,
            "memory_bytes": memory_in_use(self.device),
            **routing,
            **({"loss_spike": 1} if spiked else {}),
        }
        self.tracker.log({**metrics, **self._cost()}, step=self.progress.step)

    def _cost(self) -> dict[str, float]:
        progress = self.progress
        return {"tokens": progress.tokens, "flops": progress.flops, "seconds": progress.seconds}

    # --------------------------------------------------------------------- evaluation and snapshots

    def _evaluate_and_snapshot(self) -> None:
        """Computes the losses of all evaluated splits and saves snapshots if they are due at the current step."""
        self._evaluate_if_due()
        for fraction in fractions_at(self.train.snapshot_at, self.progress.step, self.steps):
            self.save_snapshot(fraction)

    def _evaluate_if_due(self) -> None:
        step = self.progress.step
        fraction = evaluation_steps(self.train, self.steps).get(step)
        # After resuming, the loss at the checkpoint's step may already be on record.
        if fraction is None or any(entry["step"] == step for entry in self.progress.held_out):
            return
        found = {split: self._evaluate(split, step) for split in self.evaluated}
        self.progress.held_out.append(
            {
                "fraction": fraction,
                "step": step,
                **{LOSS_OF[split]: blocks.mean for split, blocks in found.items()},
                **{f"{LOSS_OF[split]}_stderr": blocks.stderr for split, blocks in found.items()},
                **self._cost(),
                "blocks": {LOSS_OF[split]: asdict(blocks) for split, blocks in found.items()},
            }
        )
        if self.tracker is not None:
            metrics = {f"{split}_loss": blocks.mean for split, blocks in found.items()}
            metrics |= {f"{split}_perplexity": perplexity(blocks.mean) for split, blocks in found.items()}
            errors = {f"{split}_loss_stderr": blocks.stderr for split, blocks in found.items()}
            metrics |= {name: stderr for name, stderr in errors.items() if stderr is not None}
            self.tracker.log({**metrics, **self._cost()}, step=step)

    def _evaluate(self, split: Split, step: int) -> BlockLosses:
        name = f"{split.replace('_', '-')} loss"
        enter(f"computing the {name} after step {step}")
        found = self.losses_on(self.evaluated[split])
        self._check_finite(found.mean, name, step or 1)
        return found

    @torch.no_grad()
    def losses_on(self, blocks: TokenBlocks) -> BlockLosses:
        """Returns the losses of at most ``held_out_blocks`` blocks, the same every time."""
        group, groups = self.sequence.place()
        indices = evenly_spaced(len(blocks), self.train.held_out_blocks)
        round_size = groups * self.train.micro_batch
        # At ZeRO 3 all ranks must run the same number of forward passes. Blocks are repeated to fill the last round,
        # and the repeated ones are masked.
        padded = np.resize(indices, -(-len(indices) // round_size) * round_size)
        positions = np.arange(len(padded))
        losses = torch.zeros(len(padded), dtype=torch.float64, device=self.device)
        self.engine.eval()
        for share in micro_batches(positions, self.train.micro_batch, group, groups):
            batch = blocks.batch(padded[share], repeated=share >= len(indices)).part(self.sequence).on(self.device)
            found = self.engine(batch.input_ids, batch.position_ids, indices=batch.indices, by_sequence=True)
            losses[share[0] : share[-1] + 1] = found
        self.engine.train()
        distributed.all_reduce(losses)  # every rank has zeros for the targets of the others
        return BlockLosses(losses[: len(indices)].tolist(), blocks.supervised_tokens(indices))

    def _on_device(self, values: Sequence[float]) -> torch.Tensor:
        # From page-locked memory. Otherwise the host would wait until the device has done all that was asked before.
        host = torch.tensor(values, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)


def is_spike(loss: float, previous: Sequence[float]) -> bool:
    """Returns whether ``loss`` is a spike compared to the ``previous`` losses, oldest first."""
    window = previous[-SPIKE_WINDOW:]
    if len(window) < SPIKE_MIN_STEPS:
        return False
    return loss > statistics.fmean(window) + SPIKE_DEVIATIONS * statistics.pstdev(window)
