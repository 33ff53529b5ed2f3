"""Inference-time pessimism: rejection sampling that trusts the reward only so far."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vbon_lightning.actors import Actors
from vbon_lightning.decoding.base import Decoded, Decoder, DecodingCost
from vbon_lightning.decoding.candidates import draw_groups, keep
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.decoding.options import check_counts
from vbon_lightning.functional import pessimistic_acceptance, pessimistic_level
from vbon_lightning.functional._validate import check_real
from vbon_lightning.sampling import prompt_noise
from vbon_lightning.types import PromptBatch, select_prompts


class InferenceTimePessimism(Decoder):
    r"""Accept the first fresh response whose reward stands out, as far as a chi-squared penalty lets it.

    A. Huang et al., "Is Best-of-N the Best of Them? Coverage, Scaling, and Optimality in Inference-Time Alignment"
    (2025). Of n responses it finds the level :math:`\lambda` at which the mean of :math:`\max((r - \lambda)/\beta, 0)`
    is 1. It then goes through up to n fresh responses, accepts each with the probability
    :math:`\min(\max(r - \lambda, 0) / (R_{max} - \lambda), 1)`, and returns the first that is accepted, or after n the
    next one, which is then no better than any. As beta grows it is a sample of the policy; as it vanishes only rewards
    near the highest are accepted.

    How often none of n is accepted the cost says (``fallbacks``). By the rewards of the n a fresh response is accepted
    with the probability :math:`\beta / (R_{max} - \lambda) \ge \beta / (\beta + R_{max} - \bar r)`: so that for fewer
    fallbacks than one in twenty n must be some three times :math:`1 + (R_{max} - \bar r) / \beta`. A response takes
    ``n + min(at_once, n)`` samples at the least and ``2 n + 1`` at the most.

    Args:
        n: Responses that the level is found by, and the most that are gone through.
        beta: The penalty's weight, in the reward's units, > 0.
        reward_max: R_max, which no reward exceeds; by default the highest reward of the n.
        at_once: Fresh responses that are drawn at a time: more take fewer passes and waste more.
    """

    needs_reward = True

    def __init__(self, n: int = 32, beta: float = 0.5, reward_max: float | None = None, at_once: int = 4) -> None:
        check_counts(n=n, at_once=at_once)
        check_real("beta", beta, above=0)
        if reward_max is not None:
            check_real("reward_max", reward_max)
        self.n: int = n
        self.beta, self.reward_max, self.at_once = beta, reward_max, at_once

    def decode(self, actors: Actors, prompts: PromptBatch, key: NoiseKey) -> Decoded:
        """Choose G responses a prompt."""
        begun = draw_groups(actors, prompts, n=self.n, key=key.apart("level"))
        known = begun.rewards
        level = pessimistic_level(known, beta=self.beta).flatten()
        best = self._bound(known).flatten()
        # For each that is to be chosen, what its fresh responses are made of, and what accepts them.
        longest, turns = actors.max_new_tokens, self.n + 1
        noise = actors.noise(prompts, **key.of_each(turns)._asdict()).view(-1, turns, longest)
        luck = prompt_noise(prompts.index.tolist(), length=turns, **key.apart("acceptance")._asdict()).flatten(0, 1)
        luck[:, -1] = -1.0  # whatever comes after n is taken
        # Where that has no reward it is one of the level's responses, the first that has one.
        spare = keep(begun, (~known.isnan()).int().argmax(-1), kl_bound=None)
        device, count = level.device, len(level)
        room = longest - spare.tokens.shape[-1]
        padding = actors.end_ids[0]
        tokens = torch.nn.functional.pad(spare.tokens, (0, room), value=padding).view(count, longest)
        mask = torch.nn.functional.pad(spare.mask, (0, room)).view(count, longest)
        assert spare.rewards is not None
        finished, rewards = spare.finished.flatten(), spare.rewards.flatten()
        generated, calls, accepting = spare.cost.generated_tokens, known.numel(), 0
        waiting, start = torch.arange(count, device=device), 0
        while len(waiting) and start < turns:
            stop = min(start + self.at_once, self.n if start < self.n else turns)
            places = waiting.tolist()
            some = select_prompts(prompts, [place // key.num_samples for place in places])
            drawn = actors.sampler(actors.policy, actors.request(some, noise[places, start:stop]))
            ids = actors.token_ids(drawn)
            scores = actors.score(some, actors.decode(ids, some), ids, drawn.finished)
            generated, calls = generated + int(drawn.mask.sum()), calls + scores.numel()
            self._check_highest(scores)
            probs = pessimistic_acceptance(scores, level[waiting], best[waiting], beta=self.beta)
            probs = torch.where(level[waiting, None].isnan(), 1.0, probs)  # without a level any reward will do
            accepted = (luck[places, start:stop].to(device) < probs) & ~scores.isnan()
            done, which = accepted.any(-1).nonzero().squeeze(-1), accepted.int().argmax(-1)[accepted.any(-1)]
            rows, width = waiting[done], drawn.tokens.shape[-1]
            tokens[rows], mask[rows] = padding, False
            tokens[rows, :width], mask[rows, :width] = drawn.tokens[done, which], drawn.mask[done, which]
            finished[rows], rewards[rows] = drawn.finished[done, which], scores[done, which]
            accepting += int((~level[rows].isnan()).sum()) if stop < turns else 0
            waiting, start = waiting[~accepted.any(-1)], stop
        shape = (len(known), key.num_samples)
        return Decoded(
            tokens=tokens.view(*shape, -1),
            mask=mask.view(*shape, -1),
            finished=finished.view(shape),
            token_kl=None,
            cost=DecodingCost(generated, 0, calls, fallbacks=count - accepting),
            rewards=rewards.view(shape),
            # It is one of n + 1 samples, whichever; or of the level's n, where a response may have no reward.
            kl_bound=math.log(turns + (self.n if actors.reward_calls.skips else 0)),
        )

    def _bound(self, rewards: Tensor) -> Tensor:
        """Return R_max ``[B, G]``."""
        highest = rewards.nan_to_num(nan=-math.inf).amax(-1)
        if self.reward_max is None:
            return highest
        self._check_highest(highest)
        return torch.full_like(highest, self.reward_max)

    def _check_highest(self, rewards: Tensor) -> None:
        """Refuse rewards above what was said to be the highest."""
        if self.reward_max is not None and bool((rewards > self.reward_max).any()):
            highest = float(rewards[rewards > self.reward_max].max())
            raise ValueError(
                f"reward_max is {self.reward_max:g}, and a response has the reward {highest:g}: give a number that no "
                "reward exceeds, or leave it out"
            )
