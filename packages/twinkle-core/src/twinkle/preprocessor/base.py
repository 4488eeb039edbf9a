"""The interface of preprocessors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from twinkle.data_format import Trajectory


class Preprocessor(ABC):
    """Turns one row of a dataset into a conversation.

    Parameters of a subclass go to its constructor:

        class QuestionAnswer(Preprocessor):
            def __call__(self, row):
                return {"messages": [Message(role="user", content=row["question"]),
                                     Message(role="assistant", content=row["answer"])]}
    """

    @abstractmethod
    def __call__(self, row: Mapping[str, Any]) -> Trajectory | dict[str, Any] | None:
        """Return the row that replaces `row`, which must not be modified; None drops it.

        Further columns may be returned beside `messages` and `tools`; they are kept.

        Raises:
            InvalidRequest: if the row is not in the expected form. (Other exceptions are also reported with the row's
                file and line.)
        """
