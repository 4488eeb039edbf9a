"""Queries: the requests that are answered at once, and their replies."""

from typing import TypeAlias

from twinkle.protocol.messages.accounts import (
    ApiKeyInfo,
    AuditLog,
    DeleteApiKey,
    GetApiKey,
    GetAuditLog,
    GetStorageUsage,
    GetUsage,
    StorageUsage,
    Usage,
)
from twinkle.protocol.messages.checkpoints import (
    Acknowledged,
    CheckpointList,
    CopyWeightsRequest,
    CopyWeightsResponse,
    DeleteCheckpoint,
    ExternalWeightsUrls,
    GetCheckpointArchive,
    GetCheckpointUrls,
    GetTokenizerUrls,
    GetTrainingRun,
    ListCheckpoints,
    ListTrainingRuns,
    ListUserCheckpoints,
    PublishCheckpoint,
    SetCheckpointTtl,
    TrainingRun,
    TrainingRunList,
    UnpublishCheckpoint,
    WeightsInfo,
    WeightsInfoRequest,
)
from twinkle.protocol.messages.futures import (
    CancelFutureRequest,
    RetrieveFuturesRequest,
    RetrieveFuturesResponse,
)
from twinkle.protocol.messages.handshake import GetServerCapabilities, ServerCapabilities
from twinkle.protocol.messages.sampling import (
    CreateSamplingSessionRequest,
    CreateSamplingSessionResponse,
    GetSampler,
    JoinSamplingSessionRequest,
    JoinSamplingSessionResponse,
    SamplerInfo,
)
from twinkle.protocol.messages.sessions import (
    AssignSessionProject,
    CreateSessionRequest,
    CreateSessionResponse,
    ExportTrace,
    FinishSessionRequest,
    GetSession,
    ListSessions,
    SearchSessions,
    SearchSessionsResponse,
    SessionHeartbeatRequest,
    SessionHeartbeatResponse,
    SessionInfo,
    SessionList,
    TraceExport,
)
from twinkle.protocol.messages.training import GetInfoRequest, GetInfoResponse

Query: TypeAlias = (
    CreateSessionRequest
    | SessionHeartbeatRequest
    | FinishSessionRequest
    | GetServerCapabilities
    | GetInfoRequest
    | CreateSamplingSessionRequest
    | JoinSamplingSessionRequest
    | GetSampler
    | CancelFutureRequest
    | RetrieveFuturesRequest
    | WeightsInfoRequest
    | CopyWeightsRequest
    | GetTrainingRun
    | ListTrainingRuns
    | ListCheckpoints
    | ListUserCheckpoints
    | DeleteCheckpoint
    | PublishCheckpoint
    | UnpublishCheckpoint
    | SetCheckpointTtl
    | GetCheckpointUrls
    | GetCheckpointArchive
    | GetTokenizerUrls
    | ListSessions
    | GetSession
    | AssignSessionProject
    | SearchSessions
    | ExportTrace
    | GetApiKey
    | DeleteApiKey
    | GetAuditLog
    | GetUsage
    | GetStorageUsage
)
"""Requests that are answered at once (or, where the request says how long to wait, by then)."""

Reply: TypeAlias = (
    CreateSessionResponse
    | SessionHeartbeatResponse
    | Acknowledged
    | ServerCapabilities
    | GetInfoResponse
    | CreateSamplingSessionResponse
    | JoinSamplingSessionResponse
    | SamplerInfo
    | RetrieveFuturesResponse
    | WeightsInfo
    | CopyWeightsResponse
    | TrainingRun
    | TrainingRunList
    | CheckpointList
    | ExternalWeightsUrls
    | SessionList
    | SessionInfo
    | SearchSessionsResponse
    | TraceExport
    | ApiKeyInfo
    | AuditLog
    | Usage
    | StorageUsage
)
"""What a query is answered with."""
