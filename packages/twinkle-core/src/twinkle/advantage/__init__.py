"""From rewards to advantages: how much better each completion, or token, was than expected.

`group` compares the completions of one prompt, `tokens` goes token by token. Where rewards come from is the business of
`twinkle.reward`; what a loss does with advantages is the server's.
"""

from twinkle.advantage.group import grpo_advantages, rloo_advantages
from twinkle.advantage.tokens import gae_advantages, reinforce_plus_plus_advantages

__all__ = ["gae_advantages", "grpo_advantages", "reinforce_plus_plus_advantages", "rloo_advantages"]
