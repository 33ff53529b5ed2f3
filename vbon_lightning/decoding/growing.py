"""Responses that are judged while they are made, and dropped or branched by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vbon_lightning.actors import Actors
from vbon_lightning.decoding.base import Decoded, DecodingCost
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.sampling.decode import Growing, caching, reader_of
from vbon_lightning.sampling.request import check_request
from vbon_lightning.types import PromptBatch, Responses, select_prompts


class Grove:
    """G groups of n responses a prompt in the making, with the rewards that they have so far.

    Rows stand prompt by prompt and group by group, as many in each group as in any other. A whole response's reward is
    asked for once; that of one that goes on is as if it ended here, without the penalty for a missing end.

    Args:
        actors: Loaded models.
        prompts: B prompts.
        growing: The B G n rows.
        groups: G, groups a prompt.
    """

    def __init__(self, actors: Actors, prompts: PromptBatch, growing: Growing, groups: int) -> None:
        self.actors, self.prompts, self.growing = actors, prompts, growing
        self.groups, self.reward_calls, self.value_tokens = groups, 0, 0
        self._rewards = torch.full(growing.finished.shape, torch.nan, device=growing.tokens.device)
        self._whole = torch.zeros_like(growing.finished)  # whose reward is known for good

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return B, G and n as it is now."""
        return len(self.prompts.text), self.groups, -1

    def rewards(self) -> Tensor:
        """Score the rows that have changed, and return the rewards of all ``[B, G, n]``; NaN where one has none."""
        growing, actors = self.growing, self.actors
        rows = (~self._whole).nonzero().squeeze(-1)
        if len(rows):
            whole = growing.finished | (growing.length == growing.longest)
            found = Responses(growing.tokens[rows, None, : growing.length], growing.mask[rows, None, : growing.length])
            a_prompt = len(growing.tokens) // len(self.prompts.text)
            some = select_prompts(self.prompts, (rows // a_prompt).tolist())
            ids = actors.token_ids(found)
            ended = growing.finished | ~whole  # what goes on was not cut
            self._rewards[rows] = actors.score(some, actors.decode(ids, some), ids, ended[rows, None]).squeeze(-1)
            self._whole = whole
            self.reward_calls += len(rows)
        return self._rewards.view(self.shape)

    def responses(self) -> Responses:
        """Return the responses so far, ``[B, G n, t]``."""
        found = self.growing.completions()
        return Responses(found.tokens, found.mask)

    def select(self, places: Tensor, *, own_noise: bool = True) -> None:
        """Go on with some rows of each group, or copies of them.

        Args:
            places: ``[B, G, m]`` long: places within the groups.
            own_noise: Whether a row takes the noise of its later tokens with it, or finds that of its new place.
        """
        rows = self._rows(places)
        self._rewards, self._whole = self._rewards[rows], self._whole[rows]
        self.growing.select(rows, own_noise=own_noise)

    def chosen(self, places: Tensor, *, kl_bound: float | None) -> Decoded:
        """Return one response of each group as decoded, all of them whole.

        Args:
            places: ``[B, G]`` long.
            kl_bound: An upper bound of the KL of what was chosen; None for Best-of-N itself, whose KL is known.
        """
        growing, rows = self.growing, self._rows(places[..., None])
        shape = (*places.shape, growing.length)
        return Decoded(
            tokens=growing.tokens[rows, : growing.length].view(shape),
            mask=growing.mask[rows, : growing.length].view(shape),
            finished=growing.finished[rows].view(places.shape),
            token_kl=None,
            cost=DecodingCost(int(growing.generated), self.value_tokens, self.reward_calls),
            rewards=self._rewards[rows].view(places.shape) if self.reward_calls else None,
            kl_bound=kl_bound,
        )

    def _rows(self, places: Tensor) -> Tensor:
        groups = places.shape[0] * places.shape[1]
        in_group = len(self.growing.tokens) // groups
        return (torch.arange(groups, device=places.device)[:, None] * in_group + places.flatten(0, 1)).flatten()


@contextmanager
def grove(actors: Actors, prompts: PromptBatch, *, n: int, key: NoiseKey) -> Iterator[Grove]:
    """Begin n responses of the policy for each that is to be chosen, with the noise that its samples have.

    Args:
        actors: Loaded models.
        prompts: B prompts.
        n: Rows a group.
        key: How many are to be chosen for a prompt, and their noise.
    """
    noise = actors.noise(prompts, **key.of_each(n)._asdict())
    request = actors.request(prompts, noise)
    check_request(actors.policy, request)
    limit: int | None = getattr(actors.sampler, "max_rows", None)
    if limit is not None and (rows := len(prompts.text) * key.num_samples * n) > limit:
        raise ValueError(
            f"data.max_rows is {limit}, and {rows} rows were asked for at once: a decoder that makes a response of n "
            "rows says so (`rows = n`), and gets as few prompts and responses at a time as that takes"
        )
    with torch.no_grad(), caching(actors.policy):
        yield Grove(actors, prompts, Growing(reader_of(actors.policy, request), request), key.num_samples)


def checkpoints(length: int, every: int) -> list[int]:
    """Return the lengths at which responses are judged before they are whole: each multiple, below the longest.

    Args:
        length: The longest response.
        every: Tokens between two.
    """
    return list(range(every, length, every))


def check_every(every: int, length: int, *, instead: str) -> None:
    """Refuse an interval at which no response would be judged before it is whole.

    Args:
        every: Tokens between two.
        length: The longest response.
        instead: What it would be then, and how to ask for that.

    Raises:
        ValueError: If there is no checkpoint.
    """
    if not checkpoints(length, every):
        raise ValueError(
            f"every is {every}, and a response has at most {length} tokens: nothing would be judged on the way. Give a "
            f"smaller every, or ask for {instead}"
        )
