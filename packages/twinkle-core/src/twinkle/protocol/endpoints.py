"""Where each operation is sent and what its promise turns into: one table for the client and the gateway."""

from dataclasses import dataclass
from typing import Literal

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
        body: how the request is encoded. The result of a protobuf type is protobuf too.
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
    Endpoint("/load_weights", m.LoadWeightsRequest, m.LoadWeightsResponse),
    Endpoint("/asample", m.SampleRequest, SampleResponse),
)

BY_REQUEST: dict[type[m.Operation], Endpoint] = {endpoint.request: endpoint for endpoint in OPERATIONS}
