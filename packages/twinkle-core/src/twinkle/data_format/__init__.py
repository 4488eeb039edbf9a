"""The forms of data between a file and the wire: messages, then tokens with labels, then datums.

Users and datasets write `Message`s and `Trajectory`s, a template turns them into `InputFeature`s, and the protocol
sends `Datum`s. Reading files, rendering and batching are done elsewhere.
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
