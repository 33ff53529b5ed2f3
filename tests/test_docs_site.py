"""The documentation's site: complete, and with nothing loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import vbon_lightning

ROOT = Path(__file__).parents[1]


def tool(name: str, needs: str) -> ModuleType:
    pytest.importorskip(needs)
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def navigation(entries: list[Any]) -> list[str]:
    """Return the pages of a navigation tree."""
    found: list[str] = []
    for entry in entries:
        (value,) = entry.values()
        found += [value] if isinstance(value, str) else navigation(value)
    return found


def test_every_guide_is_in_the_navigation() -> None:
    listed = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(listed)
    assert {f"reference/{path.name}" for path in (ROOT / "docs/reference").glob("*.md")} <= set(listed)


def test_the_reference_has_all_public_names() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    parts = {f"vbon_lightning.{name}" for name in vbon_lightning._HOMES.values()}
    missing = {part for part in parts if f"::: {part}\n" not in pages}
    assert missing == {"vbon_lightning.actors"}  # a record that the data module makes


def test_links_are_rewritten() -> None:
    pages = tool("pages", "mkdocs")
    assert pages.rewritten("[a](docs/models.md#x) [b](CONTRIBUTING.md) [c](https://x.org)", "README.md") == (
        "[a](models.md#x) [b](repository/CONTRIBUTING.md) [c](https://x.org)"
    )
    assert pages.rewritten("![p](../benchmarks/README.md)", "docs/models.md") == "![p](repository/benchmarks/README.md)"
    assert pages.rewritten("[r](../README.md)", "docs/tldr/README.md".replace("tldr/", "")) == "[r](index.md)"
    assert pages.rewritten("[s](results/growth.md)", "benchmarks/README.md") == "[s](results/growth.md)"
    # What does not exist stays as it is, for the build to complain about; so do code and what is above the repository.
    for text in ("[x](docs/nowhere.md)", "```\n[a](docs/models.md)\n```", "[y](../../etc/passwd)"):
        assert pages.rewritten(text, "README.md") == text
    assert pages.links("[a](docs/models.md#x) [b](#here)", "README.md") == ["docs/models.md"]


def test_roles_become_code() -> None:
    roles = tool("roles", "griffe")
    assert roles.as_markdown("A :class:`~a.b.C` and :func:`f`, :math:`x_1`.") == "A `C` and `f`, `x_1`."


@pytest.mark.slow
def test_it_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for needed in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(needed)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "models.html", "repository/CONTRIBUTING.html", "repository/benchmarks/index.html"} <= set(
        pages
    )
    assert "log_ratio_floor" in pages["reference/modules.html"] and ":class:" not in "".join(pages.values())
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]+src=\"https?:|<link[^>]+rel=\"(?:stylesheet|preconnect)[^>]+https?:"
    )
    assert not [name for name, text in pages.items() if loaded.search(text)]
