"""Disk that a run needs: every stage's artifact, room to work in, and checkpoints while training lasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.models.families import Shape
from pipeline.training.precision import CHECKPOINT_BYTES

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TOKEN_BYTES = 9  # of a token block: two uint32 and one uint8
SMALL = 20 * 2**20  # tokenizer, logs, scores, plots: of every artifact together with its model or blocks


@dataclass(frozen=True)
class Disk:
    """Bytes by what needs them."""

    artifacts: Mapping[str, int]  # by node, those that are missing
    checkpoints: int  # the larger training stage's; they are removed when it ends
    scratch: int  # expand's while it lasts

    @property
    def total(self) -> int:
        """No less than at the fullest moment."""
        return sum(self.artifacts.values()) + max(self.checkpoints, self.scratch)


@dataclass(frozen=True)
class TrainingOutputs:
    """What a training stage writes besides its final model."""

    parameters: int  # trained
    checkpoints: int  # kept while the stage runs
    snapshots: int  # kept in its artifact


def disk_of(
    missing: Mapping[str, str],
    base: Shape,
    grown: Shape,
    dtype: str,
    trained: Mapping[str, TrainingOutputs],
    tokens: Mapping[str, int],
    scratch: int = 0,
) -> Disk:
    """What the missing stages will write.

    Args:
        missing: node -> stage, such as "tokenize/corpus" -> "tokenize".
        dtype: of the artifacts' weights.
        trained: by training stage.
        tokens: tokenize node -> tokens, where that is known.
        scratch: what expanding needs beside its artifact.
    """
    width = DTYPE_BYTES[dtype]
    models = {"load": base.parameters, **dict.fromkeys(("expand", "pretrain", "sft"), grown.parameters)}
    for stage, outputs in trained.items():
        models[stage] += outputs.snapshots * outputs.parameters
    artifacts = {
        node: SMALL + (models[stage] * width if stage in models else tokens.get(node, 0) * TOKEN_BYTES)
        for node, stage in missing.items()
    }
    # A new checkpoint is whole before an old one is removed.
    training = [trained[stage] for stage in missing.values() if stage in trained]
    checkpoints = max((outputs.parameters * (outputs.checkpoints + 1) for outputs in training), default=0)
    return Disk(artifacts, checkpoints * CHECKPOINT_BYTES, scratch)
