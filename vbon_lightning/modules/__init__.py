"""LightningModules: siblings that differ by what they maximise."""

from vbon_lightning.modules.kl_rl import KLRL
from vbon_lightning.modules.reference_sampler import ReferenceSampler
from vbon_lightning.modules.reward_modelling import RewardModelling
from vbon_lightning.modules.sft import SFT
from vbon_lightning.modules.vbon import VBoN

__all__ = ["KLRL", "SFT", "ReferenceSampler", "RewardModelling", "VBoN"]
