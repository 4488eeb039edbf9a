"""API keys, the audit log and usage."""

from datetime import date
from typing import Any, Literal

from pydantic import AwareDatetime, Field

from twinkle.protocol.messages.base import Acknowledged, Metadata, Query
from twinkle.protocol.types import Value

# ---------------------------------------------------------------- API keys


class OrgDetails(Value):
    name: str


class UserDetails(Value):
    email: str


class KeyDetails(Value):
    org_details: OrgDetails
    user_details: UserDetails


class ApiKeyInfo(Value):
    """Gateway (or service, in open mode) to the SDK's command line."""

    key_id: int
    name: str
    note: str
    details: KeyDetails


class GetApiKey(Query[ApiKeyInfo], method="GET", path="/auth/apikey/me"):
    """The SDK's command line to gateway: the key that this request was sent with."""


class DeleteApiKey(Query[Acknowledged], method="DELETE", path="/auth/apikey/me"):
    """The SDK's command line to gateway: revoke the key that this request was sent with."""


# ---------------------------------------------------------------- audit log


class AuditEntry(Value):
    """Part of `AuditLog`.

    Attributes:
        event: what was done to what, such as checkpoint_delete.
    """

    timestamp: str
    event: str
    event_details: dict[str, Any] = Field(default_factory=dict[str, Any])
    model_id: str | None = None
    tinker_path: str | None = None
    purpose: str | None = None


class AuditLog(Value):
    """Service to client: one day's entries, oldest first."""

    entries: list[AuditEntry]


class GetAuditLog(Query[AuditLog], method="GET", path="/audit"):
    """Client to service. An admin sees all tenants' entries.

    Attributes:
        day: in UTC; default: today.
    """

    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all"
    day: date | None = None


# ---------------------------------------------------------------- usage


class UsageInfo(Value):
    """Part of `UsageEvent`: tokens trained on, prefilled or generated; or checkpoints written."""

    type: Literal["training", "sampling_prefill", "sampling_sample", "checkpoint"]
    token_count: int | None = None
    count: int | None = None
    cached: bool | None = None


class UsageEvent(Value):
    """Part of `Usage`: one hour's usage of one kind in one session. There are no prices."""

    bucket_start: str
    bucket_end: str
    base_model: str | None = None
    user_id: str | None = None
    session_id: str | None = None
    project_id: str | None = None
    event_info: UsageInfo


class UsageSession(Value):
    user_metadata: Metadata | None = None


class Usage(Value):
    """Service to client; `sessions` by id."""

    data: list[UsageEvent]
    sessions: dict[str, UsageSession] = Field(default_factory=dict[str, UsageSession])


class GetUsage(Query[Usage], method="GET", path="/billing/usage/events"):
    """Client to service: usage by hour; both ends on the hour, at most 14 days apart. An admin sees all tenants'."""

    starting_on: AwareDatetime
    ending_before: AwareDatetime


class StorageUsageItem(Value):
    project_id: str | None = None
    org_user_urn: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float


class StorageUsage(Value):
    """Service to client: the checkpoints there are now, by project."""

    data: list[StorageUsageItem]


class GetStorageUsage(Query[StorageUsage], method="GET", path="/billing/usage/checkpoints/current"):
    """Client to service. An admin sees all tenants'."""

    project_id: str | None = None
