"""What every decoder takes and returns. What it returns is no sample of a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from vbon_lightning.actors import Actors
from vbon_lightning.types import PromptBatch


class DecodingCost(NamedTuple):
    """What a batch of responses took to make."""

    generated_tokens: int
    """Tokens sampled from the language model, those of responses that were thrown away included."""
    value_tokens: int
    """Tokens that a value model read, candidates included."""
    reward_calls: int
    """Responses that the reward scored."""


class Decoded(NamedTuple):
    """Responses that a decoder chose: not samples of the reference, nor of any policy whose gradient is to be taken.

    Estimators of policies take :class:`~vbon_lightning.types.Completions`, which has the sampled tokens' own
    log-probabilities; this has none.
    """

    tokens: Tensor
    """``[B, G, T]`` long: response token ids, the EOS included, then padding."""
    mask: Tensor
    """``[B, G, T]`` bool: True up to and including the first EOS."""
    finished: Tensor
    """``[B, G]`` bool: True where an EOS was chosen, False where the length limit cut the response."""
    token_kl: Tensor | None
    """``[B, G, T]``: KL(decoder || reference) at each token, 0 outside the mask, or an upper bound of it where
    candidates are drawn: that of candidates and choice together. None where it is not known token by token."""
    cost: DecodingCost
    rewards: Tensor | None = None
    """``[B, G]``: the rewards of the responses, where the decoder knows them."""


class Decoder(ABC):
    """Chooses responses with loaded actors: any policy, reward and value model that these hold."""

    needs_value_model = False
    """Whether it reads a value model."""
    needs_reward = False
    """Whether it chooses by the reward."""
    n: float
    """N of the Best-of-N that it is, or aims at."""

    @abstractmethod
    def __call__(
        self, actors: Actors, prompts: PromptBatch, *, num_samples: int, seed: int, stream: str, step: int
    ) -> Decoded:
        """Choose G responses a prompt.

        Args:
            actors: Loaded models.
            prompts: B prompts.
            num_samples: G, responses a prompt.
            seed: The run's seed.
            stream: The noise's stream.
            step: The call's number within the stream.
        """
