"""Soft Best-of-N: draw n, keep one at random, better ones more often."""

from __future__ import annotations

import math

from vbon_lightning.actors import Actors
from vbon_lightning.decoding.base import Decoded, Decoder
from vbon_lightning.decoding.candidates import draw_groups, keep
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.decoding.options import check_counts
from vbon_lightning.functional import soft_selection_probs
from vbon_lightning.functional._validate import check_real
from vbon_lightning.sampling import prompt_noise
from vbon_lightning.sampling.decode import choose_tokens
from vbon_lightning.types import PromptBatch


class SoftBestOfN(Decoder):
    r"""Draw n responses from the policy and keep one, each with probability :math:`\propto \exp(r / \lambda)`.

    C. Mayrink Verdun et al., "Soft Best-of-n Sampling for Model Alignment" (2025). As n grows it comes to the optimum
    of KL-regularised RL at ``beta = temperature``; at temperature 0 it is Best-of-N, at infinity a sample of the
    policy.

    Args:
        n: Responses drawn for each that is kept, an integer >= 1.
        temperature: lambda, in the reward's units, from 0 to ``.inf``.
    """

    needs_reward = True

    def __init__(self, n: int = 4, temperature: float = 1.0) -> None:
        check_counts(n=n)
        if temperature != math.inf:
            check_real("temperature", temperature, at_least=0)
        self.n: int = n
        self.temperature = temperature

    def decode(self, actors: Actors, prompts: PromptBatch, key: NoiseKey) -> Decoded:
        """Choose G responses a prompt."""
        found = draw_groups(actors, prompts, n=self.n, key=key)
        probs = soft_selection_probs(found.rewards, temperature=self.temperature).flatten(0, 1)
        noise = prompt_noise(prompts.index.tolist(), length=1, **key.apart("choice")._asdict())
        chosen, _ = choose_tokens(probs.log(), noise.to(probs.device).flatten(0, 1), 1.0)
        # At infinity one of n at random, which is a sample, unless those without a reward are passed over.
        plain = self.temperature == math.inf and not actors.reward_calls.skips
        bound = 0.0 if plain else math.log(self.n) if self.temperature else None
        return keep(found, chosen.view(found.rewards.shape[:2]), kl_bound=bound)
