"""The tables. Times are UTC seconds since 1970."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    true,
)
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Mapped, mapped_column

from twinkle.protocol.uris import CheckpointKind, CheckpointUri

# Ephemeral sampler weights are checkpoints too, so that the sampler can evict and reload them; no list shows them.
UNNAMED_PREFIX = "unnamed-"
# All tenants, if an admin asks about usage or the audit log; no tenant can have this name.
EVERYBODY = "*"
# The name under which the runs of vanished clients are saved.
RELEASED_NAME = "twinkle-released"


class Base(DeclarativeBase):
    """Base of all rows."""

    type_annotation_map = {dict[str, Any]: JSON}


class Session(Base):
    """A client's connection, from create_session to its finish."""

    __tablename__ = "sessions"
    __table_args__ = (Index("sessions_by_tenant", "tenant", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Float)
    user_metadata: Mapped[dict[str, Any] | None]
    display_name: Mapped[str | None] = mapped_column(String(256))
    project_id: Mapped[str | None] = mapped_column(String(128))
    finished_at: Mapped[float | None] = mapped_column(Float)
    finish_reason: Mapped[str | None] = mapped_column(String(16))
    finish_detail: Mapped[str | None] = mapped_column(String)


class Run(Base):
    """A training run: one adapter and its history."""

    __tablename__ = "runs"
    __table_args__ = (Index("runs_by_tenant", "tenant", "created_at"),)

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    session_id: Mapped[str] = mapped_column(ForeignKey("sessions.id"), index=True)
    base_model: Mapped[str] = mapped_column(String(512))
    created_at: Mapped[float] = mapped_column(Float)
    last_request_at: Mapped[float] = mapped_column(Float)
    rank: Mapped[int] = mapped_column(Integer)
    user_metadata: Mapped[dict[str, Any] | None]


class Checkpoint(Base):
    """A saved adapter. The row is written after its files are complete."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        Index("checkpoints_by_name", "tenant", "name", "created_at"),
        Index("checkpoints_by_expiry", "expires_at"),
    )

    run_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    base_model: Mapped[str] = mapped_column(String(512))
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float | None] = mapped_column(Float)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    rank: Mapped[int] = mapped_column(Integer)
    train_attn: Mapped[bool] = mapped_column(Boolean)
    train_mlp: Mapped[bool] = mapped_column(Boolean)
    train_unembed: Mapped[bool] = mapped_column(Boolean)
    public: Mapped[bool] = mapped_column(Boolean, default=False)
    request_id: Mapped[str | None] = mapped_column(String(64))  # the request that wrote it, in case of retry
    user_metadata: Mapped[dict[str, Any] | None]

    @property
    def uri(self) -> CheckpointUri:
        return CheckpointUri(self.name, self.run_id, cast(CheckpointKind, self.kind))


class SamplingSession(Base):
    """A sampling session: a base model, or a checkpoint on it (`checkpoint_time` says which, if it is overwritten)."""

    __tablename__ = "samplers"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    session_id: Mapped[str] = mapped_column(ForeignKey("sessions.id"), index=True)
    base_model: Mapped[str] = mapped_column(String(512))
    model_path: Mapped[str | None] = mapped_column(String(512))
    checkpoint_time: Mapped[float | None] = mapped_column(Float)
    created_at: Mapped[float] = mapped_column(Float)
    clients: Mapped[int] = mapped_column(Integer, default=0)  # how many have joined the first one


class CustomLoss(Base):
    """A loss that a client has traced and uploaded, as JSON."""

    __tablename__ = "custom_losses"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    session_id: Mapped[str] = mapped_column(ForeignKey("sessions.id"))
    body: Mapped[str] = mapped_column(Text)


class Usage(Base):
    """What a session used in an hour: tokens, or checkpoints, of one base model."""

    __tablename__ = "usage_by_model"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    hour: Mapped[int] = mapped_column(Integer, primary_key=True)  # hours since 1970
    session_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    base_model: Mapped[str] = mapped_column(String(512), primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger)


class Audit(Base):
    """Something done to a checkpoint or project, by whom, when."""

    __tablename__ = "audit"
    __table_args__ = (Index("audit_by_time", "tenant", "time"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    tenant: Mapped[str] = mapped_column(String(64))
    time: Mapped[float] = mapped_column(Float)
    event: Mapped[str] = mapped_column(String(64))
    details: Mapped[dict[str, Any]]


class ApiKey(Base):
    """A key that was made for a tenant. The key itself is not stored."""

    __tablename__ = "api_keys"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    tenant: Mapped[str] = mapped_column(String(64))
    role: Mapped[str] = mapped_column(String(16))  # "user" or "admin"
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    label: Mapped[str | None] = mapped_column(String(256))
    created_at: Mapped[float] = mapped_column(Float)
    revoked_at: Mapped[float | None] = mapped_column(Float)


class Engine(Base):
    """One of a server's engines: what is wanted of it, and how it is. Written by the server and by `twinkle-server
    models`; a name is never used again.
    """

    __tablename__ = "engines"

    server: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    base_model: Mapped[str] = mapped_column(String(512))  # the plain name
    entry: Mapped[str] = mapped_column(Text)  # its `models` entry, as JSON
    is_added: Mapped[bool] = mapped_column(Boolean)  # while the server ran: not in its file
    wanted: Mapped[str] = mapped_column(String(16))  # "run", "drain" or "remove"
    state: Mapped[str] = mapped_column(String(16))  # "starting", "running", "draining", "failed" or "stopped"
    message: Mapped[str] = mapped_column(Text, default="")
    runs: Mapped[int] = mapped_column(Integer, default=0)  # that take requests
    moved_to: Mapped[str | None] = mapped_column(String(64))  # the engine that has its runs now


class Placement(Base):
    """Which engine a training run or sampling session is on (or on which it was: see `Engine.moved_to`)."""

    __tablename__ = "placements"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    session_id: Mapped[str] = mapped_column(String(64), index=True)
    server: Mapped[str] = mapped_column(String(64))
    engine: Mapped[str] = mapped_column(String(64))


class Secret(Base):
    """A secret that all processes and machines on this database share, by what it is for."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(128))


def belongs_to(tenant: str, column: InstrumentedAttribute[str]) -> ColumnElement[bool]:
    """The rows of a tenant, or of `EVERYBODY`."""
    return true() if tenant == EVERYBODY else column == tenant
