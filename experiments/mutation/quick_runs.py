"""The conftest of mutation runs: what makes thousands of short runs of pytest fast. Copied there by mutation.py."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models import setting as valued
from tests.modules import setting

QUICK = ("test_settings.py", "wiring")  # which notice most


def _copied(make: Callable[..., Any], *, part: str = ".") -> Callable[..., Any]:
    """Make files once, before any mutant is at work, and copy them from then on; see :func:`_prepare`."""
    if hasattr(make, "made"):
        return make
    made: dict[str, Path] = {}

    def copying(directory: Path, *given: Any, **changes: Any) -> Any:
        source = made.get(repr((given, sorted(changes.items()))))
        if source is None:
            return make(directory, *given, **changes)
        shutil.copytree(source / part, directory / part, dirs_exist_ok=True)
        return directory if part == "." else str(directory / part)

    copying.made, copying.make = made, make  # type: ignore[attr-defined]
    return copying


setting.make_files = valued.make_files = _copied(setting.make_files)
setting.make_table = valued.make_table = _copied(setting.make_table, part="table")
valued.make_valued_files = _copied(valued.make_valued_files)


def _prepare() -> None:
    """Make what most tests begin with, in the process that all runs are forked from."""
    made = setting.make_table.made  # type: ignore[attr-defined]
    if made or os.environ.get("MUTANT_UNDER_TEST"):
        return
    where = Path(tempfile.mkdtemp(prefix="mutation-"))
    valued_files, tables = valued.make_valued_files, setting.make_table
    for number, changes in enumerate(({}, {"temperature": 0.7})):
        root = where / f"valued-{number}"
        valued_files.make(root, **changes)  # type: ignore[attr-defined]
        valued_files.made[repr(((), sorted(changes.items())))] = root  # type: ignore[attr-defined]
        made[repr(((), sorted(changes.items())))] = root
    plain = where / "plain"
    setting.make_files.make(plain)  # type: ignore[attr-defined]
    setting.make_files.made[repr(((), []))] = plain  # type: ignore[attr-defined]
    for number, changes in enumerate(({"samples": 32}, {"max_new_tokens": 7})):
        root = where / f"table-{number}"
        setting.make_files(root)
        tables.make(root, **changes)  # type: ignore[attr-defined]
        made[repr(((), sorted(changes.items())))] = root


def pytest_configure(config: pytest.Config) -> None:
    """Know the mark of the plugin that is off."""
    config.addinivalue_line("markers", "filterwarnings: which warnings a test may give")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of one file together, or its fixtures would be made again and again.

    Where all run the quick ones have passed before: those that are named as the changed file come first, they last.
    """
    files = {item.path: place for place, item in reversed(list(enumerate(items)))}
    first = {name: place for place, name in enumerate(QUICK)}
    only_quick = os.environ.get("MUTATION_QUICK_ONLY") == "1"
    own = f"test_{os.environ.get('MUTANT_UNDER_TEST', '').partition('.x')[0].rpartition('.')[2]}.py"

    def quickness(item: pytest.Item) -> int:
        return min(first.get(name, len(QUICK)) for name in (item.path.name, item.path.parent.name))

    def order(item: pytest.Item) -> tuple[bool, int, int]:
        quick = quickness(item)
        return item.path.name != own, quick if only_quick else -quick, files[item.path]

    items.sort(key=order)
    if only_quick:
        slow = [item for item in items if quickness(item) == len(QUICK)]
        items[:] = [item for item in items if quickness(item) < len(QUICK)]
        if slow:
            slow[0].config.hook.pytest_deselected(items=slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave to the runs that are forked from this process as little to do as there can be."""
    if any("modules" in item.path.parts[-3:] for item in session.items):
        _prepare()
    gc.freeze()  # what every run inherits need not be looked through by each
