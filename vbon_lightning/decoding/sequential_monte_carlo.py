"""Sequential Monte Carlo steering: particles that are resampled by what their prefixes promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vbon_lightning.actors import Actors
from vbon_lightning.checks import check_without_effect
from vbon_lightning.decoding.base import Decoded, Decoder
from vbon_lightning.decoding.growing import Grove, check_every, checkpoints, grove
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.decoding.options import check_counts
from vbon_lightning.functional import effective_samples, particle_weights, systematic_resampling
from vbon_lightning.functional._validate import check_real
from vbon_lightning.sampling import prompt_noise
from vbon_lightning.sampling.decode import choose_tokens
from vbon_lightning.types import PromptBatch


class SequentialMonteCarlo(Decoder):
    r"""Grow n particles, resample them every few tokens by a twist of the reference, and return one by its weight.

    A. K. Lew et al., "Sequential Monte Carlo Steering of Large Language Models using Probabilistic Programs" (2023);
    S. Zhao et al., "Probabilistic Inference in Language Models via Twisted Sequential Monte Carlo" (2024). A particle's
    weight is what its twist :math:`\psi(y_{\le t})` has become since the last resampling. As n grows the responses come
    to have the distribution ``ref psi(y)``, normalised. With the twist ``reward`` that is :math:`\exp(r / \lambda)`, of
    the response so far and in the end of the whole, the optimum of KL-regularised RL; with ``value`` it is the value
    model's :math:`W_N`, that of Best-of-N, and no reward is called. One particle is a sample of the policy; without
    resampling the twist ``reward`` is Soft Best-of-N, of the same responses.

    Args:
        n: Particles.
        twist: ``reward`` or ``value``.
        temperature: lambda of the reward's twist, in the reward's units, up to ``.inf``: no twist.
        aim: N of the Best-of-N that the value model's twist aims at, > 1; n by default.
        every: Tokens from one resampling to the next, fewer than a response may have.
        threshold: Resample where the effective number of particles is below this share of n; 0 for never.
        resampling: ``systematic``, or ``multinomial``: independent draws.
        amortised: Predict the distribution of the prompt's rewards instead of reading it from the reference table.
    """

    def __init__(
        self,
        n: int = 8,
        twist: Literal["reward", "value"] = "reward",
        temperature: float = 1.0,
        aim: float | None = None,
        every: int = 4,
        threshold: float = 0.5,
        resampling: Literal["systematic", "multinomial"] = "systematic",
        amortised: bool = False,
    ) -> None:
        check_counts(n=n, every=every)
        if twist not in ("reward", "value"):
            raise ValueError(f"twist must be reward or value, got {twist!r}")
        if resampling not in ("systematic", "multinomial"):
            raise ValueError(f"resampling must be systematic or multinomial, got {resampling!r}")
        if temperature != math.inf:
            check_real("temperature", temperature, above=0)
        if aim is not None:
            check_real("aim", aim, above=1)
        check_real("threshold", threshold, at_least=0, at_most=1)
        of_a_twist = {"temperature": temperature} if twist == "value" else {"aim": aim, "amortised": amortised}
        check_without_effect(type(self), f"twist={twist}", of_a_twist)
        if threshold == 0:
            check_without_effect(type(self), "threshold=0", {"every": every, "resampling": resampling})
        elif threshold * n <= 1 < n:
            raise ValueError(
                f"threshold={threshold:g} of n={n} is at most one particle, and there are never fewer: raise it, or "
                "set it to 0 for never resampling"
            )
        self.n: int = n
        self.twist, self.temperature, self.aim, self.every = twist, temperature, aim, every
        self.threshold, self.resampling, self.amortised, self.rows = threshold, resampling, amortised, n
        self.needs_reward, self.needs_value_model = twist == "reward", twist == "value"
        self.reads_table = twist == "value" and not amortised

    def check_fits(self, *, longest: int, max_rows: int | None) -> None:
        """Refuse to resample no particle before it is whole as well."""
        super().check_fits(longest=longest, max_rows=max_rows)
        if self.threshold and self.n > 1:
            check_every(self.every, longest, instead="one of n by its weight, which is threshold: 0")

    def decode(self, actors: Actors, prompts: PromptBatch, key: NoiseKey) -> Decoded:
        """Choose G responses a prompt."""
        identities = prompts.index.tolist()
        # Nothing to resample by: a plain sample, unless those without a reward are passed over.
        plain = self.twist == "reward" and self.temperature == math.inf and not actors.reward_calls.skips
        resampled = self.threshold and self.n > 1 and not plain
        stops = checkpoints(actors.max_new_tokens, self.every) if resampled else []
        few = self.threshold * self.n * (1 - 1e-9)  # rounding alone does not make equal weights unequal
        with grove(actors, prompts, n=self.n, key=key) as particles:
            device, log_twist = particles.growing.tokens.device, self._log_twist(actors, particles)
            luck = prompt_noise(
                identities, length=max(1, len(stops)) * self.n, **key.apart("resampling")._asdict()
            ).view(*particles.shape[:2], -1, self.n)
            before = torch.zeros(*particles.shape[:2], self.n, dtype=torch.float64, device=device)
            for number, length in enumerate(stops):
                particles.growing.grow(length)
                now = log_twist()
                due = (effective_samples(now - before) < few)[..., None]
                drawn = self._resampled(particle_weights(now - before), luck[:, :, number].to(device))
                places = torch.where(due, drawn, torch.arange(self.n, device=device))
                before = torch.where(due, now.gather(-1, places), before)
                particles.select(places, own_noise=False)
            particles.growing.grow()
            weights = particle_weights(log_twist() - before).flatten(0, 1)
            choice = prompt_noise(identities, length=1, **key.apart("choice")._asdict())
            chosen, _ = choose_tokens(weights.log(), choice.to(device).flatten(0, 1), 1.0)
            # Each resampling makes a particle stand in n places at the most.
            bound = 0.0 if plain else (1 + len(stops)) * math.log(self.n)
            return particles.chosen(chosen.view(particles.shape[:2]), kl_bound=bound)

    def _log_twist(self, actors: Actors, particles: Grove) -> Callable[[], Tensor]:
        """Return what says log psi of the particles as they are, ``[B, G, n]`` float64."""
        if self.twist == "reward":
            return lambda: (particles.rewards().double() / self.temperature).nan_to_num(nan=-math.inf)
        scorer, prompts = actors.value, particles.prompts
        assert scorer is not None
        known = None if self.amortised else prompts.reference_rewards
        log_cdf = scorer.log_cdf(prompts, known)
        if known is None:
            particles.value_tokens += int(prompts.mask.sum())
        aim = self.n if self.aim is None else self.aim
        log_weights = scorer.bon_log_weights(log_cdf, n=aim).to(prompts.tokens.device)

        def log_values() -> Tensor:
            responses = particles.responses()
            particles.value_tokens += int(prompts.mask.sum()) + int(responses.mask.sum())
            values = scorer.log_values(prompts, responses, log_weights)
            return values.gather(-1, responses.mask.sum(-1, keepdim=True)).view(particles.shape).double()

        return log_values

    def _resampled(self, weights: Tensor, uniforms: Tensor) -> Tensor:
        """Draw n places ``[B, G, n]`` by weights ``[B, G, n]``."""
        flat, noise = weights.flatten(0, 1), uniforms.flatten(0, 1)
        if self.resampling == "systematic":
            return systematic_resampling(flat, noise[:, 0], count=self.n).view(weights.shape)
        drawn, _ = choose_tokens(flat.log().repeat_interleave(self.n, dim=0), noise.reshape(-1, 1), 1.0)
        return drawn.view(weights.shape)
