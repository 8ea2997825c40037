"""Data sets of the Hugging Face hub: found within seconds or refused, then streamed, never downloaded whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from pipeline.config import Source
from pipeline.data.files import Position, Record
from pipeline.errors import UserError
from pipeline.models.hub import ANSWER_WITHIN_SECONDS, in_time, is_repo_id

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_SWITCHED_OFF = ("", "0", "false", "no", "off")

DOWNLOAD_INSTEAD = "Go online; or download it elsewhere (hf download --repo-type dataset ...) and say kind: files."


def is_offline() -> bool:
    """Whether the environment says that the hub is not to be asked."""
    return any(os.environ.get(name, "").lower() not in _SWITCHED_OFF for name in _OFFLINE_VARIABLES)


def dataset_commit(source: Source, setting: str) -> str:
    """The commit that a data set's revision stands for now.

    Args:
        setting: the dotted name that ``source.path`` came from.

    Raises:
        UserError: offline, unreachable within ten seconds, or no such data set or revision.
    """
    from huggingface_hub import HfApi, errors

    repo = str(source.path)
    if not is_repo_id(repo):
        rule = "kind is hub, and this is no data set's name there (NAME or ORGANISATION/NAME)"
        raise _refuse(setting, repo, rule, "For text on this machine say kind: files, as in data=files.")
    if is_offline():
        raise _refuse(setting, repo, "it is streamed from the hub, and the environment says offline", DOWNLOAD_INSTEAD)

    def ask() -> Any:
        return HfApi().dataset_info(repo, revision=source.revision, timeout=ANSWER_WITHIN_SECONDS)

    try:
        return str(in_time(ask).sha)
    except errors.GatedRepoError as error:
        remedy = f"Accept its terms at https://huggingface.co/datasets/{repo}, then run: hf auth login"
        raise _refuse(setting, repo, "its authors let only those read it who asked for access", remedy) from error
    except errors.RepositoryNotFoundError as error:
        remedy = "Check the spelling; for a private data set run: hf auth login"
        raise _refuse(setting, repo, "the hub has no such data set", remedy) from error
    except errors.RevisionNotFoundError as error:
        raise _refuse(setting, repo, f"it has no revision {source.revision}", "Name one that is there.") from error
    except (errors.HTTPError, TimeoutError) as error:
        raise _refuse(setting, repo, f"the Hugging Face hub cannot be reached ({error})", DOWNLOAD_INSTEAD) from error


def check_reachable(setting: str, value: str, remedy: str) -> None:
    """The hub answers.

    Raises:
        UserError: it does not within ten seconds.
    """
    from huggingface_hub import constants, errors, get_session

    try:
        in_time(lambda: get_session().head(constants.ENDPOINT, timeout=ANSWER_WITHIN_SECONDS))
    except (errors.HTTPError, TimeoutError) as error:
        raise _refuse(setting, value, f"the Hugging Face hub cannot be reached ({error})", remedy) from error


class HubStream:
    """Rows of the data set at its revision, read as they come: what is not asked for is not downloaded.

    Args:
        position: what ``position()`` said of an earlier stream of the same source: it goes on there, at the cost of
            reading the shard it stands in again.
    """

    def __init__(self, source: Source, setting: str, position: Position | None = None) -> None:
        self._source, self._setting = source, setting
        self._number: int = position["number"] if position else 0
        self._state: Any = position["state"] if position else None
        self._rows: Any = None

    def __iter__(self) -> Iterator[Record]:
        """Raises UserError where there is no such configuration or split, or rows cannot be had any more."""
        self._rows = self._open()
        if self._state is not None:
            self._rows.load_state_dict(self._state)
        try:
            for row in self._rows:
                self._number += 1
                yield Record(dict(row), f"{self._source.path}, row {self._number}")
        except Exception as error:  # of a network, of a file there, of datasets: each library has its own
            rule = f"reading stopped behind row {self._number} ({type(error).__name__}: {error})"
            remedy = f"The same command goes on there, once it can be read. {DOWNLOAD_INSTEAD}"
            raise _refuse(f"{self._setting}.path", str(self._source.path), rule, remedy) from error

    def position(self) -> Position:
        """Behind the row that was given last."""
        return {"number": self._number, "state": self._rows.state_dict() if self._rows is not None else self._state}

    def _open(self) -> Any:
        from datasets import load_dataset

        source, repo = self._source, str(self._source.path)
        try:
            return load_dataset(repo, source.config_name, split=source.split, revision=source.revision, streaming=True)
        except ValueError as error:  # datasets' word for an unknown configuration or split
            remedy = "Set its config_name and split to what is there."
            raise _refuse(f"{self._setting}.path", repo, str(error), remedy) from error
        except Exception as error:  # a data set that needs its own code, a hub that went away, files of no known kind
            rule = f"it cannot be opened ({type(error).__name__}: {error})"
            raise _refuse(f"{self._setting}.path", repo, rule, DOWNLOAD_INSTEAD) from error


def _refuse(setting: str, value: str, rule: str, remedy: str) -> UserError:
    return UserError(setting=setting, value=value, rule=rule, remedy=remedy)
