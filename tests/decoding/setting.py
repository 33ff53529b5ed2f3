"""A policy small enough to know the probability of every response, and rewards that tell all of them apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor

from tests.helpers import EOS, save_tiny_model
from tests.sampling.test_decode import batch_of
from vbon_lightning.actors import Actors, ActorSpec
from vbon_lightning.decoding import Decoded, Decoder
from vbon_lightning.rewards import RewardModel

Tokens = tuple[int, ...]
ALPHABET, SIZE = "ab", 5
PROMPT = [3, 4, 4]
OPTIONS: dict[str, Any] = {"seed": 3, "stream": "test", "step": 2}
REMEDY = "leave it out, or set that otherwise"


def score(ids: Sequence[int]) -> float:
    """Give every response another reward, one that its beginnings say little of."""
    return math.sin(7.0 * sum((place + 1.3) * (token + 1) ** 1.5 for place, token in enumerate(ids)))


class Told(RewardModel):
    """Scores token ids by :func:`score`, and remembers which were asked for.

    Args:
        silent: First tokens of responses of which it says nothing.
    """

    def __init__(self, silent: Sequence[int] = ()) -> None:
        self.silent, self.asked = silent, list[Tokens]()

    def __call__(self, prompts: Any, responses: Any, token_ids: Any) -> Tensor:
        self.asked += [tuple(ids) for rows in token_ids for ids in rows]
        return torch.tensor([[math.nan if ids[0] in self.silent else score(ids) for ids in rows] for rows in token_ids])

    def identity(self) -> dict[str, str]:
        return {"class": "Told"}


def save_models(directory: Path) -> Path:
    """Save a policy, one beside it, and one with other tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    save_tiny_model(directory / "policy", alphabet=ALPHABET, seed=1, spread=2.0)
    save_tiny_model(directory / "other", "gpt2", alphabet=ALPHABET, seed=5, spread=3.0)
    save_tiny_model(directory / "strange", alphabet="abc", seed=1)
    return directory


def load(directory: Path, length: int = 2, **changes: Any) -> Actors:
    spec: dict[str, Any] = {"policy": str(directory / "policy"), "reward": Told(), "max_new_tokens": length}
    actors = Actors.load(ActorSpec(**(spec | changes)), trainable=False, reference=False, value=True)
    actors.reference = actors.policy
    return actors


@torch.no_grad()
def next_probs(model: Any, response: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Return the probabilities of the token after the prompt and a response, from a plain pass."""
    logits = model(input_ids=torch.tensor([[*PROMPT, *response]]), use_cache=False).logits[0, -1]
    return (logits.double() / temperature).softmax(-1).tolist()


class Continuations:
    """The probability of every way that a response may go on, each prefix asked for once.

    Args:
        model: The policy.
        probs: What gives the probabilities after a response, if not the policy's plain pass.
    """

    def __init__(self, model: Any, probs: Callable[[Sequence[int]], list[float]] | None = None) -> None:
        self._probs = probs or (lambda response: next_probs(model, response))
        self._known: dict[Tokens, list[float]] = {}

    def after(self, response: Tokens, count: int) -> list[tuple[Tokens, float]]:
        """Return the responses with up to so many more tokens, and how likely they are."""
        if not count or (response and response[-1] == EOS):
            return [(response, 1.0)]
        if response not in self._known:
            self._known[response] = self._probs(response)
        return [
            (longer, first * rest)
            for token, first in enumerate(self._known[response])
            for longer, rest in self.after((*response, token), count - 1)
        ]

    def groups(self, begun: Sequence[Tokens], count: int) -> Iterator[tuple[list[Tokens], float]]:
        """Go through all that independent responses may become."""
        for found in product(*(self.after(response, count) for response in begun)):
            yield [response for response, _ in found], math.prod(probability for _, probability in found)


class Outcomes(dict[Tokens, float]):
    """Probabilities that add up."""

    def add(self, response: Tokens, probability: float) -> None:
        self[response] = self.get(response, 0.0) + probability


def decode(decoder: Decoder, actors: Actors, samples: int, **changes: Any) -> Decoded:
    return decoder(actors, batch_of([PROMPT]), num_samples=samples, **(OPTIONS | changes))


def decode_apart(decoder: Decoder, actors: Actors, samples: int) -> Decoded:
    """Decode one response to each of so many prompts that are the same, and lay them out as if they were one's.

    The noise of a prompt's first response is then all there is: what shares it with another choice shows.
    """
    found = decoder(actors, batch_of([PROMPT] * samples), num_samples=1, **OPTIONS)
    rows = {name: getattr(found, name).transpose(0, 1) for name in ("tokens", "mask", "finished")}
    return found._replace(**rows)


def assert_distributed(found: Decoded, expected: dict[Tokens, float]) -> None:
    """Compare responses to one prompt with the probabilities of all, by a chi-squared test."""
    assert math.isclose(sum(expected.values()), 1.0, rel_tol=1e-6)
    assert statistic(found, expected) < 1, "at most the 99.9% quantile"


def statistic(found: Decoded, expected: dict[Tokens, float]) -> float:
    """Return the chi-squared statistic as a share of its 99.9% quantile; rare responses count as one."""
    responses = [tuple(ids[mask].tolist()) for ids, mask in zip(found.tokens[0], found.mask[0], strict=True)]
    assert set(responses) <= set(expected), "what cannot be was decoded"
    counts = Outcomes()
    for response in responses:
        counts.add(response, 1)
    cells = [(counts.get(one, 0), share * len(responses)) for one, share in expected.items()]
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    if sum(wanted for _, wanted in rare) > 1:
        cells.append((sum(seen for seen, _ in rare), sum(wanted for _, wanted in rare)))
    total = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    return float(total / chi2.ppf(0.999, len(cells) - 1))
