"""An export as a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True)
class Pushed:
    """The upload to the hub, or what a dry run would upload: files and their bytes."""

    repository: str
    address: str
    files: dict[str, int]
    private: bool
    dry_run: bool

    def __str__(self) -> str:
        lines = [f"  {size:>13,} {name}" for name, size in self.files.items()]
        kind = "private" if self.private else "public"
        done = "would be pushed to" if self.dry_run else "pushed to"
        total = f"{len(self.files)} files, {sum(self.files.values()):,} bytes"
        return "\n".join([*lines, f"{total}, {done} {self.address}/{self.repository} ({kind})"])


def check_push(repository: str, dry_run: bool = False) -> None:
    """Raise ConfigError for a name that the hub does not accept, or a missing token, before anything is created."""
    if not _NAME.fullmatch(repository):
        raise ConfigError(f"--push {repository}: should be ORG/NAME, of letters, digits, - _ and .")
    if not dry_run:
        _token(repository)


def push(directory: Path, repository: str, *, private: bool = True, dry_run: bool = False) -> Pushed:
    """Upload a directory as one commit; the repository is created if it does not exist.

    Args:
        directory: an export.
        repository: ORG/NAME.
        private: visibility of a new repository; that of an existing one does not change.
        dry_run: only list what would be uploaded.

    Raises:
        ConfigError: there is no token, the hub refuses it or the name, or it does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    address = os.environ.get("HF_ENDPOINT", _ENDPOINT).rstrip("/")
    found = sorted(file for file in directory.rglob("*") if file.is_file())
    files = {file.relative_to(directory).as_posix(): file.stat().st_size for file in found}
    pushed = Pushed(repository, address, files, private, dry_run)
    if dry_run:
        return pushed
    api = HfApi(endpoint=address, token=_token(repository))
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Export by selora")
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            why = f"the token is refused ({status}): it needs the right to write there"
        else:
            why = f"status {status}: {str(error).splitlines()[0]}"
        raise ConfigError(f"--push {repository}: {address}: {why}; the export is in {directory}") from error
    except Exception as error:
        if not _by_network(error):
            raise
        raise ConfigError(f"--push {repository}: {address} does not answer; the export is in {directory}") from error
    return pushed


def _by_network(error: BaseException | None) -> bool:
    """Whether an error started as a system error, whichever HTTP client the hub's library uses."""
    if error is None or isinstance(error, OSError):
        return error is not None
    return _by_network(error.__cause__ or error.__context__)


def _token(repository: str) -> str:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"--push {repository}: HF_HUB_OFFLINE is set: unset it")
    token = get_token()
    if token is None:
        raise ConfigError(f"--push {repository}: there is no token: set HF_TOKEN, or run `hf auth login`")
    return token
