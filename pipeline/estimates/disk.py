"""Estimates the disk space of a run: the artifacts, scratch space, and checkpoints during training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.models.families import Shape
from pipeline.training.precision import checkpoint_bytes

# "auto": an upper bound, since the dtype is only known from the files.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}
TOKEN_BYTES = 9  # per token of a block: two uint32 and one uint8
SMALL = 20 * 2**20  # allowance per artifact for tokenizer, logs, scores and plots


@dataclass(frozen=True)
class Disk:
    """Disk space in bytes."""

    artifacts: Mapping[str, int]  # by missing node
    checkpoints: int  # of the training stage with the larger ones; removed when it ends
    scratch: int  # of expand while it runs

    @property
    def total(self) -> int:
        """An upper bound of the space in use at any time."""
        return sum(self.artifacts.values()) + max(self.checkpoints, self.scratch)


@dataclass(frozen=True)
class TrainingOutputs:
    """What a training stage writes besides its final model."""

    parameters: int  # trained
    checkpoints: int  # kept while the stage runs
    snapshots: int  # kept in its artifact
    has_averages: bool = False  # in checkpoints, beside the weights
    model: bool = True  # whether the final model is saved

    @property
    def checkpoint_bytes(self) -> int:
        """The size of one checkpoint."""
        return checkpoint_bytes(self.parameters, self.has_averages)


def disk_of(
    missing: Mapping[str, str],
    base: Shape,
    grown: Shape,
    dtype: str,
    trained: Mapping[str, TrainingOutputs],
    tokens: Mapping[str, int],
    scratch: int = 0,
    outer_parameters: int = 0,
) -> Disk:
    """Estimates what the missing stages will write.

    Args:
        missing: the stage of every missing node, such as {"tokenize/corpus": "tokenize"}.
        dtype: of the artifacts' weights.
        trained: by training stage.
        tokens: the number of tokens by tokenize node, if it is known.
        scratch: what expand needs in addition to its artifact, in bytes.
        outer_parameters: the number of a multimodal model's parameters outside its language model. Every artifact
            has them.
    """
    width = DTYPE_BYTES[dtype]
    stages = {"load": base, **dict.fromkeys(("expand", "pretrain", "sft"), grown)}
    models = {stage: shape.parameters + outer_parameters for stage, shape in stages.items()}
    for stage, outputs in trained.items():
        models[stage] = outputs.model * models[stage] + outputs.snapshots * outputs.parameters
    artifacts = {
        node: SMALL + (models[stage] * width if stage in models else tokens.get(node, 0) * TOKEN_BYTES)
        for node, stage in missing.items()
    }
    # A new checkpoint is complete before an old one is removed, hence one more than are kept.
    training = [trained[stage] for stage in missing.values() if stage in trained]
    checkpoints = max((outputs.checkpoint_bytes * (outputs.checkpoints + 1) for outputs in training), default=0)
    return Disk(artifacts, checkpoints, scratch)
