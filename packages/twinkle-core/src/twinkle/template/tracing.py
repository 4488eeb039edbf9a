"""Traces which message each stretch of a rendered conversation is written for.

A chat template loops over the messages. Here it is compiled a second time, with calls inserted into each loop that
write a mark where the loop reaches a message, and another where the loop ends. The text between two marks was written
for the message of the first: this is exact whatever the template does with the content, and covers all messages in one
rendering.

A nested loop interrupts the text of the outer message: Gemma 4's template writes tool results from within the turn that
called them, and Command A's scans the assistant's calls while it writes a result. In a loop over indices, the first
message that its body binds with `{% set ... %}` counts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

import jinja2.nodes

_ENTER: Final = "_twinkle_enter"
_TAKE: Final = "_twinkle_take"
_LEAVE: Final = "_twinkle_leave"


class Stretch(NamedTuple):
    """Text from character `start` up to, not including, `end`.

    Attributes:
        owner: the message that it is written for, if any.
        within: the message inside which that one is written, if different.
    """

    owner: int | None
    within: int | None
    start: int
    end: int


def instrument(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """Change the template in place so that rendering it with the `variables` of a `Trace` writes its marks."""
    loops = [loop for loop in tree.find_all(jinja2.nodes.For) if loop.find(jinja2.nodes.Output) is not None]
    numbers = {id(loop): number for number, loop in enumerate(loops)}
    _instrument(tree, numbers, around=None)
    return tree


def writes_directly(tree: jinja2.nodes.Template) -> bool:
    """Whether an instrumented template's marks go straight to its output, never into text that it holds and may look
    at: none of its loops is in a macro, or in a block whose text is set to a variable, filtered or called with.
    """
    holding = (
        jinja2.nodes.AssignBlock,
        jinja2.nodes.FilterBlock,
        jinja2.nodes.CallBlock,
        jinja2.nodes.Macro,
    )
    return not any(
        call.node.name in (_ENTER, _TAKE, _LEAVE)
        for block in tree.find_all(holding)
        for call in block.find_all(jinja2.nodes.Call)
        if isinstance(call.node, jinja2.nodes.Name)
    )


def constant_prompt(tree: jinja2.nodes.Template) -> str | None:
    """The generation prompt of a template that writes the same one in any case: with `{% if add_generation_prompt %}`
    and nothing but text in it, at its end, right behind a loop over all messages. None for other templates.
    """
    match tree.body:
        case [
            *_,
            jinja2.nodes.For(iter=jinja2.nodes.Name(name="messages")),
            jinja2.nodes.If(
                test=jinja2.nodes.Name(name="add_generation_prompt"), body=written, elif_=[], else_=[]
            ),
        ]:
            pass
        case _:
            return None
    pieces = [piece for output in written for piece in getattr(output, "nodes", [output])]
    text = ""
    for piece in pieces:
        if isinstance(piece, jinja2.nodes.TemplateData):
            text += piece.data
        elif isinstance(piece, jinja2.nodes.Const) and isinstance(piece.value, str):
            text += piece.value
        else:
            return None
    return text if text.strip() else None


def _instrument(node: jinja2.nodes.Node, numbers: Mapping[int, int], around: int | None) -> None:
    """Insert marks below `node`, which is directly (except for conditions) in the body of loop `around`."""
    for field in node.fields:
        body = cast(object, getattr(node, field))
        if not isinstance(body, list):
            continue
        marked: list[object] = []
        for child in cast(list[object], body):
            marked.append(child)
            if id(child) in numbers:
                marked.append(_written(_LEAVE, numbers[id(child)]))
            elif around is not None and isinstance(child, jinja2.nodes.Assign):
                name = child.target.name if isinstance(child.target, jinja2.nodes.Name) else None
                marked += [_written(_TAKE, around, name)] if name is not None else []
        body[:] = marked
    for child in list(node.iter_child_nodes()):
        inside = around if isinstance(child, jinja2.nodes.If) else numbers.get(id(child))
        _instrument(child, numbers, inside)
    if (
        id(node) in numbers
        and isinstance(node, jinja2.nodes.For)
        and isinstance(node.target, jinja2.nodes.Name)
    ):
        node.body.insert(0, _written(_ENTER, numbers[id(node)], node.target.name))


def _written(function: str, loop_number: int, variable: str | None = None) -> jinja2.nodes.Output:
    arguments: list[jinja2.nodes.Expr] = [jinja2.nodes.Const(loop_number)]
    if variable is not None:
        arguments.append(jinja2.nodes.Name(variable, "load"))
    call = jinja2.nodes.Call(jinja2.nodes.Name(function, "load"), arguments, [], None, None)
    return jinja2.nodes.Output([call])


class Trace:
    """The marks of one rendering.

    Args:
        messages: the same objects that the template receives.
        mark: a character that occurs nowhere in the rendered text.
    """

    def __init__(self, messages: Sequence[dict[str, Any]], mark: str) -> None:
        self._numbers = {id(message): number for number, message in enumerate(messages)}
        self._mark = mark
        # For each running loop, whether it has reached a message; a loop over indices may not have yet.
        self._arrived: dict[int, bool] = {}
        self._marked: set[int] = set()  # running loops that have written a mark
        self._count = 0

    @property
    def variables(self) -> Mapping[str, Any]:
        """Variables for the instrumented template."""
        return {_ENTER: self._enter, _TAKE: self._take, _LEAVE: self._leave}

    def _enter(self, loop: int, item: object) -> str:
        number = self._numbers.get(id(item))
        before = self._arrived.get(loop, False)
        if number is not None or isinstance(item, int):
            self._arrived[loop] = number is not None
        # A loop that moves on to text for no message says so once.
        return self._written(loop, number) if number is not None or before else ""

    def _take(self, loop: int, item: object) -> str:
        number = self._numbers.get(id(item))
        if number is None or self._arrived.get(loop, True):
            return ""
        self._arrived[loop] = True
        return self._written(loop, number)

    def _leave(self, loop: int) -> str:
        self._arrived.pop(loop, None)
        if loop not in self._marked:
            return ""
        self._marked.remove(loop)
        self._count += 1
        return f"{self._mark}{loop}{self._mark}"

    def _written(self, loop: int, message: int | None) -> str:
        self._marked.add(loop)
        self._count += 1
        return f"{self._mark}{loop},{'' if message is None else message}{self._mark}"

    def has_all_marks_of(self, marked: str) -> bool:
        """Whether the mark's character occurs nowhere else in the text."""
        return marked.count(self._mark) == 2 * self._count

    def read(self, marked: str) -> tuple[str, list[Stretch]]:
        """The text without its marks, and its stretches in order; none is empty, and neighbours differ in owner."""
        parts = re.split(f"{self._mark}([0-9]+)(?:,([0-9]*))?{self._mark}", marked)
        stretches: list[Stretch] = []
        for stretch in _stretches(parts):
            before = stretches[-1] if stretches else None
            if before is not None and before[:2] == stretch[:2]:
                stretches[-1] = before._replace(end=stretch.end)
            else:
                stretches.append(stretch)
        return "".join(parts[::3]), stretches


def _stretches(parts: Sequence[str | None]) -> Iterator[Stretch]:
    """From the sequence text, loop, message, text, ...; a message of None means that the loop has ended."""
    around: list[tuple[str, int | None]] = []  # the enclosing loops, each with its current message
    position = 0
    for number in range(0, len(parts), 3):
        text = parts[number] or ""
        if text:
            owners = [owner for _, owner in around if owner is not None]
            owner = owners[-1] if owners else None
            within = next((other for other in owners if other != owner), None)
            yield Stretch(owner, within, position, position + len(text))
            position += len(text)
        if number + 1 == len(parts):
            return
        loop, message = parts[number + 1] or "", parts[number + 2]
        depth = next((depth for depth, (other, _) in enumerate(around) if other == loop), len(around))
        del around[depth:]
        if message is not None:
            around.append((loop, int(message) if message else None))
