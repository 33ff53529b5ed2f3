"""Sampling responses: noise that is a function of the prompt, and the decode loop."""

from vbon_lightning.sampling.decode import sample_completions
from vbon_lightning.sampling.noise import noise_seed, prompt_noise
from vbon_lightning.sampling.picking import pick_best, pick_groups
from vbon_lightning.sampling.scoring import response_log_probs, response_logits, response_statistics

__all__ = [
    "noise_seed",
    "pick_best",
    "pick_groups",
    "prompt_noise",
    "response_log_probs",
    "response_logits",
    "response_statistics",
    "sample_completions",
]
