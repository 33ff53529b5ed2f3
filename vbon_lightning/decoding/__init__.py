"""Decoding: ways to spend more than one sample, or a value model, when a response is made. One file a decoder."""

from vbon_lightning.decoding.base import Decoded, Decoder, DecodingCost
from vbon_lightning.decoding.best_of_n import BestOfN
from vbon_lightning.decoding.drawing import Drawn, sample
from vbon_lightning.decoding.value_guided import ValueGuided

__all__ = ["BestOfN", "Decoded", "Decoder", "DecodingCost", "Drawn", "ValueGuided", "sample"]
