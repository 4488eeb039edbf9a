"""From rewards to advantages: how much better each completion, or token, was than expected.

`group` compares the completions of one prompt, `tokens` works token by token. Rewards are in `twinkle.reward`; the
server applies advantages in its losses.
"""

from twinkle.advantage.group import grpo_advantages, rloo_advantages
from twinkle.advantage.tokens import gae_advantages, reinforce_plus_plus_advantages

__all__ = ["gae_advantages", "grpo_advantages", "reinforce_plus_plus_advantages", "rloo_advantages"]
