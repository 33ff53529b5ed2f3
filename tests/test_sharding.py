"""Sharded models against plain ones, in one process; tests/test_sharded_strategy.py has two."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import tiny_gpt2, tiny_llama
from tests.models.plain import TOKENS, logits
from tests.sharded import Around
from vbon_lightning import sharding
from vbon_lightning.adapters import add_lora
from vbon_lightning.models.tilted import new_tilted_lm
from vbon_lightning.sharding import Lockstep, is_part, is_sharded, plain_copy, remember_outline, shard, spread_state


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process that is a group of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def plain(kind: str) -> Any:
    """Make a model of one of the kinds that are sharded."""
    if kind == "gpt2":
        return tiny_gpt2(n_layer=2)
    if kind == "tied":
        return tiny_llama(num_hidden_layers=2, tie_word_embeddings=True)
    model = tiny_llama(num_hidden_layers=2)
    if kind == "lora":
        add_lora(model, {"r": 2})
    if kind == "tilted":
        tilted = new_tilted_lm(model, tiny_llama(seed=5).model)
        nn.init.normal_(tilted.heads[0].weight)
        tilted.turn(3.0)
        return tilted
    return model


KINDS = ["llama", "gpt2", "tied", "lora", "tilted"]
LAYERS = {"llama": 2, "gpt2": 2, "tied": 2, "lora": 2, "tilted": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_says_the_same_and_comes_back_whole(kind: str, mesh: Any) -> None:
    model = plain(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said, classes = logits(model), type(model)
    assert len(sharding._layers(model)) == LAYERS[kind]
    remember_outline(model)
    root = Around(model)
    shard(root, mesh)
    assert is_sharded(model)
    assert all(is_part(parameter) for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(root(logits), said)
        for parameter in model.parameters():
            parameter.mul_(1.5)
    changed = plain_copy(model)
    assert type(changed) is classes
    assert not is_sharded(changed)
    assert not any(is_part(parameter) for parameter in changed.parameters())
    found = changed.state_dict()
    assert list(found) == list(before)
    for name, value in before.items():
        factor = 1.5 if name in dict(model.named_parameters(remove_duplicate=False)) else 1.0
        assert torch.equal(found[name], factor * value), name
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in changed.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        assert torch.equal(logits(changed), root(logits))


def test_what_changes_beside_the_weights_is_copied(mesh: Any) -> None:
    model = plain("tilted")
    remember_outline(model)
    shard(Around(model), mesh)
    model.turn(7.0)
    model.config.calibration = [[2.0, 3.0]]
    changed = plain_copy(model)
    assert changed is not None
    assert (changed.n, changed.config.calibration) == (7.0, [[2.0, 3.0]])
    changed.turn(2.0)
    assert model.n == 7.0


def test_the_outline_has_no_weights(mesh: Any) -> None:
    model = plain("llama")
    remember_outline(model)
    outline = sharding._OUTLINES[model]
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in outline.buffers())


def test_whole_weights_are_taken_in(mesh: Any) -> None:
    model = plain("tied")
    other = {name: value + 1 for name, value in copy.deepcopy(model).state_dict().items()}
    shard(model, mesh)
    spread = spread_state(model, {**other, "strange": torch.ones(2)})
    assert all(is_part(spread[name]) for name in other)
    assert not is_part(spread["strange"])
    assert not is_part(spread_state(model, {"lm_head.weight": torch.ones(1)})["lm_head.weight"]), "of another shape"
    model.load_state_dict({name: spread[name] for name in other})
    found = sharding.whole(model.state_dict())
    assert all(torch.equal(found[name], value) for name, value in other.items())


def test_a_plain_model_is_left_as_it_is() -> None:
    model = plain("llama")
    state = model.state_dict()
    assert plain_copy(model) is model
    assert spread_state(model, state) is state
    assert sharding.whole({"a": [torch.ones(2), 3]})["a"][1] == 3


def test_layers_that_share_weights_stay_with_the_rest() -> None:
    model = plain("llama")
    first, second = model.model.layers
    second.mlp = first.mlp
    assert sharding._layers(model) == []
    second.mlp = copy.deepcopy(first.mlp)
    assert sharding._layers(model) == [first, second]


def test_matrices_may_be_of_lower_precision_than_their_gradients(mesh: Any) -> None:
    model = plain("llama")
    seen = []
    shard(model, mesh, param_dtype=torch.bfloat16)
    model.model.layers[0].mlp.register_forward_hook(lambda *given: seen.append(given[0].up_proj.weight.dtype))
    model(input_ids=TOKENS).logits.float().sum().backward()
    assert seen == [torch.bfloat16]
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_passes_without_a_gradient_leave_nothing_behind(mesh: Any) -> None:
    model = plain("llama")
    shard(model, mesh)
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=TOKENS)
    order = model._get_fsdp_state()._comm_ctx.post_forward_order
    assert order
    sharding.forget_passes(model)
    assert not order
    model(input_ids=TOKENS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_who_is_in_step_waits_and_who_is_not_does_not(mesh: Any) -> None:
    model = plain("llama")
    rows, none = torch.tensor([2, 5]), torch.tensor([], dtype=torch.long)
    for sharded in (False, True):
        if sharded:
            shard(model, mesh)
        lockstep = Lockstep(model)
        assert lockstep.together is sharded
        assert torch.equal(lockstep.rows_to_run(rows), rows)
        assert lockstep.rows_to_run(none) is None


def test_a_process_without_rows_runs_one_while_others_have_some(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain("llama")
    shard(model, mesh)
    monkeypatch.setattr(sharding, "most", lambda count, device: 4)
    assert Lockstep(model).rows_to_run(torch.tensor([], dtype=torch.long)).tolist() == [0]
