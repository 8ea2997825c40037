"""The Hugging Face hub: a revision pinned to its commit, a model's files, and quick words when it cannot be reached.

Offline (``HF_HUB_OFFLINE=1``) only what is in the hub's cache is used.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UserError

ANSWER_WITHIN_SECONDS = 6.0
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Found:
    """A hub model.

    Attributes:
        commit: what the revision stands for.
        directory: its place in the hub's cache, where that is all that may be used.
        names: its files' names, those of the cached ones where that is all that may be used.
    """

    commit: str
    directory: Path | None
    names: tuple[str, ...]


def is_repo_id(path: str) -> bool:
    """Whether this reads as ``NAME`` or ``ORGANISATION/NAME``."""
    return _REPO_ID.fullmatch(path) is not None and len(path) <= 96


def find(repo: str, revision: str | None, patterns: Sequence[str]) -> Found:
    """Resolves a revision (branch, tag, commit; None is the main branch) to its commit, within seconds.

    Args:
        patterns: the files that are wanted; offline, all of them must be in the cache.

    Raises:
        UserError: there is no such model or revision, no permission to read it, or no hub.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _find_in_cache(repo, revision, patterns)

    def ask() -> Any:
        return HfApi().model_info(repo, revision=revision, timeout=ANSWER_WITHIN_SECONDS)

    info = _translate(repo, revision, lambda: in_time(ask))
    return Found(info.sha, None, tuple(file.rfilename for file in info.siblings))


def _find_in_cache(repo: str, revision: str | None, patterns: Sequence[str]) -> Found:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=list(patterns))
    except LocalEntryNotFoundError as error:
        raise _refuse(
            repo,
            "it is no directory, all of it is not in the hub's cache, and HF_HUB_OFFLINE is set",
            f"Where there is a network, run: hf download {repo}; or give a model directory.",
        ) from error
    directory = Path(found)
    return Found(directory.name, directory, tuple(path.name for path in directory.iterdir()))


def fetch_file(repo: str, commit: str, name: str) -> Path:
    """One file by way of the hub's cache."""
    from huggingface_hub import hf_hub_download

    return Path(_translate(repo, commit, lambda: hf_hub_download(repo, name, revision=commit)))


def read_json_file(repo: str, commit: str, name: str) -> dict[str, Any]:
    """One JSON file, without a change to the hub's cache."""
    if (cached := cached_file(repo, commit, name)) is not None:
        content: dict[str, Any] = json.loads(cached.read_text())
        return content
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    def ask() -> Any:
        url = hf_hub_url(repo, name, revision=commit)
        answer = get_session().get(url, headers=build_hf_headers(), follow_redirects=True)
        hf_raise_for_status(answer)
        return answer.json()

    answered: dict[str, Any] = _translate(repo, commit, lambda: in_time(ask))
    return answered


def cached_file(repo: str, revision: str | None, name: str) -> Path | None:
    """A file that the hub's cache holds already."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, cache_dir=constants.HF_HUB_CACHE, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fetch_snapshot(repo: str, commit: str, patterns: Sequence[str]) -> Path:
    """The directory, in the hub's cache, of all files of one commit whose names match."""
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return str(snapshot_download(repo, revision=commit, allow_patterns=list(patterns)))

    return Path(_translate(repo, commit, fetch))


def _translate(repo: str, revision: str | None, call: Callable[[], _Result]) -> _Result:
    """Turns the hub's errors into words about the setting that caused them."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        remedy = f"Accept its terms at https://huggingface.co/{repo}, then run: hf auth login"
        raise _refuse(repo, "its authors let only those read it who asked for access", remedy) from error
    except errors.RepositoryNotFoundError as error:
        remedy = "Check the spelling; for a private model run: hf auth login"
        raise _refuse(repo, "neither a directory nor the hub has it", remedy) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            setting="model.revision",
            value=revision,
            rule=f"{repo} has no such branch, tag or commit",
            remedy="Say model.revision=main, or one that is there.",
        ) from error
    except errors.LocalEntryNotFoundError as error:  # asked for over the network, found neither there nor here
        raise _unreachable(repo, error) from error
    except errors.EntryNotFoundError as error:
        raise _refuse(repo, f"a file is missing there ({error})", "Choose another model or revision.") from error
    except (errors.HTTPError, TimeoutError) as error:  # the base of every transport error, and of the hub's own above
        raise _unreachable(repo, error) from error


def in_time(call: Callable[[], _Result]) -> _Result:
    """The call's result, or its error. A time-out for connecting does not cover a name server that hangs; this does.

    Raises:
        TimeoutError: no answer within ``ANSWER_WITHIN_SECONDS``.
    """
    outcome: list[tuple[_Result | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_WITHIN_SECONDS)
    if not outcome:
        raise TimeoutError(f"no answer in {ANSWER_WITHIN_SECONDS:.0f} seconds")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # there is a result where there is no error


def _refuse(repo: str, rule: str, remedy: str) -> UserError:
    return UserError(setting="model.path", value=repo, rule=rule, remedy=remedy)


def _unreachable(repo: str, why: object) -> UserError:
    return _refuse(
        repo,
        f"it is no directory, and the Hugging Face hub cannot be reached ({why})",
        "Give a model directory; or set HF_HUB_OFFLINE=1 to use what is in the hub's cache.",
    )
