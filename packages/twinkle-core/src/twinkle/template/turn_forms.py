"""The format of a model's turns, as data: the markers around reasoning and calls, and the ends of a turn.

`turn_learning` infers it from a chat template; `parsing` and `continuation` use it.
"""

import re
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Strip:
    """The characters that a template strips from either end of a part; None means all white space."""

    left: str | None = ""
    right: str | None = ""

    def apply(self, text: str) -> str:
        return text.lstrip(self.left).rstrip(self.right)


@dataclass(frozen=True)
class Marker:
    """Text that is written before, after or between parts.

    Attributes:
        text: without surrounding white space; may be empty.
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
        """A regular expression in which the white space is optional."""
        return r"\s*".join(re.escape(word) for word in self.text.split())


@dataclass(frozen=True)
class ReasoningForm:
    """How reasoning is written.

    Attributes:
        open, close: the markers before and after it.
        given: whether the generation prompt ends with `open`, so that sampled text begins inside.
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
        path: the keys to the object with name and arguments; usually none.
        name, arguments: their keys.
        id: the outer object's key for the call's id, if it is written.
    """

    path: tuple[str, ...]
    name: str
    arguments: str
    id: str | None


@dataclass(frozen=True)
class NamedBody:
    """A call as a name, `between`, and a JSON object of arguments."""

    between: Marker


@dataclass(frozen=True)
class TaggedBody:
    """A call as a name and parameters in tags.

    Attributes:
        name_end: what ends the name.
        open, key_end, close: the markers before a parameter's key, between key and value, and after the value.
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
        body: the form of the text between open and close.
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
    """How a model writes a turn; from `learn_turn_form`.

    Attributes:
        opening: the text before a turn's content, if the generation prompt leaves it to the model.
        content_end, calls_end: the end of a turn without and with calls.
        ends: everything that is cut off the end of a turn: those two, and special tokens without meaning in a turn.
        strip: the characters stripped from the content.
        reasoning, calls: None if the template doesn't support it.
    """

    opening: str
    content_end: str
    calls_end: str
    ends: tuple[str, ...]
    strip: Strip
    reasoning: ReasoningForm | None
    calls: CallForm | None


# Learning
