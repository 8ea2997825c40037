"""What a training stage would need: tokens, floating-point operations, memory per device, hours."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import Data, Launch, Source, Train
from pipeline.config.data import PURPOSE_OF, Purpose
from pipeline.config.execution import GPUS, Gpu
from pipeline.data import sources
from pipeline.driver.graph import Node
from pipeline.estimates import (
    Memory,
    Setup,
    Trained,
    largest_micro_batch,
    memory_of,
    stop_seconds,
    usable,
    utilization_of,
    write_seconds,
)
from pipeline.files import read_json
from pipeline.planning.prepared import PreparedRun
from pipeline.training.precision import checkpoint_bytes
from pipeline.training.schedule import total_steps

BYTES_PER_TOKEN = 4.0  # typical of English text


@dataclass(frozen=True)
class Amount:
    """How much a stage trains on.

    Attributes:
        steps: None if it follows from the number of tokens, and that is known only once the data are tokenized.
        supervised: the share of all tokens, padding included, that enter the loss.
    """

    steps: int | None
    supervised: float

    def tokens(self, train: Train) -> int | None:
        """The tokens of all steps together."""
        return None if self.steps is None else self.steps * train.global_batch * train.sequence_length


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of one training stage.

    Attributes:
        largest_micro_batch: the largest one that fits the named GPU, 0 if none does, None if no GPU is named.
    """

    section: str
    trained: Trained
    setup: Setup
    amount: Amount
    launch: Launch
    nodes: int
    memory: Memory
    largest_micro_batch: int | None

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that ``launch.device`` names."""
        return GPUS.get(self.launch.device)

    @property
    def step_flops(self) -> int:
        """Floating-point operations per optimizer step."""
        train = self.setup.train
        tokens = train.global_batch * train.sequence_length
        flops = self.trained.flops(train.sequence_length, train.optimizer, train.newton_schulz_steps)
        return flops.of_step(tokens, round(tokens * self.amount.supervised))

    @property
    def flops(self) -> int | None:
        """Floating-point operations of all steps together."""
        return None if self.amount.steps is None else self.amount.steps * self.step_flops

    @property
    def hours(self) -> float | None:
        """Duration on all devices together at ``utilization``."""
        seconds = self.step_seconds
        return None if seconds is None or self.amount.steps is None else self.amount.steps * seconds / 3600

    @property
    def utilization(self) -> float:
        """``launch.utilization``, estimated from the settings if it is ``auto``."""
        setting = self.launch.utilization
        return utilization_of(self.trained, self.setup) if setting == "auto" else setting

    @property
    def step_seconds(self) -> float | None:
        """Duration of an optimizer step at ``utilization``."""
        if self.gpu is None or self.utilization == 0:
            return None
        return self.step_flops / (self.setup.ranks * self.gpu.tflops(self.setup.precision) * 1e12 * self.utilization)

    @property
    def checkpoint_bytes(self) -> int:
        """The size of one checkpoint."""
        return checkpoint_bytes(self.trained.parameters, self.setup.train.ema_decay is not None)

    @property
    def write_seconds(self) -> float:
        """How long a checkpoint is written in the background."""
        return write_seconds(self.checkpoint_bytes, self.nodes)

    @property
    def stop_seconds(self) -> float:
        """The longest time from a signal to the end of training, without the step if its duration is not known."""
        return stop_seconds(self.checkpoint_bytes, self.nodes, self.step_seconds or 0.0)


def plan_training(prepared: PreparedRun, section: str) -> TrainingPlan | None:
    """Plans one training stage; None if it is not known what it would train, or ``overrides`` have a fault."""
    trained, purpose = prepared.trained(section), PURPOSE_OF[section]
    if trained is None or not prepared.has_valid_overrides(section):
        return None
    train, setup, launch = getattr(prepared.run, section), prepared.setup(section), prepared.run.launch
    expected = None if purpose in prepared.inputs.failures else expected_tokens(prepared.run.data, purpose)
    amount = amount_of(train, prepared.nodes[f"tokenize/{purpose}"], expected)
    gpu = GPUS.get(launch.device)
    largest = None if gpu is None else largest_micro_batch(trained, setup, usable(gpu.memory_gib * 2**30))
    nodes = prepared.machine(section).nodes
    return TrainingPlan(section, trained, setup, amount, launch, nodes, memory_of(trained, setup), largest)


def amount_of(train: Train, data: Node, expected: int | None) -> Amount:
    """Works out how much a stage trains on: from its settings, and from its token blocks if they exist.

    Args:
        data: the node of the token blocks.
        expected: about how many tokens there will be, to use until the blocks exist; None if that is not known.
    """
    if data.artifact.is_complete():
        dataset = read_json(data.artifact.path / "dataset.json")
        # Padding is computed as well, so it counts among all tokens.
        tokens = dataset["blocks"]["train"] * train.sequence_length
        supervised = dataset["supervised_tokens"]["train"] / max(1, tokens)
        # Every token of the corpus is a target, but for the first of a document.
        supervised += train.corpus_fraction * (1.0 - supervised)
        return Amount(total_steps(train, dataset["blocks"]["train"]), supervised)
    if train.steps is None and expected is None:
        return Amount(None, 1.0)
    return Amount(total_steps(train, (expected or 0) // train.sequence_length), 1.0)


def expected_tokens(data: Data, purpose: Purpose) -> int | None:
    """Estimates the number of tokens of a dataset from the sizes of its files; None if they are not all files."""
    several: list[Source] = getattr(data, purpose)
    limit = data.max_corpus_tokens if purpose == "corpus" else None
    tokens = None
    if all(source.kind == "files" for source in several):
        tokens = round(sum(sources.expected_bytes(several, purpose)) / BYTES_PER_TOKEN)
    return min((count for count in (tokens, limit) if count is not None), default=None)
