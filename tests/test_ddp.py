"""Two processes learn what one learns from both their batches (gloo, on the CPU)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.setting import make_valued_files
from tests.modules import distributed
from tests.modules.setting import make_data
from tests.ranks import run_two
from vbon_lightning.reference_table import ReferenceTable

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_valued_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def together(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run everything over two processes, once."""
    directory = tmp_path_factory.mktemp("two")
    run_two("tests.modules.distributed", str(files), str(directory))
    return directory


@pytest.fixture(scope="module")
def alone(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a case in this process, once."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = distributed.fit(kind, files, tmp_path_factory.mktemp("one"), ranks=1)
        return made[kind]

    return get


def results(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True)[kind] for rank in range(2)]


@pytest.mark.parametrize("kind", list(distributed.CASES))
def test_two_ranks_learn_what_one_learns_from_twice_the_batch(kind: str, together: Path, alone: Any) -> None:
    expected = alone(kind)["weights"]
    for found in results(together, kind):
        assert list(found["weights"]) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-6, msg=name)


def test_the_comparison_sees_learning(files: Path, alone: Any, tmp_path: Path) -> None:
    start = torch.load(_first_checkpoint(files, tmp_path), weights_only=True)["state_dict"]
    moved = max(float((start[name] - value).abs().max()) for name, value in alone("vbon")["weights"].items())
    assert moved > 1e-2


def _first_checkpoint(files: Path, directory: Path) -> Path:
    from tests.modules.setting import make_module, make_trainer

    data = make_data(files)
    make_trainer(directory, steps=1).fit(make_module("vbon", data), data)
    return directory / "last.ckpt"


def test_ranks_draw_different_noise(together: Path, alone: Any) -> None:
    first, second = (found["tokens"] for found in results(together, "vbon"))
    assert first != second
    # Rank r has every second prompt of what one process has, with the same samples.
    assert _unpadded([row for pair in zip(first, second, strict=True) for row in pair]) == _unpadded(
        alone("vbon")["tokens"]
    )


def _unpadded(tokens: list[Any]) -> list[Any]:
    return [[" ".join(map(str, sample)).removesuffix(" 0" * sample.count(0)) for sample in row] for row in tokens]


@pytest.mark.parametrize("kind", ["vbon", "sft", "bonsft"])
def test_validation_over_an_uneven_batch(kind: str, together: Path, alone: Any) -> None:
    expected = alone(kind)["metrics"]
    assert expected
    for found in results(together, kind):
        assert found["metrics"] == pytest.approx(expected, abs=1e-5)


def test_two_ranks_write_the_table_that_one_writes(files: Path, together: Path, tmp_path: Path) -> None:
    distributed.predict(files, tmp_path, ranks=1)
    one, two = (ReferenceTable.open(directory / "table") for directory in (tmp_path, together))
    assert len(one) == 7
    assert sorted(one.keys()) == sorted(two.keys())
    for key in sorted(one.keys()):
        assert one.row(key) == two.row(key), "to the last digit: a prompt is sampled in the same company"
