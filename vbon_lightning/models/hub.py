"""The Hugging Face Hub as a place to put an export."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from vbon_lightning.models.errors import ModelError, shorten

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
"""What an earlier upload may have left: weights in other shards would be loaded in place of the new ones."""


class HubError(ModelError):
    """A repository of the hub that cannot be written to."""


@dataclass
class HubTarget:
    """Where on the Hugging Face Hub an export goes; the token is that of ``HF_TOKEN`` or of ``hf auth login``.

    Args:
        repo_id: The repository, ``organisation/name``; made where it does not exist.
        private: Whether a repository that is made is private; by default as the organisation has it.
        revision: Branch to commit to, made where it does not exist; the main one by default.
        commit_message: Title of the commit; by default it says method and steps.

    Raises:
        HubError: For a name that no repository can have.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    commit_message: str | None = None

    def __post_init__(self) -> None:
        """Refuse a name that no repository can have."""
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise HubError(f"push_to_hub: {self.repo_id!r} is no repository's name: {shorten(error)}") from error

    def prepare(self) -> None:
        """See that there is a token and that it may write, and make the repository: before anything expensive.

        Raises:
            HubError: If not.
        """
        api = HfApi()
        try:
            api.whoami()
        except Exception as error:  # no token, a wrong one, no way there: the client raises many types
            raise HubError(
                f"push_to_hub: cannot log in to the hub to write to {self.repo_id!r}: set HF_TOKEN to a token that may "
                f"write, or run `hf auth login` ({shorten(error)})"
            ) from error
        try:
            api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            if self.revision is not None:
                api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        except Exception as error:  # as above
            raise HubError(
                f"push_to_hub: cannot write to {self.repo_id!r}: see that the name is right and that the token may "
                f"write there ({shorten(error)})"
            ) from error

    def upload(self, directory: str | os.PathLike[str], *, message: str) -> str:
        """Upload a whole directory in one commit, which replaces weights that are there, and return its address.

        Args:
            directory: The export.
            message: Title of the commit where the target has none.

        Raises:
            HubError: If it fails; the directory is as it was.
        """
        try:
            commit = HfApi().upload_folder(
                repo_id=self.repo_id,
                folder_path=Path(directory),
                revision=self.revision,
                commit_message=self.commit_message or message,
                delete_patterns=_WEIGHTS,
            )
        except Exception as error:  # as above
            where = "" if self.revision is None else f" --revision {self.revision}"
            raise HubError(
                f"the export is safe in {directory}, but it could not be uploaded to {self.repo_id!r} "
                f"({shorten(error)}): `hf upload {self.repo_id} {directory} .{where}` does it later"
            ) from error
        return str(commit.commit_url)


def as_hub_target(target: str | Mapping[str, Any] | HubTarget | None) -> HubTarget | None:
    """Take a repository's name, or what :class:`HubTarget` takes."""
    if target is None or isinstance(target, HubTarget):
        return target
    return HubTarget(target) if isinstance(target, str) else HubTarget(**target)
