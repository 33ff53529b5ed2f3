"""Files and spies of all these tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.setting import make_valued_files
from tests.modules.offline import TEMPERATURE
from tests.modules.wiring.setting import Spy


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"), temperature=TEMPERATURE)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], Spy]:
    def replace(owner: Any, name: str) -> Spy:
        watched = Spy(getattr(owner, name))
        monkeypatch.setattr(owner, name, watched)
        return watched

    return replace
