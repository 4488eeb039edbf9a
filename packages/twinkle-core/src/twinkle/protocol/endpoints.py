"""Where each request is sent and what it returns: two tables for both the client and the gateway.

Operations are answered with a promise, queries at once.
"""

from dataclasses import dataclass
from typing import Any, Literal

from twinkle.protocol import messages as m
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse

PREFIX = "/api/v1"
PROTOBUF = "application/x-protobuf"
JSON = "application/json"


@dataclass(frozen=True)
class Endpoint:
    """One operation of the wire.

    Attributes:
        path: below `PREFIX`; all are POST.
        request, result: message types.
        body: how the request is encoded; results that have a protobuf type are protobuf whatever this says.
    """

    path: str
    request: type[m.Operation]
    result: type[m.Result]
    body: Literal["json", "protobuf"] = "json"


OPERATIONS: tuple[Endpoint, ...] = (
    Endpoint("/create_model", m.CreateModelRequest, m.CreateModelResponse),
    Endpoint("/unload_model", m.UnloadModelRequest, m.UnloadModelResponse),
    Endpoint("/forward_backward", m.ForwardBackwardRequest, ForwardBackwardOutput, body="protobuf"),
    Endpoint("/optim_step", m.OptimStepRequest, m.OptimStepResponse),
    Endpoint("/save_weights", m.SaveWeightsRequest, m.SaveWeightsResponse),
    Endpoint("/save_weights_for_sampler", m.SaveWeightsForSamplerRequest, m.SaveWeightsForSamplerResponse),
    Endpoint("/save_weights_external", m.SaveWeightsExternalRequest, m.SaveWeightsExternalResponse),
    Endpoint("/load_weights", m.LoadWeightsRequest, m.LoadWeightsResponse),
    Endpoint("/create_custom_loss", m.CreateCustomLossRequest, m.CreateCustomLossResponse),
    Endpoint("/asample", m.SampleRequest, SampleResponse),
)

OPERATION: dict[type[m.Operation], Endpoint] = {endpoint.request: endpoint for endpoint in OPERATIONS}


QUERIES: tuple[type[m.Query[Any]], ...] = tuple(m.Query.with_endpoints)
"""The query types of the wire; each holds its own method, path and reply."""
