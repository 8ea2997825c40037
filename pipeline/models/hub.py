"""Access to the Hugging Face Hub: resolves revisions to commits, downloads files, and reports errors within seconds.

Offline (``HF_HUB_OFFLINE=1``), only files in the Hub's cache are used. ``huggingface_hub`` is imported where it is used
because a run with a local model does not need it.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UserError, bad_model

TIMEOUT_SECONDS = 6.0
PARALLEL_REQUESTS = 16
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub, or in its cache.

    Attributes:
        commit: the commit that the revision refers to.
        directory: the snapshot in the Hub's cache, if only the cache may be used.
        names: names of its files, or only of the cached ones if only the cache may be used.
        elements: the number of elements of its safetensors by dtype. None if the Hub does not report it.
    """

    commit: str
    directory: Path | None
    names: tuple[str, ...]
    elements: Mapping[str, int] | None = None


def is_repo_id(path: str) -> bool:
    """Returns whether a path has the form ``NAME`` or ``ORGANIZATION/NAME``."""
    return _REPO_ID.fullmatch(path) is not None and len(path) <= 96


def find(repo: str, revision: str | None, patterns: Sequence[str]) -> HubModel:
    """Resolves a revision to its commit within seconds.

    Args:
        repo: the ID of the model.
        revision: a branch, tag or commit. None for the main branch.
        patterns: patterns of the files that will be needed. Offline, all of them must be in the cache.

    Raises:
        UserError: the model or revision does not exist or is not accessible, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _find_in_cache(repo, revision, patterns)

    def ask() -> Any:
        return HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_SECONDS)

    info = _with_user_errors(repo, revision, lambda: with_timeout(ask))
    stored = info.safetensors
    elements = None if stored is None else stored.parameters
    return HubModel(info.sha, None, tuple(file.rfilename for file in info.siblings), elements)


def _find_in_cache(repo: str, revision: str | None, patterns: Sequence[str]) -> HubModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=list(patterns))
    except LocalEntryNotFoundError as error:
        raise bad_model(
            repo,
            "it is not a directory, it is not completely in the Hub's cache, and HF_HUB_OFFLINE is set",
            f"On a machine with network access, run: hf download {repo}; or set model.path to a model directory.",
        ) from error
    directory = Path(found)
    return HubModel(directory.name, directory, tuple(path.name for path in directory.iterdir()))


def fetch_file(repo: str, commit: str, name: str) -> Path:
    """Downloads one file to the Hub's cache unless it is already cached, and returns its path."""
    from huggingface_hub import hf_hub_download

    return Path(_with_user_errors(repo, commit, lambda: hf_hub_download(repo, name, revision=commit)))


def fetch_snapshot(repo: str, commit: str, patterns: Sequence[str]) -> Path:
    """Downloads all files of a commit that match the patterns to the Hub's cache, and returns their directory."""
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return str(snapshot_download(repo, revision=commit, allow_patterns=list(patterns)))

    return Path(_with_user_errors(repo, commit, fetch))


def read_file(repo: str, commit: str, name: str) -> bytes:
    """Reads one small file without changing the Hub's cache."""
    if (cached := cached_file(repo, commit, name)) is not None:
        return cached.read_bytes()
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    def ask() -> Any:
        url = hf_hub_url(repo, name, revision=commit)
        response = get_session().get(url, headers=build_hf_headers(), follow_redirects=True)
        hf_raise_for_status(response)
        return response.content

    answer: bytes = _with_user_errors(repo, commit, lambda: with_timeout(ask))
    return answer


def read_elements(repo: str, commit: str, files: Collection[str]) -> Mapping[str, int]:
    """Returns the number of elements of safetensors files by dtype. Reads only their headers, not through the cache.

    Raises:
        UserError: they cannot be read within seconds.
    """
    from huggingface_hub import HfApi

    read = partial(HfApi().parse_safetensors_file_metadata, repo, revision=commit, timeout=TIMEOUT_SECONDS)

    def ask() -> Counter[str]:
        elements: Counter[str] = Counter()
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            for header in pool.map(read, files):
                elements.update(header.parameter_count)
        return elements

    return _with_user_errors(repo, commit, lambda: with_timeout(ask))


def cached_file(repo: str, revision: str | None, name: str) -> Path | None:
    """Returns the path of a file in the Hub's cache, or None if it is not cached."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, cache_dir=constants.HF_HUB_CACHE, revision=revision)
    return Path(found) if isinstance(found, str) else None


def with_timeout(call: Callable[[], _Result]) -> _Result:
    """Returns the result of a call, or raises its error, within ``TIMEOUT_SECONDS``.

    The connection timeout of an HTTP client does not cover a name server that hangs. This timeout does.

    Raises:
        TimeoutError: the call did not return in time.
    """
    outcome: list[tuple[_Result | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # noqa: BLE001  raised in the caller's thread
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT_SECONDS)
    if not outcome:
        raise TimeoutError(f"no answer in {TIMEOUT_SECONDS:.0f} seconds")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # without an error there is a result


def _with_user_errors(repo: str, revision: str | None, call: Callable[[], _Result]) -> _Result:
    """Returns the result of a call, with the Hub's errors converted into errors about the setting that caused them."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        remedy = f"Accept its terms at https://huggingface.co/{repo}, then run: hf auth login"
        raise bad_model(repo, "access to this model must be requested from its authors", remedy) from error
    except errors.RepositoryNotFoundError as error:
        remedy = "Check the spelling. For a private model, run: hf auth login"
        raise bad_model(repo, "it is neither a directory nor a model on the Hugging Face Hub", remedy) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            setting="model.revision",
            value=revision,
            rule=f"{repo} has no such branch, tag or commit",
            remedy="Set model.revision=main, or an existing branch, tag or commit.",
        ) from error
    except errors.LocalEntryNotFoundError as error:  # neither on the network nor in the cache
        raise _unreachable(repo, error) from error
    except errors.EntryNotFoundError as error:
        remedy = "Set model.path or model.revision to another model or revision."
        raise bad_model(repo, f"a file is missing ({error})", remedy) from error
    except errors.SafetensorsParsingError as error:
        remedy = "Set model.path or model.revision to another model or revision."
        raise bad_model(repo, f"a safetensors header is invalid ({error})", remedy) from error
    except (errors.HTTPError, TimeoutError) as error:  # the base class of all transport errors and of the errors above
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, reason: object) -> UserError:
    return bad_model(
        repo,
        f"it is not a directory, and the Hugging Face Hub cannot be reached ({reason})",
        "Set model.path to a model directory, or HF_HUB_OFFLINE=1 in the environment to use the Hub's cache.",
    )
