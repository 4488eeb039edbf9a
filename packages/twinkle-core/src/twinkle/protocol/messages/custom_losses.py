"""Custom losses: a traced function as data. Created by an operation, like everything in `training`."""

from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from twinkle.protocol.messages.base import Number
from twinkle.protocol.types import Value


class CustomLossInput(Value):
    """Part of `CreateCustomLossRequest`: `logprobs`, or a name in `loss_fn_inputs`.

    Attributes:
        rank: 1 is [T], 2 is [T, K], 0 a scalar.
    """

    name: str
    rank: Literal[0, 1, 2]


class CustomLossNode(Value):
    """Part of `CustomLossGraph`: one operation of a traced loss, as torch.fx records it.

    Attributes:
        op: placeholder, call_function, call_method or output (others exist, and are refused).
        name: later nodes refer to it.
        target: the parameter's, function's or method's name.
        args, kwargs: JSON values; what JSON can't express is an object with one key, such as `{"ref": node}`,
            `{"tuple": [...]}`, `{"dict": {...}}`, `{"slice": [start, stop, step]}`, `{"ellipsis": true}`,
            `{"float": "inf"}`, `{"dtype": "float32"}`, `{"device": "cpu"}`.
    """

    op: str
    name: str
    target: str
    args: list[Any] = Field(default_factory=list[Any])
    kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])


class CustomLossGraph(Value):
    """Client to backend, which looks its names up in an allow-list and never executes it as code."""

    format: Literal[1] = 1
    nodes: Annotated[list[CustomLossNode], FailFast()]


class CreateCustomLossResponse(Value):
    """Service to client: what to pass as `forward_backward(..., "custom", {"loss_id": ...})`."""

    loss_id: str
    type: Literal["create_custom_loss"] = "create_custom_loss"


class CreateCustomLossRequest(Value):
    """Client to service: keep this loss for the session's runs."""

    session_id: str
    custom_loss_seq_id: Number
    name: str = Field(max_length=256)
    inputs: Annotated[list[CustomLossInput], FailFast()]
    graph: CustomLossGraph
