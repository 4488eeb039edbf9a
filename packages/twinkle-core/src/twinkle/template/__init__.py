"""From conversations to tokens and back, by the model's own tokenizer and chat template, without Transformers.

`tokenizer_files` reads a model's folder, `conversation` a trajectory, `fitting` converts it to the forms that the chat
template wants (`habits`), `shown` refuses what it would drop, `rendering` turns it into text, `labels` finds the
assistant's turns in that text, `template` puts these together. Token ids equal those of Transformers'
`apply_chat_template(tokenize=True)`. On the way back, `turn_learning` infers how the model writes a turn
(`turn_forms`), `parsing` reads sampled text, and `continuation` extends it.
"""

from twinkle.template.parsing import ParsedTurn
from twinkle.template.registry import get_template_class, register_template
from twinkle.template.template import SequenceTooLong, Template, TrainOn, TruncationStrategy

__all__ = [
    "ParsedTurn",
    "SequenceTooLong",
    "Template",
    "TrainOn",
    "TruncationStrategy",
    "get_template_class",
    "register_template",
]
