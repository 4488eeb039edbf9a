"""Numbers that tell how training goes, computed from what the verbs return, with numpy alone.

`likelihood` is about log-probabilities, `accuracy` about right and wrong, `inputs` reads what is given. Nothing here is
logged or drawn.
"""

from twinkle.metric.accuracy import answer_accuracy, token_accuracy
from twinkle.metric.likelihood import entropy, kl_divergence, nll, perplexity, policy_metrics

__all__ = [
    "answer_accuracy",
    "entropy",
    "kl_divergence",
    "nll",
    "perplexity",
    "policy_metrics",
    "token_accuracy",
]
