"""Best-of-N token by token, guided by a value model: nothing is thrown away, and no reward is called."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from vbon_lightning.actors import Actors
from vbon_lightning.decoding.base import Decoded, Decoder, DecodingCost
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.functional import (
    Candidates,
    Teacher,
    candidate_teacher,
    draw_candidates,
    predicted_log_cdf,
    prefix_log_values,
    teacher_probs,
)
from vbon_lightning.functional.sequences import scaled_logits
from vbon_lightning.sampling import prompt_noise
from vbon_lightning.sampling.decode import bounded_rows, caching, choose_tokens, prefill
from vbon_lightning.sampling.distilling import join_candidates
from vbon_lightning.sampling.lookahead import extend_trunk, look_ahead_one, prompt_trunk
from vbon_lightning.sampling.memory import note_cache
from vbon_lightning.sampling.request import check_request
from vbon_lightning.sampling.towers import note_read
from vbon_lightning.types import PromptBatch


class ValueGuided(Decoder):
    r"""Sample from :math:`\pi_{ref}(a \mid s) W_N(s a) / W_N(s)`, with W from a value model.

    With an exact value model and all tokens as candidates that is Best-of-N's own distribution. N is any real number
    above 1 and is chosen here: nothing is trained for it.

    Args:
        n: N of Best-of-N.
        top: Candidates a token: this many of the reference's most likely tokens.
        draws: And this many drawn from its other tokens, which stand for all of them. With 0 those are one, worth what
            the prefix is: what they add is then left to chance.
        amortised: Predict the distribution of the prompt's rewards instead of reading it from the reference table; as
            is done where a batch brings no reference rewards.
    """

    needs_value_model = True

    def __init__(self, n: float = 4.0, top: int = 16, draws: int = 16, amortised: bool = False) -> None:
        if isinstance(n, bool) or not isinstance(n, int | float) or not 1 < n < math.inf:
            raise ValueError(f"n must be a number > 1, got {n!r}")
        if top < 0 or draws < 0 or top + draws < 2:
            raise ValueError(f"top and draws must together name at least 2 candidates, got {top}, {draws}")
        self.n, self.top, self.draws, self.amortised = n, top, draws, amortised
        self.reads_table = not amortised

    def decode(self, actors: Actors, prompts: PromptBatch, key: NoiseKey) -> Decoded:
        """Sample G responses a prompt."""
        # Of each token one uniform to choose with, and those that draw its candidates.
        noise = prompt_noise(
            prompts.index.tolist(),
            length=actors.max_new_tokens * (1 + self.draws),
            **key._asdict(),
        ).view(len(prompts.text), key.num_samples, actors.max_new_tokens, 1 + self.draws)
        with actors.as_reference() as model:
            check_request(model, actors.request(prompts, noise[..., 0]))
            with caching(model):
                return self._decode(actors, model, prompts, noise)

    def _decode(self, actors: Actors, model: Any, prompts: PromptBatch, noise: Tensor) -> Decoded:
        scorer = actors.value
        assert scorer is not None
        rewards = None if self.amortised else prompts.reference_rewards
        batch, samples, length, _ = noise.shape
        rows, device = batch * samples, prompts.tokens.device
        trunk, states = prompt_trunk(scorer.model, prompts, samples)
        at_start = scorer.model.forecast(states, torch.tensor(0, device=device))
        log_cdf = predicted_log_cdf(at_start) if rewards is None else scorer.log_cdf(prompts, rewards)
        log_weights = scorer.bon_log_weights(log_cdf, n=self.n).to(device).repeat_interleave(samples, dim=0)
        state = prefix_log_values(at_start.repeat_interleave(samples, dim=0), log_weights)
        noise = noise.to(device).view(rows, length, -1)
        ends = torch.as_tensor(list(actors.end_ids), device=device)
        tokens = torch.full((rows, length), actors.end_ids[0], dtype=torch.long, device=device)
        mask = torch.zeros(rows, length, dtype=torch.bool, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        token_kl = torch.zeros(rows, length, dtype=torch.float32, device=device)
        cost = [0, int(prompts.mask.sum())]

        padded = not bool(prompts.mask.all())
        cache, logits = prefill(model, prompts.tokens, prompts.mask, padded)
        note_read(model, prompts.mask)
        cache.batch_repeat_interleave(samples)
        logits = logits.repeat_interleave(samples, dim=0)
        attended = prompts.mask.long().repeat_interleave(samples, dim=0)
        active = torch.arange(rows, device=device)
        for place in range(length):
            seen = torch.tensor(place, device=device)
            uniforms = noise[active, place]
            candidates = self._candidates(logits, uniforms[:, 1:], actors.temperature)
            ahead = look_ahead_one(scorer.model, trunk, attended, candidates.tokens)
            values = prefix_log_values(scorer.model.forecast(ahead, seen + 1), log_weights[active, None])
            teacher = candidate_teacher(candidates, values, state)
            chosen = self._choose(logits, candidates, teacher, uniforms[:, :1], actors.temperature)
            tokens[active, place], mask[active, place] = chosen, True
            token_kl[active, place] = teacher.tilt.clamp(min=0)
            finished[active] = torch.isin(chosen, ends)
            cost[0] += len(active)
            cost[1] += candidates.tokens.numel()
            keep = (~finished[active]).nonzero().squeeze(-1)
            if place + 1 == length or not len(keep):
                break
            if len(keep) < len(active):
                cache.batch_select_indices(keep)
                trunk.batch_select_indices(keep)
                active, chosen, attended = active[keep], chosen[keep], attended[keep]
            logits = _next_logits(model, cache, attended, chosen, padded)
            states = extend_trunk(scorer.model, trunk, attended, chosen[:, None])
            cost[1] += len(active)
            note_read(model, len(active))
            note_cache(cache)
            note_cache(trunk)
            attended = torch.nn.functional.pad(attended, (0, 1), value=1)
            state = prefix_log_values(scorer.model.forecast(states[:, 0], seen + 1), log_weights[active])
        width = place + 1
        shape = (batch, samples, width)
        return Decoded(
            tokens=tokens[:, :width].view(shape),
            mask=mask[:, :width].view(shape),
            finished=finished.view(batch, samples),
            token_kl=token_kl[:, :width].view(shape),
            cost=DecodingCost(cost[0], cost[1], 0),
        )

    def _candidates(self, logits: Tensor, uniforms: Tensor, temperature: float) -> Candidates:
        """Draw each row's candidates of its logits ``[N, V]``, so many rows at once that the memory is bounded."""
        parts = []
        for rows in bounded_rows(logits):
            log_reference = scaled_logits(logits[rows], temperature).log_softmax(-1)
            drawn = uniforms[rows] if self.draws else None
            parts.append(draw_candidates(log_reference, top=self.top, draws=self.draws, uniforms=drawn))
        return join_candidates(parts)

    def _choose(
        self, logits: Tensor, candidates: Candidates, teacher: Teacher, uniforms: Tensor, temperature: float
    ) -> Tensor:
        """Draw a token of the teacher's distribution for each row, ``[N]``."""
        if self.draws:  # none but the candidates can be chosen
            share = teacher.correction + candidates.log_mass.exp()
            place = choose_tokens(share.clamp(min=torch.finfo(share.dtype).tiny).log(), uniforms, 1.0)[0]
            return candidates.tokens.gather(-1, place).squeeze(-1)
        parts = []
        for rows in bounded_rows(logits):
            reference = scaled_logits(logits[rows], temperature).log_softmax(-1).exp()
            guided = teacher_probs(reference, candidates.tokens[rows], teacher.correction[rows], teacher.scale[rows])
            floored = guided.clamp(min=torch.finfo(guided.dtype).tiny).log()
            parts.append(choose_tokens(floored, uniforms[rows], 1.0)[0].squeeze(-1))
        return torch.cat(parts)


def _next_logits(model: Any, cache: Cache, attended: Tensor, tokens: Tensor, padded: bool) -> Tensor:
    whole = torch.nn.functional.pad(attended, (0, 1), value=1)
    output = model(
        input_ids=tokens[:, None],
        attention_mask=whole if padded else None,
        position_ids=attended.sum(-1, keepdim=True),
        past_key_values=cache,
        use_cache=True,
    )
    logits: Tensor = output.logits[:, -1]
    return logits
