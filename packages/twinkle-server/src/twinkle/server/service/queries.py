"""Answers that need nothing but the store and facts about the model."""

from __future__ import annotations

import asyncio
import time
import uuid
from datetime import UTC, datetime
from typing import Literal, cast

from twinkle.protocol import messages as m
from twinkle.protocol.errors import NotFound
from twinkle.protocol.uris import CheckpointKind, CheckpointUri
from twinkle.server.backends.protocol import BaseModelInfo
from twinkle.server.engine.runs import LiveRun
from twinkle.server.store import tables
from twinkle.server.store.database import Database

_CHECKPOINT_TYPES: dict[str, Literal["training", "sampler", "external"]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


# ---------------------------------------------------------------- model and runs


def capabilities(model_name: str, info: BaseModelInfo) -> m.ServerCapabilities:
    return m.ServerCapabilities(
        supported_models=[
            m.SupportedModel(
                model_name=model_name,
                max_context_length=info.max_context_length,
                max_lora_rank=info.max_lora_rank,
                vocab_size=info.vocab_size,
            )
        ]
    )


def run_info(run: LiveRun, info: BaseModelInfo) -> m.GetInfoResponse:
    data = m.ModelData(arch=info.architecture, model_name=run.base_model, tokenizer_id=run.base_model)
    return m.GetInfoResponse(
        model_data=data, model_id=run.run_id, lora_rank=run.spec.rank, model_name=run.base_model
    )


async def create_session(
    database: Database, tenant: str, request: m.CreateSessionRequest
) -> m.CreateSessionResponse:
    row = tables.Session(
        id=uuid.uuid4().hex,
        tenant=tenant,
        created_at=time.time(),
        user_metadata=request.user_metadata,
        display_name=request.display_name,
    )
    await asyncio.to_thread(database.put, row)
    return m.CreateSessionResponse(session_id=row.id)


async def find_sampler(database: Database, tenant: str, sampler_id: str) -> tables.Sampler:
    row = await asyncio.to_thread(database.sampler, tenant, sampler_id)
    if row is None:
        raise NotFound(
            f"sampling_session_id: no sampling session {sampler_id[:200]!r}; make one with create_sampling_client"
        )
    return row


# ---------------------------------------------------------------- checkpoints


def uri_of(request: m.DeleteCheckpoint) -> str:
    return str(CheckpointUri(request.name, request.run_id, request.kind))


def weights_info(row: tables.Checkpoint) -> m.WeightsInfo:
    return m.WeightsInfo(
        base_model=row.base_model,
        lora_rank=row.rank,
        train_unembed=row.train_unembed,
        train_mlp=row.train_mlp,
        train_attn=row.train_attn,
    )


def _checkpoint(row: tables.Checkpoint) -> m.Checkpoint:
    short_kind = "weights" if row.kind == "weights" else row.kind
    return m.Checkpoint(
        checkpoint_id=f"{short_kind}/{row.name}",
        checkpoint_type=_CHECKPOINT_TYPES[cast(CheckpointKind, row.kind)],
        time=_iso(row.created_at),
        tinker_path=str(row.uri),
        size_bytes=row.size_bytes,
        user_metadata=row.user_metadata,
        expires_at=_iso(row.expires_at) if row.expires_at else None,
    )


def _training_run(database: Database, row: tables.Run) -> m.TrainingRun:
    checkpoints, _ = database.checkpoints(row.tenant, time.time(), row.id)
    training = [_checkpoint(c) for c in checkpoints if c.kind == "weights"]
    sampler = [_checkpoint(c) for c in checkpoints if c.kind == "sampler_weights"]
    return m.TrainingRun(
        training_run_id=row.id,
        base_model=row.base_model,
        model_owner=row.tenant,
        lora_rank=row.rank,
        last_request_time=_iso(row.last_request_at),
        last_checkpoint=training[0] if training else None,
        last_sampler_checkpoint=sampler[0] if sampler else None,
        user_metadata=row.user_metadata,
    )


# ---------------------------------------------------------------- lists


async def answer(database: Database, tenant: str, query: m.Query) -> m.Reply:
    """The queries that read rows and do nothing else."""
    return await asyncio.to_thread(_answer, database, tenant, query)


def _answer(database: Database, tenant: str, query: m.Query) -> m.Reply:
    now = time.time()
    match query:
        case m.GetSampler():
            sampler = database.sampler(tenant, query.sampler_id)
            if sampler is None:
                raise NotFound(f"sampler_id: no sampler {query.sampler_id[:200]!r}")
            return m.SamplerInfo(
                sampler_id=sampler.id, base_model=sampler.base_model, model_path=sampler.model_path
            )
        case m.GetTrainingRun():
            return _training_run(database, _run(database, tenant, query.run_id))
        case m.ListTrainingRuns():
            runs, total = database.runs(tenant, query.limit, query.offset)
            cursor = m.Cursor(offset=query.offset, limit=query.limit, total_count=total)
            return m.TrainingRunList(
                training_runs=[_training_run(database, run) for run in runs], cursor=cursor
            )
        case m.ListCheckpoints():
            _run(database, tenant, query.run_id)
            rows, _ = database.checkpoints(tenant, now, query.run_id)
            return m.CheckpointList(checkpoints=[_checkpoint(row) for row in rows])
        case m.ListUserCheckpoints():
            rows, total = database.checkpoints(tenant, now, None, query.limit, query.offset)
            cursor = m.Cursor(offset=query.offset, limit=query.limit, total_count=total)
            return m.CheckpointList(checkpoints=[_checkpoint(row) for row in rows], cursor=cursor)
        case _:
            raise AssertionError(f"{type(query).__name__} is answered elsewhere")


def _run(database: Database, tenant: str, run_id: str) -> tables.Run:
    row = database.run(tenant, run_id)
    if row is None:
        raise NotFound(f"run_id: no training run {run_id[:200]!r}")
    return row
