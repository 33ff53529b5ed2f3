"""What the tests of models share."""

from __future__ import annotations

import pytest

from tests import helpers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return helpers.save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")
