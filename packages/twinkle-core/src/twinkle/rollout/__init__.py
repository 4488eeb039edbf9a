"""From samples to training data: groups of answers, multi-turn conversations with tools, scores of sequences.

Works with the sampling clients of both SDKs: with Tinker's, pass its `types` (`from tinker import types`).
"""

from twinkle.rollout.groups import sample_groups, score
from twinkle.rollout.multi_turn import Respond, sample_turns
from twinkle.rollout.rollouts import Rollout, to_training_data
from twinkle.rollout.tools import Tool, call_tools

__all__ = [
    "Respond",
    "Rollout",
    "Tool",
    "call_tools",
    "sample_groups",
    "sample_turns",
    "score",
    "to_training_data",
]
