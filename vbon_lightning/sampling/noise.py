"""Sampling noise as a pure function of (seed, stream, step, prompt).

A global random state would make samples depend on the number of processes, on the batch a prompt happens to
stand in and on everything drawn before. Here each prompt owns its noise, so that two processes draw what one
would have drawn, no two ranks draw the same, and a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def noise_seed(*parts: int | str) -> int:
    """Mix integers and strings into one 63-bit seed, the same on every machine and in every process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def prompt_noise(
    identities: Sequence[int | str],
    *,
    num_samples: int,
    length: int,
    seed: int,
    stream: str,
    step: int,
    first: int = 0,
) -> Tensor:
    """Draw the uniforms that turn into tokens, one a token, for each prompt by its own generator.

    Args:
        identities: B prompt identities: rows of a data set, or keys of a table.
        num_samples: G, samples a prompt.
        length: T, tokens a sample.
        seed: The run's seed.
        stream: What the noise is for (``"train"``, ``"val"``, ``"table"`` ...): streams are independent.
        step: The rollout's number within the stream.
        first: The place of the first of these samples among the prompt's: those before it are left out.

    Returns:
        ``[B, G, T]`` float64 on the CPU, uniform on [0, 1).
    """
    noise = torch.empty(len(identities), num_samples, length, dtype=torch.float64)
    for row, identity in enumerate(identities):
        # Not torch's generator: on the CPU it reads 32 bits of its seed, too few for prompts x steps.
        generator = np.random.Generator(np.random.Philox(key=noise_seed(seed, stream, step, identity)))
        noise[row] = torch.from_numpy(generator.random((first + num_samples, length))[first:])
    return noise
