"""Uploads to the Hugging Face Hub, through ``upload_folder`` of its own client."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError, one_line
from pipeline.models.hub import with_timeout


def check_access() -> None:
    """Checks that the Hub may be used, and that there is a login.

    Raises:
        UserError: the Hub is disabled by HF_HUB_OFFLINE, or there is no login.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            setting="HF_HUB_OFFLINE",
            value="1",
            rule="an upload needs the Hugging Face Hub, but this environment variable disables it",
            remedy="Unset it, or add dry_run=true to see what would be uploaded.",
        )
    if get_token() is None:
        raise UserError(
            setting="export.format",
            value="hub",
            rule="you are not logged in to the Hugging Face Hub on this machine",
            remedy="Run 'hf auth login' or set HF_TOKEN, with a token that may write.",
        )


def upload(folder: Path, repository: str, private: bool) -> str:
    """Creates the repository unless it exists, uploads all files in one commit, and returns the commit's address.

    Args:
        folder: the files.
        repository: ``organization/name``.
        private: who can read a repository that is created.

    Raises:
        UserError: the Hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        with_timeout(lambda: api.create_repo(repository, private=private, exist_ok=True))
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload the model and its card"
        )
    except (errors.HTTPError, errors.HFValidationError, TimeoutError) as error:
        raise UserError(
            setting="export.repository",
            value=repository,
            rule=f"the Hugging Face Hub does not accept it ({one_line(error)})",
            remedy="Check the name, and that your token may write there: hf auth whoami. A repeated command continues.",
        ) from error
    return str(commit.commit_url)
