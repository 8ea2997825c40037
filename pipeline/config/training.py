"""Settings of the training stages, pretrain and sft."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.section import Fraction, NonNegativeFloat, NotInKey, NotInKeyIf, Positive, PositiveFloat, Section

# What ``trainable`` can name. The first three depend on ``expansion.json``.
TRAINABLE_WORDS = ("auto", "new_layers", "matched", "all", "layers", "embeddings", "norms", "head")
_TERM = r"[a-z_]+|/[^/]+/"
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]  # of a moving average, which would never change at 1
CorpusShare = Annotated[float, Field(ge=0.0, lt=1.0)]  # at 1, there would be no conversations
AverageDecay = Annotated[float, Field(gt=0.0, lt=1.0)]
NEWTON_SCHULZ_STEPS = 5  # of Muon by default, as in torch
# muon: for the matrices of all layers that train; muon_new_layers: for those of new layers, or of matched ones. AdamW
# updates everything else.
Optimizer = Literal["adamw", "muon", "muon_new_layers"]


def trainable_terms(trainable: str) -> list[str]:
    """Splits a value of ``trainable`` into words and regular expressions between slashes.

    A value with neither a known word nor slashes is one regular expression, in which a plus sign has its usual meaning.
    """
    if re.fullmatch(rf"({_TERM})(\+({_TERM}))*", trainable):
        terms = re.findall(_TERM, trainable)
        if any(term in TRAINABLE_WORDS or term.startswith("/") for term in terms):
            return terms
    return [f"/{trainable}/"]


class DeepSpeed(Section):
    """DeepSpeed's settings, apart from those that follow from ``Train``."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], NotInKey]
    offload_optimizer: Annotated[bool, NotInKey]  # from ZeRO 1 on
    offload_parameters: Annotated[bool, NotInKey]  # ZeRO 3 only
    hpz_partition_size: Annotated[Positive, NotInKey]  # ranks that hold a second copy of all parameters; ZeRO 3 only
    reduce_bucket_size: Annotated[Positive | Literal["auto"], NotInKey]  # elements; auto: one layer on GPUs
    allgather_bucket_size: Annotated[Positive | Literal["auto"], NotInKey]  # elements; ZeRO 1 and 2
    reduce_dtype: Annotated[Literal["float32", "bfloat16"], NotInKeyIf("float32")]  # of sums of gradients over ranks
    overrides: dict[str, Any]  # merged last into DeepSpeed's configuration; may change numbers, so part of the key


class Train(Section):
    """Settings of one training stage."""

    draws_random_numbers: ClassVar[bool] = True

    sequence_length: Positive  # tokens
    global_batch: Positive  # sequences per optimizer step, over all ranks
    corpus_fraction: Annotated[CorpusShare, NotInKeyIf(0.0)]  # of the sequences, from the corpus; sft only
    steps: Positive | None  # exactly one of steps and epochs
    epochs: PositiveFloat | None
    learning_rate: PositiveFloat  # at the peak; of the new layers if base_learning_rate is set
    base_learning_rate: Annotated[PositiveFloat | None, NotInKeyIf(None)]  # of tensors of the base; null: the same
    role_learning_rates: dict[str, PositiveFloat]  # multiples of the learning rate by role of a tensor: {o: 2.0}
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"]
    warmup_fraction: Fraction  # of the steps
    decay_fraction: Fraction  # of the steps; warmup_stable_decay only
    final_learning_rate_fraction: Fraction  # of learning_rate
    optimizer: Annotated[Optimizer, NotInKeyIf("adamw")]
    newton_schulz_steps: Annotated[Positive, NotInKeyIf(NEWTON_SCHULZ_STEPS)]  # iterations of Muon per matrix
    weight_decay: NonNegativeFloat
    beta1: DecayRate
    beta2: DecayRate
    epsilon: PositiveFloat
    ema_decay: Annotated[AverageDecay | None, NotInKeyIf(None)]  # per step, of averages of the weights; null: none
    max_grad_norm: PositiveFloat
    router_aux_loss: Annotated[NonNegativeFloat | None, NotInKeyIf(None)]  # its weight; null: the model config's
    trainable: str  # words of TRAINABLE_WORDS and /regular expressions/ joined by +, or one regular expression
    precision: Literal["auto", "bfloat16", "float32"]  # of compute; master weights are float32
    evaluate_at: list[Fraction]  # fractions of the steps at which to compute the held-out loss
    held_out_blocks: Positive  # blocks of sequence_length tokens for the held-out loss
    micro_batch: Annotated[Positive, NotInKey]  # sequences per rank, or group of ranks, and forward pass
    sequence_parallel: Annotated[Positive, NotInKey]  # ranks that share each sequence
    snapshot_at: Annotated[list[Fraction], NotInKey]  # fractions of the steps at which to save snapshots
    checkpoint_every_steps: Annotated[Positive, NotInKey]
    keep_checkpoints: Annotated[Positive, NotInKey]  # number of the newest checkpoints to keep
    save_model: Annotated[bool, NotInKeyIf(True)]  # false: only the metrics, which are all that a comparison may need
    activation_checkpointing: Annotated[bool, NotInKey]
    compile: Annotated[bool | Literal["auto"], NotInKey]  # torch.compile for layers and the loss; not at ZeRO 3
    float32_products: Annotated[bool | Literal["auto"], NotInKey]  # of bfloat16 operands, on CPUs
    attention: Annotated[Literal["auto", "documents", "flex", "sdpa", "eager"], NotInKey]
    deepspeed: DeepSpeed

    @model_validator(mode="after")
    def _require_steps_or_epochs(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            rule = "set exactly one of steps and epochs; the other is null"
            remedy = "Set steps=null there to train for epochs, or epochs=null to train for steps."
            raise PydanticCustomError("amount", "{rule}", {"rule": rule, "remedy": remedy})
        return self

    @property
    def trainable_terms(self) -> list[str]:
        """The words and regular expressions of ``trainable``, see ``trainable_terms``."""
        return trainable_terms(self.trainable)

    @property
    def uses_muon(self) -> bool:
        """Whether Muon updates some matrices."""
        return self.optimizer != "adamw"

    def groups_of(self, ranks: int) -> int:
        """Returns how many groups share sequences; 1 if there are too few ranks for one, which a check refuses."""
        return max(1, ranks // self.sequence_parallel)

    def compiles(self, device: str) -> bool:
        """Returns whether layers are compiled on "cpu" or "cuda".

        ``auto`` compiles on GPUs where it is possible, but not collectives within layers, which is tested on CPUs only.
        """
        if self.compile == "auto":
            return device == "cuda" and self.deepspeed.zero_stage < 3 and self.sequence_parallel == 1
        return self.compile

    def with_snapshots_at(self, fractions: Iterable[float]) -> Train:
        """Returns a copy that also saves snapshots at ``fractions`` of the steps."""
        return self.model_copy(update={"snapshot_at": sorted({*self.snapshot_at, *fractions})})
