"""Where each request is sent and what comes back: two tables that both the client and the gateway read.

Operations are answered with a promise, queries at once.
"""

from dataclasses import dataclass
from typing import Literal

from twinkle.protocol import messages as m
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse

PREFIX = "/api/v1"
PROTOBUF = "application/x-protobuf"
JSON = "application/json"
CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"


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
    Endpoint("/save_weights_external", m.SaveWeightsExternalRequest, m.SaveWeightsExternalResponse),
    Endpoint("/load_weights", m.LoadWeightsRequest, m.LoadWeightsResponse),
    Endpoint("/create_custom_loss", m.CreateCustomLossRequest, m.CreateCustomLossResponse),
    Endpoint("/asample", m.SampleRequest, SampleResponse),
)

OPERATION: dict[type[m.Operation], Endpoint] = {endpoint.request: endpoint for endpoint in OPERATIONS}


@dataclass(frozen=True)
class QueryEndpoint:
    """One query of the wire.

    Attributes:
        path: below `PREFIX`; `{field}` is filled from the request. The other fields travel as the JSON body of a
            POST or PUT, or in the query string; `idempotency_key` as the header X-Idempotency-Key.
    """

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    request: type[m.Query]
    reply: type[m.Reply]


QUERIES: tuple[QueryEndpoint, ...] = (
    QueryEndpoint("POST", "/create_session", m.CreateSessionRequest, m.CreateSessionResponse),
    QueryEndpoint("POST", "/session_heartbeat", m.SessionHeartbeatRequest, m.SessionHeartbeatResponse),
    QueryEndpoint("POST", "/sessions/{session_id}/finish", m.FinishSessionRequest, m.Acknowledged),
    QueryEndpoint("GET", "/get_server_capabilities", m.GetServerCapabilities, m.ServerCapabilities),
    QueryEndpoint("POST", "/get_info", m.GetInfoRequest, m.GetInfoResponse),
    QueryEndpoint(
        "POST", "/create_sampling_session", m.CreateSamplingSessionRequest, m.CreateSamplingSessionResponse
    ),
    QueryEndpoint(
        "POST", "/join_sampling_session", m.JoinSamplingSessionRequest, m.JoinSamplingSessionResponse
    ),
    QueryEndpoint("GET", "/samplers/{sampler_id}", m.GetSampler, m.SamplerInfo),
    QueryEndpoint("POST", "/cancel_future", m.CancelFutureRequest, m.Acknowledged),
    QueryEndpoint("POST", "/retrieve_futures", m.RetrieveFuturesRequest, m.RetrieveFuturesResponse),
    QueryEndpoint("POST", "/weights_info", m.WeightsInfoRequest, m.WeightsInfo),
    QueryEndpoint("POST", "/copy_weights", m.CopyWeightsRequest, m.CopyWeightsResponse),
    QueryEndpoint("GET", "/training_runs", m.ListTrainingRuns, m.TrainingRunList),
    QueryEndpoint("GET", "/training_runs/{run_id}", m.GetTrainingRun, m.TrainingRun),
    QueryEndpoint("GET", "/training_runs/{run_id}/checkpoints", m.ListCheckpoints, m.CheckpointList),
    QueryEndpoint("GET", "/checkpoints", m.ListUserCheckpoints, m.CheckpointList),
    QueryEndpoint("DELETE", CHECKPOINT, m.DeleteCheckpoint, m.Acknowledged),
    QueryEndpoint("POST", CHECKPOINT + "/publish", m.PublishCheckpoint, m.Acknowledged),
    QueryEndpoint("DELETE", CHECKPOINT + "/publish", m.UnpublishCheckpoint, m.Acknowledged),
    QueryEndpoint("PUT", CHECKPOINT + "/ttl", m.SetCheckpointTtl, m.Acknowledged),
    QueryEndpoint("GET", CHECKPOINT + "/external_weights_urls", m.GetCheckpointUrls, m.ExternalWeightsUrls),
    QueryEndpoint("GET", "/tokenizer_urls", m.GetTokenizerUrls, m.ExternalWeightsUrls),
    QueryEndpoint("GET", "/sessions", m.ListSessions, m.SessionList),
    QueryEndpoint("POST", "/sessions/search", m.SearchSessions, m.SearchSessionsResponse),
    QueryEndpoint("GET", "/sessions/{session_id}", m.GetSession, m.SessionInfo),
    QueryEndpoint("PUT", "/sessions/{session_id}/project", m.AssignSessionProject, m.Acknowledged),
    QueryEndpoint("GET", "/sessions/{session_id}/trace_export", m.ExportTrace, m.TraceExport),
    QueryEndpoint("GET", "/auth/apikey/me", m.GetApiKey, m.ApiKeyInfo),
    QueryEndpoint("DELETE", "/auth/apikey/me", m.DeleteApiKey, m.Acknowledged),
    QueryEndpoint("GET", "/audit", m.GetAuditLog, m.AuditLog),
    QueryEndpoint("GET", "/billing/usage/events", m.GetUsage, m.Usage),
    QueryEndpoint("GET", "/billing/usage/checkpoints/current", m.GetStorageUsage, m.StorageUsage),
)

QUERY: dict[type[m.Query], QueryEndpoint] = {endpoint.request: endpoint for endpoint in QUERIES}
