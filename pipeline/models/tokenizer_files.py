"""The files that a model's tokenizer is stored in, which are checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import UserError, bad_model

SENTENCEPIECE_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", *SENTENCEPIECE_MODELS)  # a tokenizer has at least one
_TEKKEN, _TIKTOKEN_SUFFIXES = "tekken.json", (".tiktoken", "tiktoken.model")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # the bytes of a token in base64, and its rank
_CONVERTED = "Save a tokenizer.json to the same directory"


def check_tokenizer_files(names: Collection[str], where: object, directory: Path | None = None) -> None:
    """Checks that a model has a tokenizer in a format that transformers can read here.

    Args:
        names: names of the model's files.
        where: the model, for messages.
        directory: where these files are, if they are on this machine.

    Raises:
        UserError: it has none.
    """
    found = set(VOCABULARIES) & set(names)
    tiktoken = [name for name in names if name.endswith(_TIKTOKEN_SUFFIXES)]
    if found <= set(SENTENCEPIECE_MODELS) and directory is not None:  # Llama 3 has ranks in tokenizer.model
        tiktoken += [name for name in sorted(found) if _has_ranks(directory / name)]
        found -= set(tiktoken)
    if not found:
        raise _unreadable(names, tiktoken, where)
    if found <= set(SENTENCEPIECE_MODELS) and find_spec("sentencepiece") is None:
        raise UserError(
            setting="model.path",
            value=where,
            rule="its tokenizer is only stored as a SentencePiece model, and the package sentencepiece is missing",
            remedy="Run: pip install sentencepiece; or convert it to a tokenizer.json where that package is installed: "
            "AutoTokenizer.from_pretrained(PATH).save_pretrained(PATH).",
        )


def _has_ranks(file: Path) -> bool:
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return _TIKTOKEN_LINE.fullmatch(stream.readline(1000)) is not None


def _unreadable(names: Collection[str], tiktoken: Collection[str], where: object) -> UserError:
    if _TEKKEN in names:
        rule = f"its tokenizer is only stored as {_TEKKEN}, a format of Mistral's own library"
        remedy = f"{_CONVERTED}, from a repository that has this model in the format of transformers."
    elif tiktoken:
        rule = (
            f"its tokenizer is only stored in the format of tiktoken ({sorted(tiktoken)[0]}), which does not say how "
            "text is divided before it is encoded"
        )
        remedy = (
            f"{_CONVERTED}, from a repository that has this model in the format of transformers, or with "
            "transformers.integrations.tiktoken.convert_tiktoken_to_fast."
        )
    else:
        rule = "the model has no tokenizer"
        remedy = "Save its tokenizer to the same directory: tokenizer.save_pretrained(PATH)."
    return bad_model(where, rule, remedy)
