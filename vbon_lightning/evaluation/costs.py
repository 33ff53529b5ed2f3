"""What a response takes to make: tokens, reward calls and seconds, of one sample and of Best-of-N from the table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from vbon_lightning.actors import Actors
from vbon_lightning.evaluation.intervals import Estimate
from vbon_lightning.sampling import Sampler, SamplingRequest
from vbon_lightning.sampling.passes import InPasses
from vbon_lightning.sampling.towers import metered_towers
from vbon_lightning.types import Completions, PromptBatch


class TimedSampler:
    """Samples as another sampler does, and knows how long that took.

    Args:
        sampler: What samples.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.seconds, self.responses, self.tower_tokens = sampler, 0.0, 0, 0

    @property
    def mismatch(self) -> float | None:
        """Return what the sampler says of its own log-probabilities."""
        return getattr(self.sampler, "mismatch", None)

    def __call__(self, model: PreTrainedModel, request: SamplingRequest) -> Completions:
        """Sample responses."""
        began = time.perf_counter()
        with metered_towers() as towers:
            found = self.sampler(model, request)
        found.tokens.cpu()  # waits for a GPU
        self.seconds += time.perf_counter() - began
        self.responses += found.finished.numel()
        self.tower_tokens += towers.tokens
        return found

    @property
    def seconds_a_response(self) -> float | None:
        """Return the seconds of a response, of a batch shared by its responses; None before any was sampled."""
        return self.seconds / self.responses if self.responses else None

    @property
    def tower_tokens_a_response(self) -> float:
        """Return how many tokens the tower of a tilted policy reads beside the language model: 0 where there is none.

        A prompt is read once for all its responses, and the last token of a response never.
        """
        return self.tower_tokens / self.responses if self.responses else 0.0


@contextmanager
def timed_sampling(actors: Actors) -> Iterator[TimedSampler]:
    """Time what actors sample, for a while: generation alone, neither rewards nor log-probabilities.

    Args:
        actors: Loaded models.
    """
    before = actors.sampler
    # Passes stay in sight: rewards may be asked for between them.
    inner = before.sampler if isinstance(before, InPasses) else before
    watch = TimedSampler(inner)
    actors.sampler = InPasses(watch, before.max_rows) if isinstance(before, InPasses) else watch
    try:
        yield watch
    finally:
        actors.sampler = before


def scoring_seconds(actors: Actors, prompts: PromptBatch, found: Completions) -> float:
    """Return the seconds that it takes to decode and score a response, of a batch shared by its responses.

    Args:
        actors: Loaded models.
        prompts: B prompts.
        found: Their responses ``[B, G, T]``.
    """
    found.tokens.cpu()  # waits for a GPU
    began = time.perf_counter()
    ids = actors.token_ids(found)
    actors.score(prompts, actors.decode(ids, prompts), ids, found.finished).cpu()
    return (time.perf_counter() - began) / found.finished.numel()


def sample_cost(
    length: Estimate | None,
    seconds: float | None,
    *,
    n: int = 1,
    scoring: float = 0.0,
    value_tokens: float = 0.0,
) -> dict[str, float]:
    """Return what a response of a policy takes, or one of Best-of-N from a table: N times a reference sample.

    Best-of-N scores each of its samples; a policy's one sample needs no reward.

    Args:
        length: Tokens of a sample; of Best-of-N, of a reference sample.
        seconds: Seconds of a sample; None where they are not known.
        n: N, 1 for a policy's one sample.
        scoring: Seconds that decoding and scoring a sample takes.
        value_tokens: Tokens of a sample that the tower of a tilted policy reads, beside the language model.

    Returns:
        What is known, by the names of :class:`~vbon_lightning.decoding.DecodingCost` and ``seconds``.
    """
    calls = float(n) if n > 1 else 0.0
    known = {}
    if length is not None:
        known = {"generated_tokens": n * length.mean, "value_tokens": n * value_tokens, "reward_calls": calls}
    return known if seconds is None else known | {"seconds": n * seconds + calls * scoring}
