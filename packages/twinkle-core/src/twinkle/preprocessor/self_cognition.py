"""Rows of `swift/self-cognition`, about who the model is and who made it, with placeholders for both names."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from twinkle.data_format import Message, Trajectory
from twinkle.preprocessor.base import Preprocessor
from twinkle.protocol.errors import InvalidRequest

Name: TypeAlias = str | tuple[str, str]

_COLUMNS = ("query", "response")
_TAGS = ("zh", "en")


class SelfCognitionProcessor(Preprocessor):
    """Fills in `{{NAME}}` and `{{AUTHOR}}` and converts the row to a question and its answer.

    Args:
        model_name: the model's name; a pair is its (Chinese, English) names.
        model_author: its maker's name; a pair likewise.
        system: system prompt; default: none.

    Raises:
        InvalidRequest: if a name is neither a string nor a pair of strings.
    """

    def __init__(self, model_name: Name, model_author: Name, system: str | None = None) -> None:
        self._names = _by_tag("model_name", model_name)
        self._authors = _by_tag("model_author", model_author)
        self._needs_tag = not (isinstance(model_name, str) and isinstance(model_author, str))
        self._system = system

    def __call__(self, row: Mapping[str, Any]) -> Trajectory:
        """The conversation of a row with the columns `query`, `response` and `tag` ("zh" or "en").

        `tag` may be missing if the names are the same in both languages.

        Raises:
            InvalidRequest: if a column is missing or has the wrong type.
        """
        query, response = (self._text(row, column) for column in _COLUMNS)
        messages = [Message(role="user", content=query), Message(role="assistant", content=response)]
        if self._system is not None:
            messages.insert(0, Message(role="system", content=self._system))
        return Trajectory(messages=messages)

    def _text(self, row: Mapping[str, Any], column: str) -> str:
        text = row.get(column)
        if not isinstance(text, str):
            raise InvalidRequest(
                f"{column}: expected text, got {type(text).__name__}; the columns are {', '.join(row) or 'none'}, "
                f"and this preprocessor reads {', '.join(_COLUMNS)} and tag"
            )
        tag = row.get("tag")
        if tag not in _TAGS:
            if self._needs_tag:
                raise InvalidRequest(
                    f"tag: {tag!r}; allowed are 'zh' and 'en', since the names given differ by language"
                )
            tag = "en"
        return text.replace("{{NAME}}", self._names[tag]).replace("{{AUTHOR}}", self._authors[tag])


def _by_tag(field: str, name: Name) -> dict[str, str]:
    names = (name, name) if isinstance(name, str) else tuple(name)
    if len(names) != len(_TAGS) or not all(isinstance(each, str) for each in names):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequest(f"{field}: {name!r}; allowed are a name, or a pair of names (Chinese, English)")
    return dict(zip(_TAGS, names, strict=True))
