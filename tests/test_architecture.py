"""Which part may import which: the arrows of the design, read from the source; and where the tests of each lie."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vbon_lightning

PACKAGE = Path(vbon_lightning.__file__).parent

LAYERS = [
    {
        "adapters",
        "functional",
        "finite",
        "paths",
        "_json_lines",
        "_markdown",
        "_visible",
        "checks",
        "whole_files",
        "sharding",
        "data.conversations",
        "data.readers",
    },
    {"types"},
    {
        *{"checkpoints", "loggers", "metrics", "models", "rewards", "sampling", "staging", "reference_table"},
        *{"data.sources", "data.dealing"},
    },
    {"data.encoding", "data.collating", "data.preparing", "data.duplicates", "prefix_scorer"},
    {"actors", "callbacks"},
    {"data.module", "decoding", "sharded_strategy"},
    {"data"},
    {"modules"},
    {"evaluation", "cli", "dialling", "commands"},
    {"__main__"},
]
"""The parts from the bottom up. A part imports parts of the layers below, or of its own without a cycle."""

TESTS = Path(__file__).parent

TESTED_ELSEWHERE = {
    "_json_lines.py": "data/test_readers.py",
    "actors/value_model.py": "models/test_value.py",
    "callbacks/reference_table_writer.py": "modules/test_reference_sampler.py",
    "callbacks/rollout_callback.py": "callbacks/test_rollout_metrics.py",
    "callbacks/reward_monitor.py": "callbacks/test_rollout_metrics.py",
    "commands/starting_config.py": "commands/test_init.py",
    "decoding/further_models.py": "decoding/test_base.py",
    "decoding/growing.py": "decoding/test_base.py",
    "decoding/options.py": "decoding/test_drawing.py",
    "dialling.py": "models/test_tilted.py",
    "evaluation/predicted.py": "evaluation/test_command.py",
    "functional/_validate.py": "functional/test_arguments.py",
    "models/errors.py": "models/test_files.py",
    "modules/experience.py": "modules/wiring/test_checkpoints.py",
    "modules/policy_gradient_options.py": "modules/test_options.py",
    "rewards/calling.py": "rewards/test_function.py",
    "rewards/per_response.py": "rewards/test_exact_match.py",
}
"""Modules without a test file of their own, and the one that tests them."""

NOTHING_TO_TEST = {"types.py"}
"""Modules that hold records alone."""

LIGHTNING = {
    "checkpoints",
    "data.module",
    "modules",
    "callbacks",
    "cli",
    "evaluation",
    "dialling",
    "commands",
    "loggers",
    "sharded_strategy",
}


ROOMS = {"data"}
"""Folders whose files are parts of their own, from the floor to the roof."""


def part(path: Path) -> str:
    """Return the name of the part that a file belongs to."""
    return part_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def part_of(module: str) -> str:
    """Return the name of the part that a module belongs to, ``data.sources`` or ``models.spec``."""
    first, *rest = module.removesuffix(".__init__").split(".")
    return f"{first}.{rest[0]}" if first in ROOMS and rest else first


FILES = sorted(path for path in PACKAGE.rglob("*.py"))
PARTS = sorted({part(path) for path in FILES} - {"__init__"})


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module))
            if node.module == "vbon_lightning":
                found |= {f"vbon_lightning.{alias.name}" for alias in node.names}
    return found


def used(name: str) -> set[str]:
    """Return the parts of this package that a part imports."""
    found: set[str] = set()
    for path in FILES:
        if part(path) == name:
            modules = [module for module in imports(path) if module.startswith("vbon_lightning.")]
            found |= {part_of(module.removeprefix("vbon_lightning.")) for module in modules}
    return found - {name, "__version__"}


def outside(name: str) -> set[str]:
    """Return the other packages that a part imports."""
    return {module.split(".")[0] for path in FILES if part(path) == name for module in imports(path)}


def layer(name: str) -> int:
    (found,) = [level for level, parts in enumerate(LAYERS) if name in parts]
    return found


def test_every_part_has_a_layer() -> None:
    assert sorted(name for parts in LAYERS for name in parts) == PARTS


@pytest.mark.parametrize("name", PARTS)
def test_arrows_run_downwards(name: str) -> None:
    assert not {other for other in used(name) if layer(other) > layer(name)}


def test_there_is_no_cycle() -> None:
    left = {name: used(name) for name in PARTS}
    while left:
        free = {name for name, others in left.items() if not others & set(left)}
        assert free, f"these import each other: {left}"
        left = {name: others for name, others in left.items() if name not in free}


def test_the_maths_needs_torch_only() -> None:
    assert outside("functional") - set(sys.stdlib_module_names) <= {"torch", "vbon_lightning"}
    assert not used("functional")


def test_lightning_stays_in_its_parts() -> None:
    for name in PARTS:
        if name not in LIGHTNING:
            assert not outside(name) & {"lightning", "pytorch_lightning", "jsonargparse"}, name


def test_the_readers_see_what_they_are_to_forbid() -> None:
    assert "torch" in outside("functional")
    assert "lightning" in outside("modules")
    assert {"actors", "functional"} <= used("modules")


@pytest.mark.parametrize("module", ["vbon_lightning.functional", "vbon_lightning", "vbon_lightning.types"])
def test_the_maths_does_not_load_lightning(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'lightning', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names() -> None:
    for name in vbon_lightning.__all__:
        assert getattr(vbon_lightning, name).__name__ == name
        assert name in dir(vbon_lightning)
    with pytest.raises(AttributeError, match="no attribute 'VBON'"):
        _ = vbon_lightning.VBON


def mirror(path: Path) -> Path:
    """Return where the tests of a module lie."""
    module = path.relative_to(PACKAGE)
    return TESTS / module.parent / f"test_{module.name.removeprefix('_')}"


def test_every_module_has_a_test_file() -> None:
    modules = {path.relative_to(PACKAGE).as_posix(): path for path in FILES if not path.name.startswith("__")}
    without = {name for name, path in modules.items() if not mirror(path).is_file()}
    assert without == set(TESTED_ELSEWHERE) | NOTHING_TO_TEST
    assert not [name for name in TESTED_ELSEWHERE.values() if not (TESTS / name).is_file()]
