"""Pushing to a fake Hub: the calls it gets, and readable errors."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from bwla_converter.checkpoint import hub as module
from bwla_converter.checkpoint.hub import HubError, check_push, push
from bwla_converter.cli.convert import app
from bwla_converter.cli.inspect import app as inspect_app
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from typer.testing import CliRunner


class FakeHub:
    """Records its calls; the method `fails` raises `error`."""

    def __init__(self, fails: str = "", error: Exception | None = None) -> None:
        self.fails, self.error = fails, error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def _called(self, name: str, **arguments: Any) -> None:
        self.calls.append((name, arguments))
        if name == self.fails:
            assert self.error is not None
            raise self.error

    def whoami(self) -> dict[str, Any]:
        self._called("whoami")
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, exist_ok: bool, private: bool | None) -> None:
        self._called("create_repo", repo_id=repo_id, exist_ok=exist_ok, private=private)

    def upload_folder(self, *, repo_id: str, folder_path: str | Path, commit_message: str) -> None:
        self._called("upload_folder", repo_id=repo_id, folder_path=folder_path)


def test_a_push_is_one_upload_into_a_repository_that_exists(tmp_path: Path) -> None:
    hub = FakeHub()
    assert push(tmp_path, "me/model", api=hub) == "https://huggingface.co/me/model"
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1] == {"repo_id": "me/model", "exist_ok": True, "private": None}
    assert hub.calls[2][1] == {"repo_id": "me/model", "folder_path": tmp_path}


def test_the_real_api_takes_these_arguments() -> None:
    inspect.signature(HfApi.create_repo).bind(None, "me/model", exist_ok=True, private=None)
    inspect.signature(HfApi.upload_folder).bind(None, repo_id="a/b", folder_path=Path(), commit_message="x")
    inspect.signature(HfApi.whoami).bind(None)


@pytest.mark.parametrize("repo", ["model", "a/b/c", "me/", "../x y"])
def test_invalid_names(repo: str) -> None:
    hub = FakeHub()
    with pytest.raises(HubError, match="give owner and name"):
        check_push(repo, hub)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LocalTokenNotFoundError("none"), "log in with `hf auth login`"),
        (OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE: unset it"),
        (ConnectionError("no route to host"), r"no route to host\): check the network"),
    ],
)
def test_a_push_that_cannot_begin_is_known_before_the_work(error: Exception, sentence: str) -> None:
    with pytest.raises(HubError, match=sentence):
        check_push("me/model", FakeHub("whoami", error))


def test_a_refused_token() -> None:
    error = RuntimeError("403 Forbidden")
    error.response = type("Response", (), {"status_code": 403})()  # type: ignore[attr-defined]
    with pytest.raises(HubError, match="use one with write access"):
        check_push("me/model", FakeHub("whoami", error))


def test_an_upload_that_breaks_off_says_how_to_go_on(tmp_path: Path) -> None:
    hub = FakeHub("upload_folder", ConnectionError("reset by peer"))
    with pytest.raises(HubError, match=r"reset by peer.*is complete, upload it later with bwla-inspect"):
        push(tmp_path, "me/model", api=hub)


def test_the_converter_asks_first_and_pushes_last(make_model, tmp_path: Path, monkeypatch) -> None:
    hub, out = FakeHub(), tmp_path / "out"
    monkeypatch.setattr(module, "HfApi", lambda: hub)
    arguments = [
        str(make_model()),
        str(out),
        "--recipe",
        "data-free",
        "--no-report",
        "--push-to-hub",
        "me/tiny-bwla",
        "--private",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "pushed to https://huggingface.co/me/tiny-bwla" in done.output
    assert hub.calls[-2][1]["private"] is True
    assert hub.calls[-1] == ("upload_folder", {"repo_id": "me/tiny-bwla", "folder_path": out})
    assert "vllm serve me/tiny-bwla" in (out / "README.md").read_text()


def test_without_a_token_no_conversion_begins(make_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "HfApi", lambda: FakeHub("whoami", LocalTokenNotFoundError("none")))
    done = CliRunner().invoke(app, [str(make_model()), str(tmp_path / "out"), "--push-to-hub", "me/model"])
    assert done.exit_code == 1
    assert "log in with" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_finished_checkpoint_is_pushed_as_it_is(example_bwla: Path, monkeypatch) -> None:
    hub = FakeHub()
    monkeypatch.setattr(module, "HfApi", lambda: hub)
    done = CliRunner().invoke(inspect_app, [str(example_bwla), "--push-to-hub", "me/books"])
    assert done.exit_code == 0, done.output
    assert hub.calls[-1] == ("upload_folder", {"repo_id": "me/books", "folder_path": example_bwla})
