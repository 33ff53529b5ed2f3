"""What responses take to make."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple


class DecodingCost(NamedTuple):
    """What a batch of responses took to make."""

    generated_tokens: int
    """Tokens sampled from the language model, those of responses that were thrown away included."""
    value_tokens: int
    """Tokens that a value model, or another model beside the one that is sampled, read, candidates included; so is the
    tower of a tilted model, which reads what that one reads."""
    reward_calls: int
    """Responses that the reward scored, partial ones included."""
    seconds: float = 0.0
    """What choosing them took, rewards included."""
    peak_cache_bytes: int = 0
    """Most bytes that caches of keys and values held at once, on any device, of those that the package's own decode
    loop keeps: not those of ``data.sampler`` graph or vllm."""
    peak_cuda_bytes: int = 0
    """Most bytes allocated on the GPU at once, models included; 0 elsewhere."""
    fallbacks: int = 0
    """Responses that were taken for want of one that the decoder accepts, such as after n that were refused."""

    def plus(self, other: DecodingCost) -> DecodingCost:
        """Return the cost of both, one after the other: what is summed in sum, peaks the higher one."""
        return DecodingCost(
            self.generated_tokens + other.generated_tokens,
            self.value_tokens + other.value_tokens,
            self.reward_calls + other.reward_calls,
            self.seconds + other.seconds,
            max(self.peak_cache_bytes, other.peak_cache_bytes),
            max(self.peak_cuda_bytes, other.peak_cuda_bytes),
            self.fallbacks + other.fallbacks,
        )

    def per_response(self, responses: int) -> dict[str, float]:
        """Return what one response took by name; peaks stay those of the whole.

        Args:
            responses: How many were made.
        """
        return {name: value if name in PEAKS else value / responses for name, value in self._asdict().items()}


PEAKS = ("peak_cache_bytes", "peak_cuda_bytes")
"""Fields that are not shared by responses: the most at one time."""

UNUSUAL = (*PEAKS, "fallbacks")
"""Fields that are left out where they say nothing: all are 0."""


def cost_heading(name: str) -> str:
    """Return what people are to read for a field of :class:`DecodingCost`."""
    return f"{name.removesuffix('_bytes')} of a batch".replace("_", " ") if name in PEAKS else name.replace("_", " ")


def cost_amount(name: str, value: float) -> str:
    """Write an amount of :meth:`DecodingCost.per_response` for people.

    Args:
        name: The field.
        value: The amount.
    """
    if name in ("seconds", "fallbacks"):
        return f"{value:.2g}"
    return f"{value / 2**20:,.2f} MiB" if name in PEAKS else f"{value:,.1f}"


def describe_cost(costs: Sequence[DecodingCost], responses: int) -> str:
    """Say in a line what a response took to make.

    Args:
        costs: Of each batch, one at least.
        responses: How many responses there are in all.
    """
    found = reduce(DecodingCost.plus, costs).per_response(responses).items()
    said = {name: value for name, value in found if value or name not in UNUSUAL}
    return "a response took " + ", ".join(f"{cost_heading(name)} {cost_amount(name, said[name])}" for name in said)
