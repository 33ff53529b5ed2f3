"""A module with a tiny policy that brings what an export asks for."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers import EOS, tiny_llama, tiny_tokenizer
from vbon_lightning.actors import ActorSpec
from vbon_lightning.rewards import CallableReward


class Tiny(LightningModule):
    """Pull a tiny Llama somewhere, and bring what an export asks for."""

    def __init__(self, policy: str = "hub-user/base-model") -> None:
        super().__init__()
        self.policy, self.tokenizer = tiny_llama(), tiny_tokenizer()
        reward = CallableReward("tests.helpers:unused", arguments={"scale": 2})
        self.actor_spec = ActorSpec(policy=policy, reward=reward)
        self.save_hyperparameters({"n": 4.0, "estimator": "reinforce"})

    def generation_settings(self) -> dict[str, Any]:
        return {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 9, "eos_token_id": EOS}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.policy(batch).logits.square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/win_rate", 0.625)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(24).view(4, 6) + 3, batch_size=2)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)
