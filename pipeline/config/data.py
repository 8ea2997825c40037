"""Settings of tokenize: texts, conversations, and what is kept apart."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.config.section import Fraction, Positive, Section


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
