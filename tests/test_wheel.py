"""The wheel: what is in it, and that it works by itself, away from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import vbon_lightning

ROOT = Path(__file__).parents[1]


def run(*words: str, cwd: Path, path: Path | None = None) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it from a copy, so that nothing is written into the repository."""
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml's build-system asks
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "vbon_lightning", place / "vbon_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", "out", ".", cwd=place)
    (built,) = (place / "out").glob("*.whl")
    return built


@pytest.mark.slow
def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (message_from_bytes(archive.read(name)) for name in names if name.endswith("dist-info/METADATA"))
    assert metadata["Version"] == vbon_lightning.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert {f"vbon_lightning/{name}" for name in ("py.typed", "cli.py", "assets/demo_lm/model.safetensors")} <= set(
        names
    )
    assert {name.split("/")[0] for name in names} == {
        "vbon_lightning",
        f"vbon_lightning-{metadata['Version']}.dist-info",
    }


@pytest.mark.slow
def test_it_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    installed, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed), str(wheel), cwd=work)
    where = run("-c", "import vbon_lightning; print(vbon_lightning.__file__)", cwd=work, path=installed)
    assert where.startswith(str(installed))
    assert "Available subcommands" in run(str(installed / "bin" / "vbon"), "--help", cwd=work, path=installed)
    (work / "prompts.txt").write_text("".join(f"the film number {n} was good\n" for n in range(6)))
    starting = ("--policy", "package:vbon_lightning/assets/demo_lm", "--data", "prompts.txt", "--method", "sft")
    run("-m", "vbon_lightning", "init", *starting, cwd=work, path=installed)
    short = ("--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--trainer.accelerator", "cpu")
    run("-m", "vbon_lightning", "fit", "-c", "config.yaml", *short, cwd=work, path=installed)
    assert (work / "runs/sft/export/model.safetensors").is_file()
    assert f"| vbon-lightning | {vbon_lightning.__version__} |" in (work / "runs/sft/export/README.md").read_text()
