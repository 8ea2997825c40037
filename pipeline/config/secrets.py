"""Refuses settings that contain passwords or access tokens, since settings are written to files and sent to W&B."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import UserError

HIDDEN = "(hidden)"

# Formats that providers give their keys. Most begin with a prefix so that scanners can find them.
KEY_FORMATS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}"  # Hugging Face
    r"|\bwandb_v1_\w{20,}"
    r"|\bsk-[\w-]{20,}"  # OpenAI, Anthropic and others
    r"|\bnvapi-[\w-]{20,}"
    r"|\bgh[oprsu]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|\bAIza[\w-]{30,}"  # Google
    r"|\bxox[a-z]-[\w-]{10,}"  # Slack
    r"|\bpypi-[\w-]{40,}|\bnpm_[A-Za-z0-9]{30,}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}"  # JSON Web Token
    r"|\bBearer\s+[\w.~+/-]{16,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
# The variable part of user:password@host, but not of the digest of a container image, image:tag@sha256:...
CREDENTIALS = re.compile(r"(?:^|[\s'\"=/])(?!mailto:)[\w.+%-]+:[^\s@/:'\"$]+@(?!sha256:)[\w\[]")
# The value is looked ahead for, since it can contain another assignment: --export=NAME=value.
ASSIGNMENT = re.compile(r"([A-Za-z][\w.-]*)['\"]?\s*[=:]\s*(?=(\"[^\"]*\"?|'[^']*'?|[^\s,;&}\]]+))")
# Does not match "tokens", which are counts, nor "tokenizer". Names of files and numbers of keys are not secret either.
SECRET_NAME = re.compile(r"key|token(?!s\b|s_|iz)|passw|passphrase|secret|credential", re.IGNORECASE)
HARMLESS_NAME = re.compile(r"(?:^|[_.-])(?:file|path|dir|directory|field|name|id)s?$", re.IGNORECASE)
HARMLESS_VALUE = re.compile(r"\$|`|/|~|(?:[\d.]+|true|false|yes|no|on|off|null|none)$|$", re.IGNORECASE)


def refuse_secrets(values: Any) -> None:
    """Checks that no setting contains a password or an access token.

    Raises:
        UserError: a setting contains one. The message does not repeat it.
    """
    inherited = _inherited()
    for path, text in _texts(values, ""):
        if _has_secret(text, inherited) or _is_secret(path, text):
            raise _refusal(path)


def _texts(values: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yields all texts of nested settings, also their names, each with the dotted name of the setting it is in."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield path, str(name)
            yield from _texts(value, f"{path}.{name}" if path else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, path)
    elif isinstance(values, str):
        yield path, values


def refuse_secret_overrides(overrides: Sequence[str]) -> None:
    """Checks the command line as it was typed, so that no other message about it can repeat a secret.

    Raises:
        UserError: an override contains a password or an access token.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if contains_secret(override):
            raise _refusal(HIDDEN if contains_secret(key) else key.lstrip("+~"))


def contains_secret(text: str) -> bool:
    """Whether a text contains a password or an access token, by its format, its name or the environment."""
    return _has_secret(text, _inherited())


def _has_secret(text: str, inherited: Sequence[str]) -> bool:
    if KEY_FORMATS.search(text) or CREDENTIALS.search(text):
        return True
    if any(_is_secret(name, value) for name, value in ASSIGNMENT.findall(text)):
        return True
    return any(value in text for value in inherited)


def _inherited() -> list[str]:
    """The secrets in the environment."""
    return [value for name, value in os.environ.items() if len(value) >= 8 and _is_secret(name, value)]


def _is_secret(name: str, value: str) -> bool:
    """Whether a variable or setting holds a secret: by its name, unless the value only refers to one."""
    named = SECRET_NAME.search(name.rpartition(".")[2]) is not None and HARMLESS_NAME.search(name) is None
    return named and HARMLESS_VALUE.match(value.strip("'\"")) is None


def _refusal(setting: str) -> UserError:
    return UserError(
        setting=setting,
        value=HIDDEN,
        rule="it contains a password or an access token, and settings are written to files and sent to W&B",
        remedy="Leave it out, and set it in the environment of the command, such as HF_TOKEN or WANDB_API_KEY: all "
        "processes and batch jobs inherit it.",
    )
