"""Operations: the requests that are answered with a promise, and what their promises turn into."""

from typing import TypeAlias

from twinkle.protocol.messages.custom_losses import CreateCustomLossRequest, CreateCustomLossResponse
from twinkle.protocol.messages.sampling import SampleRequest
from twinkle.protocol.messages.training import (
    CreateModelRequest,
    CreateModelResponse,
    ForwardBackwardRequest,
    LoadWeightsRequest,
    LoadWeightsResponse,
    OptimStepRequest,
    OptimStepResponse,
    SaveWeightsExternalRequest,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerRequest,
    SaveWeightsForSamplerResponse,
    SaveWeightsRequest,
    SaveWeightsResponse,
    UnloadModelRequest,
    UnloadModelResponse,
)
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse

Ordered: TypeAlias = (
    ForwardBackwardRequest
    | OptimStepRequest
    | SaveWeightsRequest
    | SaveWeightsForSamplerRequest
    | SaveWeightsExternalRequest
    | LoadWeightsRequest
)
"""Requests on a run that are applied in the order of `seq_id`."""

Operation: TypeAlias = (
    Ordered | CreateModelRequest | UnloadModelRequest | SampleRequest | CreateCustomLossRequest
)
"""Requests that are answered with a promise."""

Result: TypeAlias = (
    ForwardBackwardOutput
    | OptimStepResponse
    | SaveWeightsResponse
    | SaveWeightsForSamplerResponse
    | SaveWeightsExternalResponse
    | LoadWeightsResponse
    | CreateModelResponse
    | UnloadModelResponse
    | SampleResponse
    | CreateCustomLossResponse
)
"""What a promise turns into."""
