"""Requests and replies. Each is defined once: clients build requests and read replies, the service the other way round.

Requests that the SDK sends as JSON are pydantic models whose fields are the wire's; `ForwardBackwardRequest`, which
travels as protobuf, is a dataclass. Unknown fields are ignored, so that newer SDKs can talk to us.

Where nothing else is said, clients send queries and the service replies; and a class without a docstring is such a
message, or a part of the next one.
"""
# ruff: noqa: F403

from twinkle.protocol.messages.accounts import *
from twinkle.protocol.messages.base import *
from twinkle.protocol.messages.checkpoints import *
from twinkle.protocol.messages.custom_losses import *
from twinkle.protocol.messages.futures import *
from twinkle.protocol.messages.handshake import *
from twinkle.protocol.messages.sampling import *
from twinkle.protocol.messages.sessions import *
from twinkle.protocol.messages.training import *
from twinkle.protocol.messages.unions import *
