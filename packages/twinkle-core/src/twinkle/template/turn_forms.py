"""How a model writes its turns, as data: what stands around reasoning and calls, and what ends a turn.

Made by `turn_learning` from a chat template, read by `parsing` and `continuation`.
"""

import re
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Strip:
    """The characters a template strips from either end of a part; None is all white space."""

    left: str | None = ""
    right: str | None = ""

    def apply(self, text: str) -> str:
        return text.lstrip(self.left).rstrip(self.right)


@dataclass(frozen=True)
class Marker:
    """A text that is written before, after or between parts.

    Attributes:
        text: without the white space around it; may be empty.
        before, after: that white space.
    """

    text: str = ""
    before: str = ""
    after: str = ""

    @property
    def whole(self) -> str:
        """The marker as the template writes it."""
        return f"{self.before}{self.text}{self.after}"

    @property
    def pattern(self) -> str:
        """A regular expression that is indifferent to white space."""
        return r"\s*".join(re.escape(word) for word in self.text.split())


@dataclass(frozen=True)
class ReasoningForm:
    """How reasoning is written.

    Attributes:
        open, close: what stands before and after it.
        given: whether the generation prompt ends with `open`, so that what is sampled begins inside.
        strip: what is stripped from it.
    """

    open: Marker
    close: Marker
    given: bool
    strip: Strip


@dataclass(frozen=True)
class JsonBody:
    """A call as one JSON object.

    Attributes:
        path: the keys that lead to the object with name and arguments; usually none.
        name, arguments: their keys.
        id: the outer object's key for the call's id, if it is written.
    """

    path: tuple[str, ...]
    name: str
    arguments: str
    id: str | None


@dataclass(frozen=True)
class NamedBody:
    """A call as a name and a JSON object of arguments, with `between` in between."""

    between: Marker


@dataclass(frozen=True)
class TaggedBody:
    """A call as a name and parameters in tags.

    Attributes:
        name_end: what ends the name.
        open, key_end, close: what stands before a parameter's key, between key and value, and after the value.
    """

    name_end: Marker
    open: Marker
    key_end: Marker
    close: Marker


CallBody: TypeAlias = JsonBody | NamedBody | TaggedBody


@dataclass(frozen=True)
class CallForm:
    """How calls are written: `section_open (open body close) separator (open body close) ... section_close`.

    Attributes:
        body: what is between open and close.
        arguments_as_text: whether the template wants a message's arguments as JSON text.
    """

    section_open: Marker
    open: Marker
    body: CallBody
    close: Marker
    separator: Marker
    section_close: Marker
    arguments_as_text: bool

    @property
    def example(self) -> str:
        """What a call looks like."""
        if isinstance(self.body, JsonBody):
            inner = f'{{"{self.body.name}": "NAME", "{self.body.arguments}": {{...}}}}'
        elif isinstance(self.body, NamedBody):
            inner = f"NAME{self.body.between.whole}{{...}}"
        else:
            tags = self.body
            inner = (
                f"NAME{tags.name_end.whole}{tags.open.whole}KEY{tags.key_end.whole}VALUE{tags.close.whole}"
            )
        opening = (self.section_open.text + self.open.whole) if self.section_open.text else self.open.text
        closing = (self.close.whole + self.section_close.whole).rstrip()
        return f"{opening.rstrip()}{self.open.after}{inner}{closing}"


@dataclass(frozen=True)
class TurnForm:
    """How a model writes a turn; made by `learn_turn_form`.

    Attributes:
        opening: what the template writes before the content of a turn, where its generation prompt leaves that to the
            model.
        content_end, calls_end: what ends a turn; that with calls may have an end of its own.
        ends: all that is cut off the end of a turn: those two, and special tokens that mean nothing in a turn.
        strip: what is stripped from the content.
        reasoning, calls: None where the template knows no such thing.
    """

    opening: str
    content_end: str
    calls_end: str
    ends: tuple[str, ...]
    strip: Strip
    reasoning: ReasoningForm | None
    calls: CallForm | None


# Learning
