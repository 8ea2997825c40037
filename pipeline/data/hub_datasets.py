"""Datasets of the Hugging Face Hub: resolved within seconds, then streamed without downloading them completely."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pipeline.config import Source
from pipeline.data.files import Position, Record, without_filled_fields
from pipeline.errors import UserError
from pipeline.models.hub import TIMEOUT_SECONDS, is_repo_id, with_timeout

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_FALSE_VALUES = ("", "0", "false", "no", "off")

DOWNLOAD_INSTEAD = (
    "Go online, or download it elsewhere (hf download --repo-type dataset ...) and set kind: files, path to the files "
    "of the split, and config_name, split and revision to null."
)


def is_offline() -> bool:
    """Returns whether an environment variable forbids access to the Hub."""
    return any(os.environ.get(name, "").lower() not in _FALSE_VALUES for name in _OFFLINE_VARIABLES)


def dataset_commit(source: Source, setting: str) -> str:
    """Resolves the revision of a dataset to a commit.

    Args:
        setting: dotted name of the setting that holds ``source.path``.

    Raises:
        UserError: offline mode is set, the Hub does not answer in time, it has no such dataset or revision, or a local
            directory has the same name.
    """
    repo = str(source.path)
    if not is_repo_id(repo):
        rule = "kind is hub, and this is not a dataset name (NAME or ORGANIZATION/NAME)"
        raise _refuse(setting, repo, rule, "Set kind: files for local text, as in data=files.")
    _check_not_local(repo, setting)
    if is_offline():
        rule = "it is streamed from the Hub, which an environment variable (such as HF_HUB_OFFLINE) forbids"
        raise _refuse(setting, repo, rule, DOWNLOAD_INSTEAD)
    return find_dataset(repo, source.revision, partial(_refuse, setting, repo), DOWNLOAD_INSTEAD)


def _check_not_local(repo: str, setting: str) -> None:
    """Refuses the name of a local directory, which ``load_dataset`` would read instead of the pinned commit."""
    if is_repo_id(repo) and os.path.isdir(repo):
        rule = f"kind is hub, and {os.path.abspath(repo)} is a directory of this name, which would be read instead"
        raise _refuse(setting, repo, rule, "Set kind: files to read that directory, or rename or move it.")


def find_dataset(repo: str, revision: str | None, refuse: Callable[[str, str], UserError], offline_remedy: str) -> str:
    """Returns the commit of a dataset that can be read.

    Args:
        revision: a branch, tag or commit. None for the main branch.
        refuse: makes an error of a rule, whose subject is the dataset, and a remedy.
        offline_remedy: the remedy if the Hub cannot be reached.

    Raises:
        UserError: the Hub does not answer in time, it has no such dataset or revision, access to it has not been
            granted, or it is a loading script.
    """
    from huggingface_hub import HfApi, errors

    if not is_repo_id(repo):
        raise refuse("it is neither a directory nor a dataset name (NAME or ORGANIZATION/NAME)", "Check the spelling.")

    def ask() -> Any:
        info = HfApi().dataset_info(repo, revision=revision, timeout=TIMEOUT_SECONDS)
        if info.gated:  # anyone may read the description of a gated dataset
            HfApi().auth_check(repo, repo_type="dataset")
        return info

    try:
        info = with_timeout(ask)
    except errors.GatedRepoError as error:
        remedy = f"Accept its terms at https://huggingface.co/datasets/{repo}, then run: hf auth login"
        raise refuse("access to it must be requested from its authors", remedy) from error
    except errors.RepositoryNotFoundError as error:
        remedy = "Check the spelling. For a private dataset, run: hf auth login"
        raise refuse("the Hub has no such dataset", remedy) from error
    except errors.RevisionNotFoundError as error:
        raise refuse(f"it has no revision {revision}", "Set revision to an existing branch, tag or commit.") from error
    except (errors.HTTPError, TimeoutError) as error:
        raise refuse(f"the Hugging Face Hub cannot be reached ({error})", offline_remedy) from error
    script = f"{repo.rpartition('/')[2]}.py"
    if any(file.rfilename == script for file in info.siblings or ()):
        rule = f"it is a loading script ({script}), which the datasets library no longer supports"
        raise refuse(rule, "Use a copy in a file format such as Parquet, or leave it out.")
    return str(info.sha)


def check_reachable(setting: str, value: str, remedy: str) -> None:
    """Checks that the Hub answers.

    Raises:
        UserError: it does not answer in time.
    """
    from huggingface_hub import constants, errors, get_session

    try:
        with_timeout(lambda: get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS))
    except (errors.HTTPError, TimeoutError) as error:
        raise _refuse(setting, value, f"the Hugging Face Hub cannot be reached ({error})", remedy) from error


class HubStream:
    """Rows of a dataset at a fixed revision. Shards are downloaded as they are needed.

    Args:
        source: a pinned source.
        setting: dotted name of the source.
        position: a value returned by ``position()`` for the same source; the stream resumes there, after reading the
            beginning of the current shard again.
    """

    def __init__(self, source: Source, setting: str, position: Position | None = None) -> None:
        self._source, self._setting = source, setting
        self._number: int = position["number"] if position else 0
        self._state: Any = position["state"] if position else None
        self._dataset: Any = None

    def __iter__(self) -> Iterator[Record]:
        """Raises UserError if the configuration or split does not exist, or if reading fails."""
        self._dataset = self._open()
        if self._state is not None:
            self._dataset.load_state_dict(self._state)
        try:
            for row in self._dataset:
                self._number += 1
                yield Record(without_filled_fields(dict(row)), str(self._source.path), f"row {self._number}")
        except Exception as error:  # network, file formats and the datasets library raise many kinds of exceptions
            rule = f"reading stopped after row {self._number} ({type(error).__name__}: {error})"
            remedy = f"Repeat the command to resume there once the dataset can be read. {DOWNLOAD_INSTEAD}"
            raise _refuse(f"{self._setting}.path", str(self._source.path), rule, remedy) from error

    def position(self) -> Position:
        """Returns the position after the last row that was returned."""
        state = self._state if self._dataset is None else self._dataset.state_dict()
        return {"number": self._number, "state": state}

    def _open(self) -> Any:
        from datasets import load_dataset

        source, setting = self._source, f"{self._setting}.path"
        repo = str(source.path)
        _check_not_local(repo, setting)
        try:
            return load_dataset(repo, source.config_name, split=source.split, revision=source.revision, streaming=True)
        except ValueError as error:  # raised for an unknown configuration or split
            raise _refuse(setting, repo, str(error), "Set config_name and split to existing ones.") from error
        except Exception as error:  # a loading script, a lost connection, or files of an unknown format
            rule = f"it cannot be opened ({type(error).__name__}: {error})"
            raise _refuse(setting, repo, rule, DOWNLOAD_INSTEAD) from error


def _refuse(setting: str, value: str, rule: str, remedy: str) -> UserError:
    return UserError(setting=setting, value=value, rule=rule, remedy=remedy)
