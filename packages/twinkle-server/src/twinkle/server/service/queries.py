"""Queries about the model, training runs and lists of checkpoints."""

from __future__ import annotations

import time
from typing import Any, Literal, cast

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol.errors import NotFound
from twinkle.protocol.uris import CheckpointKind
from twinkle.server.service import validation
from twinkle.server.service.metadata import iso, texts
from twinkle.server.service.parts import Answer, Parts, reads
from twinkle.server.store import tables
from twinkle.server.store.database import Database

_CHECKPOINT_TYPES: dict[str, Literal["training", "sampler", "external"]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


# ---------------------------------------------------------------- model and runs


async def _capabilities(parts: Parts, _tenant: str, _query: m.GetServerCapabilities) -> m.ServerCapabilities:
    info = parts.worker.info
    return m.ServerCapabilities(
        supported_models=[
            m.SupportedModel(
                model_name=parts.model_name,
                max_context_length=info.max_context_length,
                sampleable=parts.worker.samplers != "nowhere",
                max_lora_rank=info.max_lora_rank,
                vocab_size=info.vocab_size,
            )
        ]
    )


async def _run_info(parts: Parts, tenant: str, query: m.GetInfoRequest) -> m.GetInfoResponse:
    run = parts.live.find(tenant, query.model_id)
    data = m.ModelData(
        arch=parts.worker.info.architecture, model_name=run.base_model, tokenizer_id=run.base_model
    )
    return m.GetInfoResponse(
        model_data=data, model_id=run.run_id, lora_rank=run.spec.rank, model_name=run.base_model
    )


async def _tokenizer(parts: Parts, tenant: str, query: m.GetTokenizerUrls) -> m.ExternalWeightsUrls:
    validation.check_base_model(query.base_model, parts.model_name)
    return await parts.threads.downloads.run(
        tenant, lambda: parts.downloads.tokenizer(tenant, parts.model_name)
    )


# ---------------------------------------------------------------- checkpoints


def _checkpoint(row: tables.Checkpoint) -> m.Checkpoint:
    return m.Checkpoint(
        checkpoint_id=f"{row.kind}/{row.name}",
        checkpoint_type=_CHECKPOINT_TYPES[cast(CheckpointKind, row.kind)],
        time=iso(row.created_at),
        tinker_path=str(row.uri),
        size_bytes=row.size_bytes,
        public=row.public,
        user_metadata=texts(row.user_metadata),
        expires_at=iso(row.expires_at) if row.expires_at else None,
    )


def _training_runs(database: Database, tenant: str, rows: list[tables.Run]) -> list[m.TrainingRun]:
    newest = {
        (row.run_id, row.kind): row
        for row in database.newest_checkpoints(tenant, [row.id for row in rows], time.time())
    }
    return [
        _training_run(row, newest.get((row.id, "weights")), newest.get((row.id, "sampler_weights")))
        for row in rows
    ]


def _training_run(
    row: tables.Run, weights: tables.Checkpoint | None, sampler_weights: tables.Checkpoint | None
) -> m.TrainingRun:
    return m.TrainingRun(
        training_run_id=row.id,
        base_model=plain_name(row.base_model),
        model_owner=row.tenant,
        lora_rank=row.rank,
        last_request_time=iso(row.last_request_at),
        last_checkpoint=_checkpoint(weights) if weights else None,
        last_sampler_checkpoint=_checkpoint(sampler_weights) if sampler_weights else None,
        user_metadata=texts(row.user_metadata),
    )


# ---------------------------------------------------------------- lists


def _one_run(database: Database, tenant: str, query: m.GetTrainingRun) -> m.TrainingRun:
    run = _run(database, tenant, query.run_id, accessible=query.access_scope == "accessible")
    return _training_runs(database, tenant, [run])[0]


def _run_list(database: Database, tenant: str, query: m.ListTrainingRuns) -> m.TrainingRunList:
    accessible = query.access_scope == "accessible"
    runs, total = database.runs(tenant, time.time(), query.limit, query.offset, accessible, query.project_id)
    cursor = m.Cursor(offset=query.offset, limit=query.limit, total_count=total)
    return m.TrainingRunList(training_runs=_training_runs(database, tenant, runs), cursor=cursor)


def _run_checkpoints(database: Database, tenant: str, query: m.ListCheckpoints) -> m.CheckpointList:
    _run(database, tenant, query.run_id, accessible=True)
    rows, _ = database.checkpoints(tenant, time.time(), query.run_id, or_public=True)
    return m.CheckpointList(checkpoints=[_checkpoint(row) for row in rows])


def _user_checkpoints(database: Database, tenant: str, query: m.ListUserCheckpoints) -> m.CheckpointList:
    rows, total = database.checkpoints(tenant, time.time(), None, query.limit, query.offset)
    cursor = m.Cursor(offset=query.offset, limit=query.limit, total_count=total)
    return m.CheckpointList(checkpoints=[_checkpoint(row) for row in rows], cursor=cursor)


def _run(database: Database, tenant: str, run_id: str, accessible: bool) -> tables.Run:
    row = database.run(tenant, run_id, time.time(), accessible)
    if row is None:
        raise NotFound(f"run_id: no training run {run_id[:200]!r}")
    return row


QUERIES: dict[type[m.Query[Any]], Answer] = {
    m.GetServerCapabilities: _capabilities,
    m.GetInfoRequest: _run_info,
    m.GetTokenizerUrls: _tokenizer,
    m.GetTrainingRun: reads(_one_run),
    m.ListTrainingRuns: reads(_run_list),
    m.ListCheckpoints: reads(_run_checkpoints),
    m.ListUserCheckpoints: reads(_user_checkpoints),
}
