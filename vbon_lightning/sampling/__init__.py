"""Sampling responses: noise that is a function of the prompt, and the decode loop."""

from vbon_lightning.sampling.decode import sample_completions
from vbon_lightning.sampling.noise import noise_seed, prompt_noise
from vbon_lightning.sampling.scoring import response_logits, response_statistics

__all__ = ["noise_seed", "prompt_noise", "response_logits", "response_statistics", "sample_completions"]
