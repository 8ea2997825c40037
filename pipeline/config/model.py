"""Settings of the load stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pipeline.config.section import Dtype, FilePath, NotInKey, Section


class Model(Section):
    """The base model: a hub id, a local directory, or ``package:NAME`` for files in an installed Python package."""

    path: FilePath
    revision: str | None  # hub only: branch, tag or commit
    gguf_file: FilePath | None  # a GGUF file within path, dequantized on load
    package: str | None  # the pip requirement that provides package:NAME, for the error message
    dtype: Dtype | Literal["auto"]  # of the artifact's weights. auto: that of most of the checkpoint's weights
    dequantize: Annotated[bool, NotInKey]  # FP8 weights; they are refused otherwise
    trust_remote_code: bool
    # Entries of config.json that determine the sizes. A plan uses them if that file cannot be read, and loading rejects
    # a model whose config differs.
    shape: Annotated[dict[str, str | int | bool] | None, NotInKey]
