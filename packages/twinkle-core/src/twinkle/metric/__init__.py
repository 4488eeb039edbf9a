"""Training metrics, computed from the verbs' results, with numpy only.

`likelihood` is about log-probabilities, `accuracy` about correct answers, `inputs` converts arguments. For logging and
plots see `twinkle.runs`.
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
