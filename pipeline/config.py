"""Every setting: its type, its unit, what it means, and the rules between settings.

Values live in ``conf/*.yaml`` and nowhere else, so no field has a default. Sections are frozen and strict:
an unknown key, a string for a number or a value out of range is refused with its path. Fields marked
``NotInKey`` cannot change a result's numbers and so do not name an artifact. No torch, no files.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

METHODS = ("lesa", "llama_pro", "opt_deus", "solar", "average", "copy", "none")
STAGE_NAMES = ("load", "expand", "tokenize", "pretrain", "sft", "evaluate", "report")
MODEL_TARGETS = ("load", "expand", "pretrain", "sft")


class NotInKey:
    """Marks a field that speeds a stage up or slows it down but leaves its numbers alone."""


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
StageName = Literal["load", "expand", "tokenize", "pretrain", "sft", "evaluate", "report"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A frozen group of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def key_settings(self) -> dict[str, Any]:
        """The part that names an artifact: everything but the fields marked ``NotInKey``."""
        settings: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if NotInKey in field.metadata:
                continue
            value = getattr(self, name)
            settings[name] = _plain(value)
        return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.key_settings()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


# ---------------------------------------------------------------------------------------------- load


class Model(Section):
    """The base model: a hub id, a local directory, or ``package:NAME`` for files inside a Python package."""

    path: str
    revision: str | None  # hub only: branch, tag or commit
    gguf_file: str | None  # a GGUF file inside path, dequantised on load
    package: str | None  # what pip must have installed where path is package:NAME
    dtype: Dtype  # of the artifact's weights
    trust_remote_code: bool


# -------------------------------------------------------------------------------------------- expand


class Expand(Section):
    """What every method that inserts layers has; each method's own class adds its settings."""

    min_base_layers: ClassVar[int] = 1

    new_layers: Positive
    position: Literal["top", "middle", "bottom", "interleaved"] | list[int]  # a list: the gap of every new layer


class LesaExpand(Expand):
    """LESA (arXiv 2502.13794): predicted matrices."""

    min_base_layers: ClassVar[int] = 3  # the predictor learns from layers with two neighbours

    method: Literal["lesa"]
    variant: str  # the preset the numbers below came from; for the record, never read by the method
    epochs: Positive
    norm_loss_weight: Fraction  # the loss's lambda
    learning_rate: PositiveFloat  # AdamW's
    weight_decay: NonNegativeFloat  # AdamW's
    batch_size: Positive  # singular directions a step
    hidden_size: Positive  # of the predictor
    norms: Literal["layer0", "neighbour", "average"]  # where a new layer's norms come from
    zero_init: bool  # zero the outputs, so that logits stay


class LlamaProExpand(Expand):
    """LLaMA Pro (arXiv 2401.02415): copies with zeroed outputs."""

    method: Literal["llama_pro"]


class OptDeusExpand(Expand):
    """OpT-DeUS (arXiv 2508.08011): neighbours fused by optimal transport, outputs zeroed."""

    method: Literal["opt_deus"]
    variant: str
    regularization: PositiveFloat  # Sinkhorn's entropic reg
    max_iterations: Positive
    marginal_error: PositiveFloat  # L1, at which a solve counts as converged
    rescale_plan: bool  # rows of the plan sum to one before fusing
    solver: Literal["log", "pot_float32"]  # pot_float32 is the authors' own call, underflow included


class SolarExpand(Section):
    """SOLAR (arXiv 2312.15166): the base's layers twice, overlapping."""

    min_base_layers: ClassVar[int] = 1

    method: Literal["solar"]
    new_layers: Positive
    position: Literal["overlap"]

    @field_validator("position", mode="before")
    @classmethod
    def _own_placement(cls, position: Any) -> Any:
        """A named position means nothing here and is recorded as ``overlap``."""
        if isinstance(position, list):
            raise ValueError("solar has a placement of its own; name any position and it is recorded as overlap")
        return "overlap" if position in ("top", "middle", "bottom", "interleaved") else position


class AverageExpand(Expand):
    """Mean of the two neighbours; a control."""

    method: Literal["average"]


class CopyExpand(Expand):
    """The lower neighbour once more; a control."""

    method: Literal["copy"]


class NoExpand(Section):
    """The base as it is; the control that says what continued training alone gives."""

    min_base_layers: ClassVar[int] = 1

    method: Literal["none"]
    new_layers: Literal[0]
    position: None

    @model_validator(mode="before")
    @classmethod
    def _ignore_placement(cls, values: Any) -> Any:
        """An experiment's new_layers and position mean nothing here and are recorded as 0 and none."""
        return {**values, "new_layers": 0, "position": None} if isinstance(values, dict) else values


AnyExpand = Annotated[
    LesaExpand | LlamaProExpand | OptDeusExpand | SolarExpand | AverageExpand | CopyExpand | NoExpand,
    Field(discriminator="method"),
]

# -------------------------------------------------------------------------------- data and tokenize


class Source(Section):
    """Where documents or conversations come from."""

    kind: Literal["python_docs", "files", "hub"]
    path: str | None  # files: a file, directory or glob (.txt .jsonl, also .gz .zst; .parquet); hub: the data set's id
    config_name: str | None  # hub: the data set's configuration
    split: str | None  # hub
    revision: str | None  # hub: branch, tag or commit
    text_field: str | None  # the column that holds a document; null for conversations, which are told by their columns

    @model_validator(mode="after")
    def _path_is_there(self) -> Source:
        if (self.path is None) != (self.kind == "python_docs"):
            raise ValueError("path is needed for files and hub, and must be null for python_docs")
        if self.kind == "hub" and self.split is None:
            raise ValueError("split is needed for hub, such as train")
        return self


class Data(Section):
    """Texts to continue pre-training on, conversations to tune on, and what is kept apart."""

    corpus: Source
    instructions: Source
    held_out_fraction: Fraction  # of documents, by hash; python_docs has its own split by module
    max_corpus_tokens: Positive | None  # stop reading the corpus there
    chat_template: Literal["model", "plain"]  # plain: a named plain-text template that needs no new tokens

    @model_validator(mode="after")
    def _something_is_held_out(self) -> Data:
        if self.held_out_fraction == 0 and {self.corpus.kind, self.instructions.kind} != {"python_docs"}:
            raise ValueError("held_out_fraction must be above 0; only python_docs has a held-out part of its own")
        return self


class Tokenize(Section):
    """One data set on its way to token blocks (built by run.py from ``data`` and the training section)."""

    purpose: Literal["corpus", "instructions"]
    source: Source
    sequence_length: Positive
    held_out_fraction: Fraction
    max_tokens: Positive | None
    chat_template: Literal["model", "plain"]


# ------------------------------------------------------------------------------------------ training


class DeepSpeed(Section):
    """DeepSpeed's engine, as far as it is ours to choose."""

    zero_stage: Literal[0, 1, 2, 3]
    offload_optimizer: bool
    offload_parameters: bool  # ZeRO 3 only
    reduce_bucket_size: Positive  # elements
    overrides: dict[str, Any]  # merged last into DeepSpeed's own configuration


class Train(Section):
    """One training stage; pretrain and sft share it."""

    sequence_length: Positive  # tokens
    global_batch: Positive  # sequences an optimizer step, over all ranks
    steps: Positive | None  # exactly one of steps and epochs
    epochs: PositiveFloat | None
    learning_rate: PositiveFloat
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"]
    warmup_fraction: Fraction  # of the steps
    decay_fraction: Fraction  # of the steps; warmup_stable_decay only
    final_learning_rate_fraction: Fraction  # of learning_rate
    weight_decay: NonNegativeFloat
    beta1: Fraction
    beta2: Fraction
    epsilon: PositiveFloat
    max_grad_norm: PositiveFloat
    trainable: str  # auto | new_layers | all | a regular expression over parameter names
    precision: Literal["auto", "bfloat16", "float32"]  # of compute; master weights are float32
    evaluate_at: list[Fraction]  # fractions of the steps at which the held-out loss is taken
    held_out_blocks: Positive  # blocks of sequence_length that the held-out loss is taken on
    micro_batch: Annotated[Positive, NotInKey]  # sequences a rank and forward pass
    checkpoint_every_steps: Annotated[Positive, NotInKey]
    activation_checkpointing: Annotated[bool, NotInKey]
    deepspeed: Annotated[DeepSpeed, NotInKey]

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs; the other is null")
        return self


# ---------------------------------------------------------------------------------------- evaluation


class Evaluate(Section):
    """lm-eval over a set of targets."""

    tasks: list[str]  # names known to lm-eval, or the bundled ones
    targets: Annotated[list[Literal["load", "expand", "pretrain", "sft"]], NotInKey]
    num_fewshot: NonNegative | dict[str, NonNegative] | None  # for all tasks, or by task; null: each task's own
    limit: Positive | None  # documents a task
    held_out_characters: Positive  # of the corpus's held-out text, for the task held_out_text
    prompt_format: Literal["plain", "chat"]  # one for all targets of a table
    dtype: Literal["auto", "float32", "bfloat16"]  # of the weights; auto: bfloat16 on a GPU, float32 on a CPU
    batch_size: Annotated[Positive, NotInKey]  # sequences, fewer where they are long


class Report(Section):
    """What the report sets side by side: one run, or the runs of a sweep."""

    runs: dict[str, str]  # the run's name -> its expansion method


# ------------------------------------------------------------------------------- what changes nothing


class Tracking(Section):
    """Weights & Biases; a JSONL beside the artifact is always written."""

    wandb: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None


class Launch(Section):
    """Where workers run. Never changes numbers."""

    device: Literal["auto", "cpu", "cuda"]
    processes: Positive | Literal["auto"]  # worker processes on this node; auto: one a GPU, else one
    threads: Positive | Literal["auto"]  # CPU threads a process; auto: cores / processes


class Settings(Section):
    """One pipeline run."""

    name: str
    seed: NonNegative
    output_dir: str
    action: Literal["run", "plan", "status"]
    stages: list[StageName]
    force: list[StageName]
    model: Model
    expand: AnyExpand
    data: Data
    pretrain: Train
    sft: Train
    evaluate: Evaluate
    tracking: Tracking
    launch: Launch


STAGE_SETTINGS: dict[str, TypeAdapter[Any]] = {
    "load": TypeAdapter(Model),
    "expand": TypeAdapter(AnyExpand),
    "tokenize": TypeAdapter(Tokenize),
    "pretrain": TypeAdapter(Train),
    "sft": TypeAdapter(Train),
    "evaluate": TypeAdapter(Evaluate),
    "report": TypeAdapter(Report),
}
