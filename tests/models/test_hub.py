"""The hub as a target, its client replaced."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vbon_lightning.models import HubError, HubTarget, as_hub_target, hub


class FakeApi:
    """Keeps what it is asked, and fails where it is told to."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails = fails
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append((name, arguments, keywords))
            if name == self.fails:
                raise OSError("the hub says no")
            return SimpleNamespace(commit_url="hub/commit/1")

        return call


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    return fake


def test_names() -> None:
    assert as_hub_target(None) is None
    target = as_hub_target("me/mine")
    assert target == HubTarget("me/mine") == as_hub_target({"repo_id": "me/mine"})
    assert as_hub_target(target) is target
    for wrong in ("", "a/b/c", "me/with space", "me/-x", "me/x.git"):
        with pytest.raises(HubError, match="is no repository's name"):
            HubTarget(wrong)


def test_the_repository_is_made_first(api: FakeApi) -> None:
    HubTarget("me/mine", private=True).prepare()
    assert api.calls == [("whoami", (), {}), ("create_repo", ("me/mine",), {"private": True, "exist_ok": True})]
    HubTarget("me/mine", revision="try-1").prepare()
    assert api.calls[-1] == ("create_branch", ("me/mine",), {"branch": "try-1", "exist_ok": True})


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("whoami", "cannot log in .* 'me/mine': set HF_TOKEN .*the hub says no"),
        ("create_repo", "cannot write to 'me/mine': .*the hub says no"),
        ("create_branch", "cannot write to 'me/mine': .*the hub says no"),
    ],
)
def test_what_would_fail_later_fails_first(api: FakeApi, fails: str, message: str) -> None:
    api.fails = fails
    with pytest.raises(HubError, match=message):
        HubTarget("me/mine", revision="x").prepare()


def test_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client, which is not to reach anything."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="set HF_TOKEN"):
        HubTarget("me/mine").prepare()


def test_an_upload_is_one_commit(api: FakeApi, tmp_path: Path) -> None:
    assert HubTarget("me/mine", revision="x").upload(tmp_path, message="VBoN") == "hub/commit/1"
    ((name, _, keywords),) = api.calls
    assert name == "upload_folder"
    wanted = {"repo_id": "me/mine", "folder_path": tmp_path, "revision": "x", "commit_message": "VBoN"}
    assert keywords.items() >= wanted.items()
    assert "*.safetensors" in keywords["delete_patterns"]
    HubTarget("me/mine", commit_message="Mine").upload(tmp_path, message="VBoN")
    assert api.calls[-1][2]["commit_message"] == "Mine"


def test_a_failed_upload_names_what_is_safe(api: FakeApi, tmp_path: Path) -> None:
    api.fails = "upload_folder"
    with pytest.raises(HubError, match=rf"safe in {tmp_path}.*says no.*`hf upload me/mine {tmp_path} \. --revision x`"):
        HubTarget("me/mine", revision="x").upload(tmp_path, message="VBoN")
