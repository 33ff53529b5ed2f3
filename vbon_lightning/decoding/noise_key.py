"""Which noise a decoder's responses take."""

from __future__ import annotations

from typing import NamedTuple


class NoiseKey(NamedTuple):
    """How many responses a prompt is to have, and where their noise lies.

    Its fields are the arguments of :meth:`Actors.noise <vbon_lightning.actors.Actors.noise>`,
    :meth:`Actors.sample <vbon_lightning.actors.Actors.sample>` and
    :func:`~vbon_lightning.sampling.prompt_noise`: ``actors.sample(policy, prompts, **key._asdict())``.
    """

    num_samples: int
    """G, responses a prompt."""
    seed: int
    """The run's seed."""
    stream: str
    """The noise's stream."""
    step: int
    """The call's number within the stream."""
    first: int = 0
    """The place of the first of these responses among the prompt's, which their noise goes by: a prompt's many may be
    made some at a time."""

    def of_each(self, n: int) -> NoiseKey:
        """Return those of n candidates for each response."""
        return self._replace(num_samples=self.num_samples * n, first=self.first * n)

    def parts(self, most: int) -> list[NoiseKey]:
        """Cut the responses of a prompt into parts of so many at the most."""
        stop = self.first + self.num_samples
        return [
            self._replace(num_samples=min(most, stop - first), first=first) for first in range(self.first, stop, most)
        ]

    def apart(self, purpose: str) -> NoiseKey:
        """Return other noise for the same responses, of a stream that is named by its purpose."""
        return self._replace(stream=f"{self.stream}/{purpose}")
