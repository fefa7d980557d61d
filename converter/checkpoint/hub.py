"""Upload of a finished checkpoint to the Hugging Face Hub."""

from pathlib import Path
from typing import Any, Protocol

from bwla_converter.source.folder.locate import HUB_ID
from bwla_kernels.errors import BWLAError
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled


class HubError(BWLAError):
    """The Hub cannot be reached, or refuses access."""


class Hub(Protocol):
    """The part of `huggingface_hub.HfApi` that is used here."""

    def whoami(self) -> dict[str, Any]:
        """Return the user that the token belongs to."""

    def create_repo(self, repo_id: str, *, exist_ok: bool, private: bool | None) -> Any:
        """Create a repository."""

    def upload_folder(self, *, repo_id: str, folder_path: str | Path, commit_message: str) -> Any:
        """Upload all files of a folder in one commit."""


def check_push(repo: str, api: Hub | None = None) -> str:
    """Check that a push is possible, and return the user's name on the Hub. Call before converting.

    Args:
        repo: the repository, `owner/name`.
        api: None for `HfApi()`.

    Raises:
        HubError: the name is invalid, or the Hub cannot be reached or refuses the token.
    """
    if not HUB_ID.fullmatch(repo):
        raise HubError(
            f"--push-to-hub {repo}: expected a name like your-name/model-bwla: give owner and name"
        )
    api = api or HfApi()
    try:
        return str(api.whoami().get("name", ""))
    except Exception as cause:
        raise HubError(f"--push-to-hub {repo}: {_reason(cause)}") from None


def push(folder: Path, repo: str, private: bool | None = None, api: Hub | None = None) -> str:
    """Upload every file of `folder` in one commit, and return the URL of the repository, which is created if needed.

    Raises:
        HubError: as `check_push`; the folder is not changed.
    """
    api = api or HfApi()
    check_push(repo, api)
    try:
        api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="BWLA checkpoint")
    except Exception as cause:
        raise HubError(
            f"--push-to-hub {repo}: {_reason(cause)}; {folder} is complete, upload it later with "
            f"bwla-inspect {folder} --push-to-hub {repo}"
        ) from None
    return f"https://huggingface.co/{repo}"


def _reason(cause: Exception) -> str:
    """Describe the many kinds of errors of the libraries below, and what to do."""
    if isinstance(cause, LocalTokenNotFoundError):
        return "expected an access token, found none: log in with `hf auth login` or set HF_TOKEN"
    if isinstance(cause, OfflineModeIsEnabled):
        return "access to the Hub is disabled by HF_HUB_OFFLINE: unset it"
    message = " ".join(str(cause).split()) or type(cause).__name__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub refused the token ({message:.200}): use one with write access to this name"
    return (
        f"the Hub did not answer as expected ({message:.200}): check the network and the name, and try again"
    )
