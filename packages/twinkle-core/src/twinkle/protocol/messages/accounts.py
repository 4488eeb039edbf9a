"""API keys, the audit log and usage."""

from datetime import date
from typing import Any, Literal

from pydantic import AwareDatetime, Field

from twinkle.protocol.messages.base import Metadata
from twinkle.protocol.types import Value


class GetApiKey(Value):
    """The key that the request was sent with."""


class OrgDetails(Value):
    name: str


class UserDetails(Value):
    email: str


class KeyDetails(Value):
    org_details: OrgDetails
    user_details: UserDetails


class ApiKeyInfo(Value):
    key_id: int
    name: str
    note: str
    details: KeyDetails


class DeleteApiKey(Value):
    """Revoke the key that the request was sent with."""


class GetAuditLog(Value):
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all"
    day: date | None = None


class AuditEntry(Value):
    """`event` is what was done to what, such as checkpoint_delete."""

    timestamp: str
    event: str
    event_details: dict[str, Any] = Field(default_factory=dict[str, Any])
    model_id: str | None = None
    tinker_path: str | None = None
    purpose: str | None = None


class AuditLog(Value):
    """One day's entries, oldest first."""

    entries: list[AuditEntry]


class GetUsage(Value):
    """Usage by hour; both ends on the hour, at most 14 days apart."""

    starting_on: AwareDatetime
    ending_before: AwareDatetime


class UsageInfo(Value):
    """What was used: tokens trained on, read as prompts, or generated; or checkpoints written."""

    type: Literal["training", "sampling_prefill", "sampling_sample", "checkpoint"]
    token_count: int | None = None
    count: int | None = None
    cached: bool | None = None


class UsageEvent(Value):
    """One hour's usage of one kind in one session. There are no prices: `estimated_cost_usd` is never set."""

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
    data: list[UsageEvent]
    sessions: dict[str, UsageSession] = Field(default_factory=dict[str, UsageSession])


class GetStorageUsage(Value):
    project_id: str | None = None


class StorageUsageItem(Value):
    project_id: str | None = None
    org_user_urn: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float


class StorageUsage(Value):
    """Checkpoints that there are now, by project."""

    data: list[StorageUsageItem]
