"""TreeBoN against all trees, by both partial scores, and with one layer."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoding.setting import (
    OPTIONS,
    PROMPT,
    REMEDY,
    Continuations,
    Outcomes,
    Tokens,
    assert_distributed,
    decode,
    load,
    next_probs,
    save_models,
    statistic,
)
from tests.decoding.setting import score as reward_of
from tests.helpers import EOS
from vbon_lightning.actors import Actors
from vbon_lightning.decoding import BestOfN, TreeBoN
from vbon_lightning.models import ModelError
from vbon_lightning.sampling import prompt_noise


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def actors(files: Path) -> Actors:
    return load(files, 3)


def expected_of(actors: Actors, partial: Any, *, temperature: float = 1.0) -> Outcomes:
    """Two nodes of a token (of the three there may be), the better one twice, or both where that has finished."""
    chances = Continuations(actors.policy, lambda response: next_probs(actors.policy, response, temperature))
    expected = Outcomes()
    for nodes, probability in chances.groups([()] * 2, 1):
        best, other = sorted(nodes, key=partial, reverse=True)
        for leaves in product(chances.after(best, 2), chances.after(other if best[-1] == EOS else best, 2)):
            chance = probability * math.prod(share for _, share in leaves)
            expected.add(max((response for response, _ in leaves), key=reward_of), chance)
    return expected


def test_its_distribution_by_a_partial_reward(actors: Actors) -> None:
    found = decode(TreeBoN(2, layers=2, branches=2), actors, 3000)
    assert_distributed(found, expected_of(actors, reward_of))
    assert statistic(found, expected_of(actors, lambda node: -reward_of(node))) > 3


def test_its_distribution_by_an_implicit_reward(files: Path) -> None:
    actors = load(files, 3, temperature=0.8)
    decoder = TreeBoN(2, layers=2, branches=2, preference_policy=str(files / "other"))
    found = decode(decoder, actors, 3000)
    preferring: Any = decoder.models[0].load(actors)

    def implicit(node: Tokens) -> float:
        ours, theirs = (next_probs(model, (), 0.8)[node[0]] for model in (actors.policy, preferring))
        return math.log(theirs / ours)

    assert_distributed(found, expected_of(actors, implicit, temperature=0.8))
    assert statistic(found, expected_of(actors, reward_of, temperature=0.8)) > 3


def test_three_layers_of_more_nodes_by_hand(files: Path) -> None:
    """Node by node with the noise that each place has: scores of longer prefixes, leaves, and what it costs."""
    decoder, samples = TreeBoN(4, layers=3, branches=2, preference_policy=str(files / "other")), 5
    actors: Any = load(files, 6)
    found = decode(decoder, actors, samples)
    preferring: Any = decoder.models[0].load(actors)

    def ratio(prefix: Tokens, token: int) -> float:
        return math.log(next_probs(preferring, prefix)[token] / next_probs(actors.policy, prefix)[token])

    noise = prompt_noise([0], num_samples=4 * samples, length=6, **OPTIONS)[0].view(samples, 4, 6).tolist()
    tokens, read, chosen = 0, 0, []
    for group in noise:
        nodes: list[Tokens] = [()] * 4
        for layer in range(3):
            for place in range(4):
                for at in (2 * layer, 2 * layer + 1):
                    if EOS not in nodes[place]:
                        probs = next_probs(actors.policy, nodes[place])
                        token = sum(sum(probs[: count + 1]) <= group[place][at] for count in range(4))
                        nodes[place], tokens = (*nodes[place], token), tokens + 1
            if layer < 2:
                read += sum(min(len(node), 2 * layer + 1) for node in nodes)  # the last one's place says nothing more
                scores = [sum(ratio(node[:k], node[k]) / (k + 1) for k in range(len(node))) for node in nodes]
                dealt: list[int] = []
                for place in sorted(range(4), key=lambda place: -scores[place]):
                    dealt += [place] * (1 if EOS in nodes[place] else 2)
                nodes = [nodes[place] for place in sorted(dealt[:4])]
        chosen.append(max(nodes, key=reward_of))
    assert [tuple(ids) for ids in actors.token_ids(found)[0]] == chosen
    assert found.cost[:3] == (tokens, read + 2 * len(PROMPT), 4 * samples)
    assert len(actors.reward.asked) == 4 * samples, "the reward judges whole responses alone"
    assert found.kl_bound == pytest.approx(math.log(4 * 2 * 2))


def test_with_one_layer_it_is_best_of_n(actors: Actors) -> None:
    ours, theirs = (decode(one, actors, 50) for one in (TreeBoN(4, layers=1), BestOfN(4)))
    for name in ("tokens", "mask", "finished", "rewards"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.cost[:3] == theirs.cost[:3] and ours.kl_bound is None


@pytest.mark.parametrize("options", [{"n": 3, "layers": 1}, {"n": 1, "layers": 2}, {"n": 1}])
def test_where_nothing_is_branched_any_n_will_do(options: dict[str, int], files: Path) -> None:
    actors = load(files, 4)
    ours, theirs = (decode(one, actors, 50) for one in (TreeBoN(**options), BestOfN(options["n"])))
    assert torch.equal(ours.tokens, theirs.tokens) and ours.kl_bound is None


def test_without_branches_it_is_best_of_n(files: Path) -> None:
    actors = load(files, 4)
    ours, theirs = (decode(one, actors, 50) for one in (TreeBoN(4, branches=1), BestOfN(4)))
    assert torch.equal(ours.tokens, theirs.tokens) and ours.kl_bound is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an integer >= 1, got 0"),
        ({"layers": 0}, "layers must be an integer >= 1, got 0"),
        ({"branches": 1.5}, "branches must be an integer >= 1, got 1.5"),
        ({"n": 9, "branches": 2}, "n must be a multiple of branches, which 9 is not of 2"),
        ({"layers": 1, "branches": 4}, f"branches=4 has no effect with layers=1: {REMEDY}"),
        ({"layers": 1, "preference_policy": "a"}, f"preference_policy=a has no effect with layers=1: {REMEDY}"),
        ({"branches": 1, "layers": 2}, f"layers=2 has no effect with branches=1: {REMEDY}"),
        ({"branches": 1, "preference_policy": "a"}, f"preference_policy=a has no effect with branches=1: {REMEDY}"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TreeBoN(**options)


def test_more_layers_than_tokens(actors: Actors) -> None:
    with pytest.raises(ValueError, match="^layers is 4, and a response has at most 3 tokens: ask for fewer$"):
        decode(TreeBoN(4, layers=4), actors, 1)


def test_a_preference_policy_of_other_tokens(files: Path, actors: Actors) -> None:
    with pytest.raises(ModelError, match="^the decoder's preference_policy '.*strange': it and the model that is dec"):
        decode(TreeBoN(4, layers=2, preference_policy=str(files / "strange")), actors, 1)
