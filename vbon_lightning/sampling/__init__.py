"""Sampling responses: noise that is a function of the prompt, the decode loop, and other ways to run it."""

from vbon_lightning.sampling.backends import SAMPLERS, SamplerError, check_sampler, make_sampler
from vbon_lightning.sampling.decode import sample_completions
from vbon_lightning.sampling.noise import noise_seed, prompt_noise
from vbon_lightning.sampling.passes import Sampler
from vbon_lightning.sampling.picking import pick_best, pick_groups, pick_some, pick_weighted
from vbon_lightning.sampling.request import SamplingRequest
from vbon_lightning.sampling.scoring import response_log_probs, response_logits, response_statistics, text_log_probs

__all__ = [
    "SAMPLERS",
    "Sampler",
    "SamplerError",
    "SamplingRequest",
    "check_sampler",
    "make_sampler",
    "noise_seed",
    "pick_best",
    "pick_groups",
    "pick_some",
    "pick_weighted",
    "prompt_noise",
    "response_log_probs",
    "response_logits",
    "response_statistics",
    "sample_completions",
    "text_log_probs",
]
