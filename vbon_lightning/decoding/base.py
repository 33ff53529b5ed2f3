"""What every decoder takes and returns. What it returns is no sample of a policy."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vbon_lightning.actors import Actors
from vbon_lightning.checks import is_plain, plain
from vbon_lightning.decoding.cost import DecodingCost
from vbon_lightning.decoding.further_models import FurtherModel
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.sampling.memory import metered_caches
from vbon_lightning.sampling.towers import metered_towers
from vbon_lightning.types import PromptBatch, select_prompts

if TYPE_CHECKING:
    from typing_extensions import Self


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
    """``[B, G]``: the rewards of the responses, where the decoder knows them; NaN where one has none."""
    kl_bound: float | None = math.inf
    """An upper bound of KL(decoder || what it decodes from) over whole responses, where it is not known token by token:
    log c, if no response is more than c times as likely as before (log n for whichever is chosen of n samples). None
    for Best-of-N itself, whose KL is known; infinite where nothing is said, which cannot be compared."""


class Decoder(ABC):
    """Chooses responses with loaded actors: any policy, reward and value model that these hold.

    One that needs other language models too names them in :attr:`models`: they are then checked before anything is
    loaded, loaded once, and stand beside the policy when :meth:`decode` is called.
    """

    needs_value_model = False
    """Whether it reads a value model."""
    needs_reward = False
    """Whether it chooses by the reward."""
    n: float = 1.0
    """N of the Best-of-N that it is, or aims at; how many responses it starts with."""
    reads_table = False
    """Whether it reads the reference's rewards, where a batch brings them."""
    rows = 1
    """Rows of the cache that a response takes while it is made, which bounds how many prompts and responses are decoded
    at once where ``data.max_rows`` is set; 1 also where the sampler makes them, which keeps to that itself."""
    models: tuple[FurtherModel, ...] = ()
    """Further language models."""

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse further models that do not go with a policy, before anything is loaded.

        Args:
            tokenizer: The policy's.

        Raises:
            ModelError: If one is not there, or has other tokens.
        """
        for model in self.models:
            model.check(tokenizer)

    def check_fits(self, *, longest: int, max_rows: int | None) -> None:
        """Refuse options that do not go with how responses are sampled, before anything is loaded.

        Args:
            longest: The most tokens that a response may have.
            max_rows: The most rows that may be sampled at once; None for no limit.

        Raises:
            ValueError: Naming the option and what to do.
        """
        if max_rows is not None and self.rows > max_rows:
            raise ValueError(
                f"data.max_rows is {max_rows}, and {type(self).__name__} makes a response of {self.rows} rows at "
                "once: raise it, or lower the decoder's n"
            )

    def release(self) -> None:
        """Forget the further models, which are loaded again when they are needed."""
        for model in self.models:
            model.release()

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember what the constructor is given, whatever it makes of it."""
        self = super().__new__(cls)
        self._given = (args, kwargs)
        return self

    def identity(self) -> dict[str, Any]:
        """Describe the decoder in plain values: its class and what this was given, further models by content.

        Raises:
            ValueError: If an option is no plain value, so that its description has to be written: override this.
        """
        args, kwargs = self._given
        bound = signature(type(self)).bind(*args, **kwargs)
        bound.apply_defaults()
        models = {model.role: model.identity() for model in self.models}
        options = {name: value for name, value in bound.arguments.items() if name not in models}
        if opaque := [name for name, value in options.items() if not is_plain(value)]:
            raise ValueError(
                f"{type(self).__name__} cannot describe its option {opaque[0]}, which is no plain value, and its "
                "output is not to be mistaken for another's: override identity()"
            )
        kind = type(self)
        ours = kind.__module__.startswith(f"{__package__}.")
        name = kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}"
        return {"class": name, **plain(options), **models}

    @torch.no_grad()
    def __call__(
        self, actors: Actors, prompts: PromptBatch, *, num_samples: int, seed: int, stream: str, step: int
    ) -> Decoded:
        """Choose G responses a prompt, and measure what that takes.

        Args:
            actors: Loaded models.
            prompts: B prompts.
            num_samples: G, responses a prompt.
            seed: The run's seed.
            stream: The noise's stream.
            step: The call's number within the stream.

        Raises:
            ValueError: If a reward or a value model is needed and the actors have none, or if the decoder's options
                do not go with the length of responses or with ``data.max_rows``.
        """
        if self.needs_value_model and actors.value is None:
            raise ValueError(f"{type(self).__name__} needs a value model: name one as data.value_model")
        if self.needs_reward and actors.reward is None:
            raise ValueError("this needs a reward: set `data.reward`")
        limit: int | None = getattr(actors.sampler, "max_rows", None)
        self.check_fits(longest=actors.max_new_tokens, max_rows=limit)
        actors.place()
        for model in self.models:
            model.load(actors)
        count = len(prompts.text)
        at_once = count if limit is None else max(1, limit // (num_samples * self.rows))
        a_prompt = num_samples if limit is None else min(num_samples, limit // self.rows)
        key = NoiseKey(num_samples, seed, stream, step)
        device = prompts.tokens.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        with metered_caches() as meter, metered_towers() as towers:
            parts = []
            for start in range(0, count, at_once):
                rows = list(range(start, min(start + at_once, count)))
                some = prompts if len(rows) == count else select_prompts(prompts, rows)
                shares = [self.decode(actors, some, part) for part in key.parts(a_prompt)]
                parts.append(_joined(shares, dim=1))
            found = _joined(parts, dim=0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost = found.cost._replace(
            value_tokens=found.cost.value_tokens + towers.tokens,
            seconds=time.perf_counter() - began,
            peak_cache_bytes=meter.peak,
            peak_cuda_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        )
        return found._replace(cost=cost)

    @abstractmethod
    def decode(self, actors: Actors, prompts: PromptBatch, key: NoiseKey) -> Decoded:
        """Choose G responses a prompt; what is measured may be left out of their cost.

        Args:
            actors: Loaded models, where they belong.
            prompts: B prompts.
            key: G, responses a prompt, and where their noise lies: a prompt's are decoded in several calls where
                ``data.max_rows`` is too small for all of them.
        """


def _joined(parts: list[Decoded], *, dim: int) -> Decoded:
    """Put together what was decoded for some prompts each (``dim`` 0), or for the same ones (1)."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.tokens.shape[-1] for part in parts)

    def wide(value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, (0, longest - value.shape[-1]))

    def all_of(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if any(value is None for value in values):
            return None
        return torch.cat([wide(value) for value in values] if values[0].ndim == 3 else values, dim=dim)

    joined: Mapping[str, Any] = {name: all_of(name) for name in Decoded._fields if name not in ("cost", "kl_bound")}
    cost = parts[0].cost
    for part in parts[1:]:
        cost = cost.plus(part.cost)
    return Decoded(**joined, cost=cost, kl_bound=parts[0].kl_bound)
