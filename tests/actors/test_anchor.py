"""The anchor: what it shares with the policy, how it follows it, and what it starts as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import save_tiny_model, tiny_gpt2, tiny_llama
from tests.models.setting import save_value_model
from tests.modules.setting import ALPHABET, make_data, make_files
from vbon_lightning.actors import Actors, ActorSpec, average_anchor, make_anchor, replace_anchor
from vbon_lightning.adapters import merged_copy
from vbon_lightning.models import ModelError, ModelSpec

TOKENS = torch.tensor([[1, 4, 5, 6, 7]])
POLICIES: dict[str, dict[str, Any]] = {
    "whole": {},
    "lora": {"lora": {"r": 2, "lora_alpha": 8}},
    "tilted": {"tilt": "value"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_files(tmp_path_factory.mktemp("files"))
    save_value_model(make_data(directory), directory / "value")
    return directory


@pytest.fixture(params=POLICIES)
def actors(request: Any, files: Path) -> Actors:
    options = dict(POLICIES[request.param])
    if "tilt" in options:
        options["tilt"] = str(files / options["tilt"])
    return Actors.load(ActorSpec(ModelSpec(str(files / "llama"), **options)))


def moved(policy: Any) -> None:
    """Train a policy a little."""
    with torch.no_grad():
        for index, parameter in enumerate(part for part in policy.parameters() if part.requires_grad):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def test_it_starts_as_the_reference_and_shares_what_is_frozen(actors: Actors) -> None:
    policy = actors.policy
    anchor = make_anchor(policy, actors.reference)
    with actors.as_reference() as reference:
        expected = logits(reference)
    assert torch.equal(logits(anchor), expected)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    frozen = {id(parameter) for parameter in policy.parameters() if not parameter.requires_grad}
    own = [parameter for parameter in anchor.parameters() if id(parameter) not in frozen]
    assert sum(part.numel() for part in own) == sum(part.numel() for part in trained), "no second copy of a base"
    assert not any(parameter.requires_grad for parameter in anchor.parameters())
    assert all(parameter.requires_grad for parameter in trained)
    assert anchor.training == policy.training
    moved(policy)
    assert torch.equal(logits(anchor), expected)
    assert (logits(policy) - expected).abs().max() > 1e-2


def test_replaced_it_is_the_policy_of_that_moment(actors: Actors) -> None:
    policy, anchor = actors.policy, make_anchor(actors.policy, actors.reference)
    moved(policy)
    replace_anchor(anchor, policy)
    then = logits(policy)
    assert torch.equal(logits(anchor), then)
    moved(policy)
    assert torch.equal(logits(anchor), then)
    assert not torch.equal(logits(policy), then)


def test_averaged_it_goes_a_part_of_the_way(actors: Actors) -> None:
    policy, anchor = actors.policy, make_anchor(actors.policy, actors.reference)
    moved(policy)
    before = [parameter.clone() for parameter in anchor.parameters()]
    average_anchor(anchor, policy, 0.25)
    changed = 0
    for start, now, ours in zip(before, anchor.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * start + 0.25 * ours.detach())
        changed += int(not torch.equal(now, start))
    assert changed == sum(parameter.requires_grad for parameter in policy.parameters())
    average_anchor(anchor, policy, 1.0)
    assert torch.equal(logits(anchor), logits(policy))


def test_a_second_set_of_adapters_is_a_whole_model(files: Path) -> None:
    """Replaced and averaged, it says what a plain model with the same weights does."""
    actors = Actors.load(ActorSpec(ModelSpec(str(files / "llama"), **POLICIES["lora"])))
    policy, anchor = actors.policy, make_anchor(actors.policy, actors.reference)
    moved(policy)
    replace_anchor(anchor, policy)
    torch.testing.assert_close(logits(anchor), logits(merged_copy(policy)), atol=1e-5, rtol=1e-5)
    moved(policy)
    average_anchor(anchor, policy, 0.5)
    torch.testing.assert_close(logits(anchor), logits(merged_copy(anchor)), atol=1e-5, rtol=1e-5)
    with actors.as_reference() as reference:  # switching the policy's adapters off leaves the anchor's on
        assert (logits(anchor) - logits(reference)).abs().max() > 1e-2


def test_a_reference_of_its_own_is_what_it_starts_as(files: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", alphabet=ALPHABET, seed=8)
    actors = Actors.load(ActorSpec(str(files / "llama"), reference=other))
    anchor = make_anchor(actors.policy, actors.reference)
    assert actors.reference is not None
    assert torch.equal(logits(anchor), logits(actors.reference))
    assert not torch.equal(logits(anchor), logits(actors.policy))


def test_a_reference_of_another_kind_is_refused() -> None:
    for policy, reference in ((tiny_llama(), tiny_gpt2()), (tiny_llama(), tiny_llama(hidden_size=32))):
        with pytest.raises(ModelError, match=r"an anchor starts as the reference .* leave data\.reference out"):
            make_anchor(policy, reference)


def test_without_one_the_reference_takes_its_place(actors: Actors) -> None:
    with actors.as_reference() as reference:
        expected = logits(reference)
    with actors.as_anchor() as anchor:
        assert torch.equal(logits(anchor), expected)
    moved(actors.policy)
    actors.anchor = make_anchor(actors.policy, None)
    with actors.as_anchor() as anchor:
        assert anchor is actors.anchor
