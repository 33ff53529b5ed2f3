"""Decoding: ways to spend more than one sample, or a value model, when a response is made. One file a decoder."""

from vbon_lightning.decoding.base import Decoded, Decoder
from vbon_lightning.decoding.best_of_n import BestOfN
from vbon_lightning.decoding.cost import DecodingCost
from vbon_lightning.decoding.dera import DeRa
from vbon_lightning.decoding.drawing import Drawn, sample
from vbon_lightning.decoding.further_models import FurtherModel
from vbon_lightning.decoding.inference_time_pessimism import InferenceTimePessimism
from vbon_lightning.decoding.noise_key import NoiseKey
from vbon_lightning.decoding.sequential_monte_carlo import SequentialMonteCarlo
from vbon_lightning.decoding.soft_best_of_n import SoftBestOfN
from vbon_lightning.decoding.speculative_rejection import SpeculativeRejection
from vbon_lightning.decoding.tree_bon import TreeBoN
from vbon_lightning.decoding.value_guided import ValueGuided

__all__ = [
    "BestOfN",
    "DeRa",
    "Decoded",
    "Decoder",
    "DecodingCost",
    "Drawn",
    "FurtherModel",
    "InferenceTimePessimism",
    "NoiseKey",
    "SequentialMonteCarlo",
    "SoftBestOfN",
    "SpeculativeRejection",
    "TreeBoN",
    "ValueGuided",
    "sample",
]
