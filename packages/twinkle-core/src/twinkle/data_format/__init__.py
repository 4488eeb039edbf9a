"""What data looks like on its way from a file to the wire: messages, then tokens with labels, then datums.

`Message` and `Trajectory` are what people and datasets write, `InputFeature` is what a template makes of
them, `Datum` is what the protocol sends. Reading files, rendering and batching are done elsewhere.
"""

from twinkle.data_format.features import NOT_TRAINED, InputFeature, Types, make_datum, to_datum
from twinkle.data_format.messages import FunctionCall, Message, TextPart, ToolCall, Trajectory
from twinkle.protocol.types import Datum

__all__ = [
    "NOT_TRAINED",
    "Datum",
    "FunctionCall",
    "InputFeature",
    "Message",
    "TextPart",
    "ToolCall",
    "Trajectory",
    "Types",
    "make_datum",
    "to_datum",
]
