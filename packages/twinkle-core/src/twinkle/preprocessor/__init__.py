"""Preprocessors convert a dataset's columns to conversations, one row at a time.

`Preprocessor` is a base class; any function of a row works too. `formats` recognises the usual layouts, `turns` reads
the turns of their conversations. `Dataset.map` applies a preprocessor to a dataset; the template turns conversations
into tokens.
"""

from twinkle.preprocessor.base import Preprocessor
from twinkle.preprocessor.formats import ConversationProcessor, PreferenceProcessor
from twinkle.preprocessor.self_cognition import SelfCognitionProcessor

__all__ = ["ConversationProcessor", "PreferenceProcessor", "Preprocessor", "SelfCognitionProcessor"]
