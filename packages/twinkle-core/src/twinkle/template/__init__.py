"""From conversations to tokens and back, by the model's own tokenizer and chat template; no Transformers
needed.

`files` reads a model's folder, `rendering` turns a conversation into text, `labels` finds the assistant's
turns in that text, `template` puts the three together. Token ids equal
`apply_chat_template(tokenize=True)`'s.
"""

from twinkle.template.registry import get_template_class, register_template
from twinkle.template.template import SequenceTooLong, Template, TrainOn, TruncationStrategy

__all__ = [
    "SequenceTooLong",
    "Template",
    "TrainOn",
    "TruncationStrategy",
    "get_template_class",
    "register_template",
]
