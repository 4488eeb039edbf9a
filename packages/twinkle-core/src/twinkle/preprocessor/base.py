"""The shape of a preprocessor."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from twinkle.data_format import Trajectory


class Preprocessor(ABC):
    """Turns one row of a dataset into a conversation.

    A subclass names the columns it reads; its parameters go to its constructor:

        class QuestionAnswer(Preprocessor):
            def __call__(self, row):
                return {"messages": [Message(role="user", content=row["question"]),
                                     Message(role="assistant", content=row["answer"])]}
    """

    @abstractmethod
    def __call__(self, row: Mapping[str, Any]) -> Trajectory | dict[str, Any] | None:
        """The row that replaces `row`, which is left as it is; None drops it.

        Further columns may be returned beside `messages` and `tools`: they stay with the row.

        Raises:
            InvalidRequest: if the row is not what this preprocessor reads. (Other exceptions are reported as
                well, with the file and line of the row.)
        """
