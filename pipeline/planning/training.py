"""What one training stage will take: tokens, operations, memory on each device, hours."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import Data, Launch, Train
from pipeline.config.execution import GPUS, Gpu
from pipeline.data import sources
from pipeline.driver.graph import Node
from pipeline.errors import UserError
from pipeline.estimates import Memory, Setup, Trained, largest_micro_batch, memory_of, usable, what_fits
from pipeline.files import gib, read_json
from pipeline.training.schedule import total_steps

NOTHING_FITS = "launch.processes or launch.nodes with more devices, or name a larger one: nothing else fits"
BYTES_A_TOKEN = 4.0  # of English text, about


@dataclass(frozen=True)
class Amount:
    """How much a stage trains on; None where nobody knows before the data are tokenized."""

    steps: int | None
    supervised: float  # of all tokens, the share that has a target

    def tokens(self, train: Train) -> int | None:
        """In all steps."""
        return None if self.steps is None else self.steps * train.global_batch * train.sequence_length


@dataclass(frozen=True)
class TrainingPlan:
    """One training stage."""

    section: str
    trained: Trained
    setup: Setup
    amount: Amount
    launch: Launch
    memory: Memory
    largest_micro_batch: int | None  # on the named device; 0 where none fits

    @property
    def device(self) -> Gpu | None:
        """The one that is named."""
        return GPUS.get(self.launch.device)

    @property
    def step_flops(self) -> int:
        """Operations of one optimizer step."""
        tokens = self.setup.train.global_batch * self.setup.train.sequence_length
        flops = self.trained.flops(self.setup.train.sequence_length)
        return flops.of_tokens(tokens, round(tokens * self.amount.supervised))

    @property
    def flops(self) -> int | None:
        """Operations of all steps."""
        return None if self.amount.steps is None else self.amount.steps * self.step_flops

    @property
    def hours(self) -> float | None:
        """On all devices together, at the stated utilization."""
        if self.device is None or self.flops is None or self.launch.utilization == 0:
            return None
        rate = self.setup.ranks * self.device.bfloat16_tflops * 1e12 * self.launch.utilization
        return self.flops / rate / 3600

    def fault(self) -> UserError | None:
        """Why it will run out of the named device's memory, and what would fit."""
        if self.device is None or self.memory.total <= (there := room(self.device)):
            return None
        fits = what_fits(self.section, self.trained, self.setup, there)
        return UserError(
            setting=f"{self.section}.micro_batch",
            value=self.setup.train.micro_batch,
            rule=f"it needs {gib(self.memory.total)} a device, and {self.launch.device} has {there / 2**30:.1f} for it",
            remedy=f"Say {fits or NOTHING_FITS}.",
        )


def room(device: Gpu) -> int:
    """Bytes of a named device that training can fill."""
    return usable(device.memory_gib * 2**30)


def plan_training(section: str, trained: Trained, setup: Setup, launch: Launch, amount: Amount) -> TrainingPlan:
    """The plan of one section."""
    device = GPUS.get(launch.device)
    largest = None if device is None else largest_micro_batch(trained, setup, room(device))
    return TrainingPlan(section, trained, setup, amount, launch, memory_of(trained, setup), largest)


# ------------------------------------------------------------------------------------ how much there is


def amount_of(train: Train, data: Node, expected: int | None) -> Amount:
    """Steps, from the settings or the token blocks; before these are there, from about how many tokens to expect."""
    if data.artifact.is_complete():
        dataset = read_json(data.artifact.path / "dataset.json")
        share = dataset["supervised_tokens"]["train"] / max(1, dataset["tokens"]["train"])
        return Amount(total_steps(train, dataset["blocks"]["train"]), share)
    if train.steps is None and expected is None:
        return Amount(None, 1.0)
    return Amount(total_steps(train, (expected or 0) // train.sequence_length), 1.0)


def expected_tokens(data: Data, purpose: sources.Purpose) -> int | None:
    """About how many tokens a data set will have; None where nobody knows before reading it."""
    several = data.corpus if purpose == "corpus" else data.instructions
    limit = data.max_corpus_tokens if purpose == "corpus" else None
    there = None
    if all(source.kind == "files" for source in several):
        there = round(sum(sources.expected_bytes(several, purpose)) / BYTES_A_TOKEN)
    return min((size for size in (there, limit) if size is not None), default=None)
