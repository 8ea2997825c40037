"""Settings of tokenize: texts, conversations, and what is kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from pipeline.config.section import Fraction, Positive, Section

Weight = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Source(Section):
    """Where documents or conversations come from."""

    kind: Literal["python_docs", "files", "hub"]
    path: str | None  # files: a file, directory or glob (.txt .jsonl, also .gz .zst; .parquet .arrow); hub: its id
    config_name: str | None  # hub: the data set's configuration
    split: str | None  # hub
    revision: str | None  # hub: branch, tag or commit
    text_field: str | None  # the column that holds a document; null for conversations, which are told by their columns
    weight: Weight  # its share of the training tokens is its weight over the sum of all; no matter for one source alone

    @model_validator(mode="after")
    def _path_is_there(self) -> Source:
        if (self.path is None) != (self.kind == "python_docs"):
            raise ValueError("path is needed for files and hub, and must be null for python_docs")
        if self.kind == "hub" and self.split is None:
            raise ValueError("split is needed for hub, such as train")
        return self


def _one_or_several(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One source may stand without the list around it, and its faults then have no number in their path."""
    return [Source.model_validate(value)] if isinstance(value, Mapping) else validate(value)


Sources = Annotated[list[Source], Field(min_length=1), WrapValidator(_one_or_several)]


class Data(Section):
    """Texts to continue pre-training on, conversations to tune on, and what is kept apart."""

    corpus: Sources  # one source, or a list of them that is read in the shares of their weights
    instructions: Sources
    held_out_fraction: Fraction  # of documents, by hash; python_docs has its own split by module
    max_corpus_tokens: Positive | None  # stop reading the corpus there
    chat_template: Literal["model", "plain"]  # plain: a named plain-text template that needs no new tokens

    @model_validator(mode="after")
    def _something_is_held_out(self) -> Data:
        kinds = {source.kind for source in (*self.corpus, *self.instructions)}
        if self.held_out_fraction == 0 and kinds != {"python_docs"}:
            raise ValueError("held_out_fraction must be above 0; only python_docs has a held-out part of its own")
        return self


class Tokenize(Section):
    """One data set on its way to token blocks (built by graph.py from ``data`` and the training section)."""

    purpose: Literal["corpus", "instructions"]
    sources: Sources
    sequence_length: Positive
    held_out_fraction: Fraction
    max_tokens: Positive | None
    chat_template: Literal["model", "plain"] | None  # null for a corpus
