"""How many reference rewards a method asks for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.modules.fake import FakeTrainer
from vbon_lightning.modules.reference_rewards import check_cdf_estimator, check_reference_rewards


def asking(reference_samples: int = 0, uses_value_model: bool = False, **data: Any) -> Any:
    """Stand for a module in its trainer."""
    module = SimpleNamespace(reference_samples=reference_samples, uses_value_model=uses_value_model)
    known = SimpleNamespace(**data) if data else None
    return SimpleNamespace(**vars(module), trainer=FakeTrainer(datamodule=known))


@pytest.mark.parametrize(
    ("samples", "prior", "said"),
    [(7, 0.0, "fewer than n = 8"), (4, 3.5, "fewer than n = 8"), (8, 0.0, "M of at least 4 n"), (4, 4.0, "M of at le")],
)
def test_too_few(samples: int, prior: float, said: str, recwarn: pytest.WarningsRecorder) -> None:
    module = asking(samples)
    if said.startswith("fewer"):
        with pytest.raises(ValueError, match=rf"^model.reference_samples has M = {samples} reference rewards.*{said}"):
            check_reference_rewards(module, n=8, none="none", prior_samples=prior)
    else:
        check_reference_rewards(module, n=8, none="none", prior_samples=prior)
        assert said in str(recwarn.list[0].message)


def test_enough(recwarn: pytest.WarningsRecorder) -> None:
    check_reference_rewards(asking(32), n=8, none="none")
    check_reference_rewards(asking(16), n=8, none="none", prior_samples=16.0)
    check_reference_rewards(asking(), n=8, none="none")  # without a data module there is nothing to look at
    check_reference_rewards(asking(other=1), n=8, none="none")
    check_reference_rewards(asking(uses_value_model=True, table=None, reference_table=None), n=8, none="none")
    check_reference_rewards(asking(table=None, reference_table="here", reference_rewards=32), n=8, none="none")
    assert not recwarn.list


def test_a_table_is_named_and_so_is_its_absence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^the reference table there has M = 2 reference rewards a prompt"):
        check_reference_rewards(asking(table=None, reference_table="there", reference_rewards=2), n=8, none="none")
    with pytest.raises(ValueError, match="^name a table$"):
        check_reference_rewards(asking(table=None, reference_table=None), n=8, none="name a table")


def test_estimators() -> None:
    for known in ("jeffreys", "add_one", "laplace", "digamma"):
        check_cdf_estimator(known)
    with pytest.raises(
        ValueError, match="^model.cdf_estimator must be one of jeffreys, add_one, laplace, digamma; got"
    ):
        check_cdf_estimator("x")
