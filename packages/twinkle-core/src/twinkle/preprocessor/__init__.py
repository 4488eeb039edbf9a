"""From a dataset's own columns to conversations, one row at a time.

`Preprocessor` is the base to subclass; any function of a row does as well. `formats` recognises the usual layouts,
`turns` reads what they call the turns of a conversation. Applying one to a whole dataset is `Dataset.map`'s job,
turning conversations into tokens the template's.
"""

from twinkle.preprocessor.base import Preprocessor
from twinkle.preprocessor.formats import ConversationProcessor, PreferenceProcessor
from twinkle.preprocessor.self_cognition import SelfCognitionProcessor

__all__ = ["ConversationProcessor", "PreferenceProcessor", "Preprocessor", "SelfCognitionProcessor"]
