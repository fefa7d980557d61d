"""A finished checkpoint to the Hugging Face Hub."""

from pathlib import Path
from typing import Any, Protocol

from bwla_converter.source.model import HUB_ID
from bwla_kernels.errors import BWLAError
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled


class HubError(BWLAError):
    """The Hub cannot be reached, or does not let us in."""


class Hub(Protocol):
    """What is used of `huggingface_hub.HfApi`."""

    def whoami(self) -> dict[str, Any]:
        """Whose token it is."""

    def create_repo(self, repo_id: str, *, exist_ok: bool, private: bool | None) -> Any:
        """Make sure that there is such a repository."""

    def upload_folder(self, *, repo_id: str, folder_path: str | Path, commit_message: str) -> Any:
        """One commit with all files of a folder."""


def check_push(repo: str, api: Hub | None = None) -> str:
    """See that a push can begin, before hours of work. Returns the user's name on the Hub.

    Args:
        repo: where to, `owner/name`.
        api: None for `HfApi()`.

    Raises:
        HubError: no such name, no token, no network.
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
    """Upload every file of `folder` in one commit; the repository is made where there is none.

    Returns: the address of the repository.

    Raises:
        HubError: as `check_push`; the folder stays as it is.
    """
    api = api or HfApi()
    check_push(repo, api)
    try:
        api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="BWLA checkpoint")
    except Exception as cause:
        raise HubError(
            f"--push-to-hub {repo}: {_reason(cause)}; {folder} is complete, push it later with "
            f"bwla-inspect {folder} --push-to-hub {repo}"
        ) from None
    return f"https://huggingface.co/{repo}"


def _reason(cause: Exception) -> str:
    """What went wrong, in words; the libraries below raise many kinds of errors."""
    if isinstance(cause, LocalTokenNotFoundError):
        return "expected a token of the Hub, found none: log in with `hf auth login` or set HF_TOKEN"
    if isinstance(cause, OfflineModeIsEnabled):
        return "the Hub is switched off by HF_HUB_OFFLINE: unset it"
    said = " ".join(str(cause).split()) or type(cause).__name__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub refused the token ({said:.200}): use one with write access to this name"
    return f"the Hub did not answer as expected ({said:.200}): check the network and the name, and try again"
