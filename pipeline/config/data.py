"""Settings of the tokenize stage: documents, conversations, and what is not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from pipeline.config.section import FilePath, Fraction, NotInKey, NotInKeyIf, Positive, Section

Weight = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Split = Literal["train", "held_out", "validation", "forgetting"]
SPLITS: tuple[Split, ...] = get_args(Split)
Purpose = Literal["corpus", "instructions", "forgetting"]  # documents; conversations; documents again
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
PURPOSE_OF: dict[str, Purpose] = {"pretrain": "corpus", "sft": "instructions"}  # what each stage trains on


class Source(Section):
    """One source of documents or conversations."""

    kind: Literal["python_docs", "files", "hub"]  # each has a class in pipeline/data/sources.py
    path: FilePath | None  # files: file, directory or glob of the formats in docs/data.md; hub: id
    config_name: str | None  # hub: configuration of the dataset; others: null
    split: str | None  # hub, and files saved as a DatasetDict: split of the dataset, such as train; others: null
    revision: str | None  # hub: branch, tag or commit; null for the default branch, and for others
    text_field: str | None  # column holding a document; null for conversations, whose format is detected
    weight: Weight  # share of the training tokens, relative to the sum of all weights; unused with a single source

    @model_validator(mode="after")
    def _check_kind(self) -> Source:
        if (self.path is None) != (self.kind == "python_docs"):
            raise ValueError("path is required for files and hub, and must be null for python_docs")
        if self.kind == "hub" and self.split is None:
            raise ValueError("split is required for hub, for example train")
        if self.kind != "hub":
            unused = ("config_name", "revision") if self.kind == "files" else ("config_name", "revision", "split")
            if given := next((name for name in unused if getattr(self, name) is not None), None):
                raise ValueError(f"{given} has no effect on {self.kind} and must be null")
        return self


def _one_or_several(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Accepts a single source without a list around it; errors then name ``corpus.path``, not ``corpus.0.path``."""
    return [Source.model_validate(value)] if isinstance(value, Mapping) else validate(value)


Sources = Annotated[list[Source], Field(min_length=1), WrapValidator(_one_or_several)]


class Data(Section):
    """Documents for continued pre-training, conversations for instruction tuning, and the held-out part of both."""

    corpus: Sources  # one source, or a list that is mixed by weight
    instructions: Sources | None  # null: no instruction tuning
    forgetting: Sources | None  # documents of another kind, never trained on, on which the loss is measured
    held_out_fraction: Fraction  # of documents, chosen by hash; python_docs is split by module instead
    validation_fraction: Fraction  # of documents that are not held out, chosen by hash, to select settings by
    max_corpus_tokens: Positive | None  # training tokens after which reading the corpus stops
    max_forgetting_tokens: Positive | None  # of each source of forgetting
    chat_template: Literal["model", "plain"]  # plain: a text-only template that needs no new tokens
    system_messages: Literal["keep", "fold"]  # fold: into the first question, if the template has no system messages
    max_dropped: Annotated[Fraction, NotInKey]  # of the examples of a source; more is an error. Duplicates do not count
    max_record_bytes: Annotated[Positive, NotInKey]  # of a line or a record, and of memory to decompress a block

    @model_validator(mode="after")
    def _check_held_out(self) -> Data:
        kinds = {source.kind for source in (*self.corpus, *(self.instructions or ()))}
        if self.held_out_fraction == 0 and kinds != {"python_docs"}:
            raise ValueError("held_out_fraction must be above 0; only python_docs has its own held-out split")
        if self.held_out_fraction + self.validation_fraction >= 1:
            raise ValueError("held_out_fraction and validation_fraction must leave documents to train on")
        if any(source.text_field is not None for source in self.instructions or ()):
            raise ValueError("text_field of instructions must be null; their format is detected from their columns")
        return self


class Tokenize(Section):
    """Settings of one dataset. The driver derives them from ``data`` and the section of the training stage."""

    purpose: Literal["corpus", "instructions"]
    sources: Sources
    sequence_length: Positive
    forgetting: Annotated[Sources | None, NotInKeyIf(None)]
    held_out_fraction: Fraction
    validation_fraction: Annotated[Fraction, NotInKeyIf(0.0)]
    max_tokens: Positive | None
    max_forgetting_tokens: Annotated[Positive | None, NotInKeyIf(None)]
    chat_template: Literal["model", "plain"] | None  # null for a corpus
    system_messages: Literal["keep", "fold"]
    max_dropped: Annotated[Fraction, NotInKey]
    max_record_bytes: Annotated[Positive, NotInKey]

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that the dataset has: those to train and evaluate on, and what was asked for besides."""
        absent = {"validation": self.validation_fraction == 0, "forgetting": self.forgetting is None}
        return tuple(split for split in SPLITS if not absent.get(split, False))

    def key_settings(self) -> dict[str, Any]:
        """Returns the settings that enter the key. ``system_messages`` is one of them only if it changes something."""
        settings = super().key_settings()
        if self.system_messages == "keep":
            del settings["system_messages"]
        return settings
