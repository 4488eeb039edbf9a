"""Losses for `forward_backward_custom` that come with their gradients, so that no torch is needed.

Losses that the server computes itself (cross_entropy, importance_sampling, ppo, ...) are named in `forward_backward`.
"""

from twinkle.loss.preference import dpo_loss, orpo_loss, pair_data, simpo_loss
from twinkle.verbs.custom_loss import ClosedFormLoss, LossValue

__all__ = ["ClosedFormLoss", "LossValue", "dpo_loss", "orpo_loss", "pair_data", "simpo_loss"]
