"""What the training step calls must not stall a GPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from vbon_lightning.functional import (
    clipped_surrogate_loss,
    clipped_value_loss,
    generalized_advantage_estimation,
    kl_penalty,
    rao_blackwell_advantages,
    reinforce_loss,
    response_mask,
    reward_cdf,
    sampled_kl_advantages,
    sequence_log_prob,
    token_rewards,
    token_statistics,
    vbon_target,
)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_step_never_waits_for_the_device() -> None:
    b, g, t, v, m = 2, 4, 6, 11, 64
    device = torch.device("cuda")
    tokens = torch.randint(v, (b, g, t), device=device)
    logits, reference_logits = (torch.randn(b, g, t, v, device=device, requires_grad=r) for r in (True, False))
    rewards, reference_rewards = torch.randn(b, g, device=device), torch.randn(b, m, device=device)
    values = torch.randn(b, g, t, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = response_mask(tokens, eos_id=(0, 1))
        stats = token_statistics(logits, reference_logits, tokens, temperature=0.7)
        cdf = reward_cdf(rewards, reference_rewards)
        target = vbon_target(sequence_log_prob(stats.reference_log_probs, mask), cdf, n=4)
        log_ratio = stats.log_probs - stats.reference_log_probs
        advantages = sampled_kl_advantages(target, stats.log_probs, stats.reference_log_probs, mask)
        advantages = advantages + rao_blackwell_advantages(target, stats.kl, mask, log_ratio=log_ratio)
        gae = generalized_advantage_estimation(
            token_rewards(target, stats.log_probs, stats.reference_log_probs, mask), values, mask
        )
        loss = reinforce_loss(stats.log_probs, advantages, mask) + target.kl_coef * kl_penalty(stats.kl, mask)
        loss = loss + clipped_surrogate_loss(stats.log_probs, stats.log_probs, gae.advantages, mask).loss
        loss = loss + clipped_value_loss(values, values, gae.returns, mask)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.grad.isfinite().all()
