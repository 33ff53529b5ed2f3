"""Decoding-time realignment: one aligned policy, at other strengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vbon_lightning.actors import Actors
from vbon_lightning.decoding.base import Decoded, Decoder, DecodingCost
from vbon_lightning.decoding.further_models import FurtherModel
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.functional import realigned_logits, realignment_strength, vocabulary_kl
from vbon_lightning.functional._validate import check_real
from vbon_lightning.models import ModelSpec
from vbon_lightning.sampling.decode import Growing, Reader, caching, reader_of
from vbon_lightning.sampling.request import check_request
from vbon_lightning.types import PromptBatch


class DeRa(Decoder):
    r"""Sample from :math:`\pi^\lambda \pi_{ref}^{1 - \lambda}`, normalised token by token: one policy, other strengths.

    T. Liu et al., "Decoding-time Realignment of Language Models" (2024). The model that is decoded from is one of the
    two, and the other is named: ``vbon compare`` decodes from the reference, so that ``policy`` is named there; where
    the policy itself is decoded from, ``reference`` is. Both are run for every token. At 0 it is the reference, at 1
    the policy.

    Args:
        strength: lambda; from 0 to 1 it is between the two. Beyond 1 it goes further than the policy, below 0 away
            from it: what the two differ by is multiplied, their noise included, and the text soon is none.
        policy: The aligned policy, where the reference is decoded from.
        reference: The reference, where the policy is decoded from.
        policy_n: The policy's N, with ``n`` in place of ``strength``.
        n: The N of Best-of-N to come to: lambda = (n - 1) / (policy_n - 1).
    """

    def __init__(
        self,
        strength: float | None = None,
        policy: str | ModelSpec | None = None,
        reference: str | ModelSpec | None = None,
        policy_n: float | None = None,
        n: float | None = None,
    ) -> None:
        by_n = policy_n is not None and n is not None
        if (strength is None) != by_n or (policy_n is None) != (n is None):
            raise ValueError("give DeRa its strength, or the policy's N and the one to come to: policy_n and n")
        if (policy is None) == (reference is None):
            raise ValueError(
                "DeRa mixes the model that is decoded from with another one: name it as policy where the reference is "
                "decoded from, or as reference where the policy is"
            )
        if policy_n is not None and n is not None:
            strength = realignment_strength(policy_n, n)
        assert strength is not None
        check_real("strength", strength)
        self.strength, self.n = strength, 1.0 if n is None else n
        self._names_policy = policy is not None
        role, spec = ("policy", policy) if policy is not None else ("reference", reference)
        assert spec is not None
        self.models = (FurtherModel(spec, role),)

    @classmethod
    def from_n(cls, n: float, wanted: float, **models: Any) -> DeRa:
        """Turn a policy for Best-of-n into one for another N.

        Args:
            n: The policy's N, > 1.
            wanted: The N to come to.
            **models: ``policy`` or ``reference``, as for the class.
        """
        return cls(policy_n=n, n=wanted, **models)

    def decode(self, actors: Actors, prompts: PromptBatch, key: NoiseKey) -> Decoded:
        """Sample G responses a prompt."""
        noise = actors.noise(prompts, **key._asdict())
        request, other = actors.request(prompts, noise), self.models[0].load(actors)
        pair = (other, actors.policy) if self._names_policy else (actors.policy, other)
        for model in pair:
            check_request(model, request)
        with caching(pair[0]), caching(pair[1]):
            policy, reference = (reader_of(model, request) for model in pair)
            reader = _Mixed(policy, reference, self.strength, actors.temperature)
            growing, read = Growing(reader, request), int(prompts.mask.sum())
            token_kl = torch.zeros(growing.tokens.shape, device=growing.tokens.device)
            for place in range(growing.longest):
                growing.grow(place + 1)
                if growing.length == place:  # all have finished
                    break
                token_kl[growing.active, place] = reader.kl.float()
                read += len(growing.active) if place else 0
        found = growing.completions()
        width = found.tokens.shape[-1]
        return Decoded(
            tokens=found.tokens,
            mask=found.mask,
            finished=found.finished,
            token_kl=token_kl[:, :width].view(found.mask.shape),
            cost=DecodingCost(int(growing.generated), read, 0),
        )


class _Mixed(Reader):
    """Two models that read the same rows."""

    compact_below = 1.0  # both are run for every row: finished ones leave at once

    def __init__(self, policy: Reader, reference: Reader, strength: float, temperature: float) -> None:
        self.policy, self.reference = policy, reference
        self.strength, self.temperature, self.model = strength, temperature, policy.model
        self.logits = self._mixed(policy.logits, reference.logits)

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        return self.policy.model, self.reference.model

    def select(self, rows: Tensor) -> None:
        self.policy.select(rows)
        self.reference.select(rows)

    def advance(self, tokens: Tensor) -> Tensor:
        return self._mixed(self.policy.advance(tokens), self.reference.advance(tokens))

    def _mixed(self, policy: Tensor, reference: Tensor) -> Tensor:
        logits = realigned_logits(policy, reference, strength=self.strength)
        if not bool(logits.amax(-1).isfinite().all()):
            raise ValueError(
                f"DeRa's strength {self.strength:g} takes the mixed logits beyond all numbers: give one nearer to the "
                "range from 0 to 1"
            )
        self.kl = vocabulary_kl(logits, reference, temperature=self.temperature).clamp(min=0)
        return logits
