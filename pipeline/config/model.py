"""Settings of load: the base model."""

from __future__ import annotations

from typing import Annotated

from pipeline.config.section import Dtype, NotInKey, Section


class Model(Section):
    """The base model: a hub id, a local directory, or ``package:NAME`` for files inside a Python package."""

    path: str
    revision: str | None  # hub only: branch, tag or commit
    gguf_file: str | None  # a GGUF file inside path, dequantised on load
    package: str | None  # what pip must have installed where path is package:NAME
    dtype: Dtype  # of the artifact's weights
    trust_remote_code: bool
    # Entries of its config.json from which sizes follow: action=plan counts by them where that file cannot be read, and
    # loading refuses a model that has others.
    shape: Annotated[dict[str, str | int | bool] | None, NotInKey]
