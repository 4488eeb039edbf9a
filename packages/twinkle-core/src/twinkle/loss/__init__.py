"""Losses for `forward_backward_custom` with their own gradients, so that they need no torch.

For losses that the server computes (cross_entropy, importance_sampling, ppo, ...) see `forward_backward`.
"""

from twinkle.loss.preference import dpo_loss, orpo_loss, pair_data, simpo_loss
from twinkle.verbs.custom_loss import ClosedFormLoss, LossValue

__all__ = ["ClosedFormLoss", "LossValue", "dpo_loss", "orpo_loss", "pair_data", "simpo_loss"]
